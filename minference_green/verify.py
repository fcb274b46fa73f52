"""Recompute a run or an audit from its raw numbers: joules, marks, every report beside it.

Needs no GPU. That a file is byte for byte what was written is the seal's part, which reading
it checks (``results.load``, ``ledger.load_audit``, ``baseline.read``); here its figures are held
to their evidence.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from minference_green.ledger import Answered, Asked, Audit, Spent
from minference_green.meters import evidence
from minference_green.render.audit import audit_document
from minference_green.render.audit_export import audit_csv, audit_json
from minference_green.render.audit_page import audit_page
from minference_green.render.document import document
from minference_green.render.export import as_csv, as_json
from minference_green.render.markdown import markdown
from minference_green.render.table import plain
from minference_green.results import Idle, Reading, Replay, Run, Setup, Window
from minference_green.validity import distrusted, doubts

_Source = TypeVar("_Source", Run, Audit)

RELATIVE = 1e-9
"""Floating point may differ by this between machines; a measured figure may not."""

_REPORTS: Mapping[str, Callable[[Run, Path], str]] = {
    "report.txt": lambda run, directory: plain(document(run, directory)),
    "report.md": lambda run, directory: markdown(document(run, directory)),
    "report.csv": lambda run, _: as_csv(run),
    "report.json": as_json,
}
"""Reports that may lie beside a run file, and how each is made."""

_AUDIT_REPORTS: Mapping[str, Callable[[Audit, Path], str]] = {
    "report.txt": lambda audit, directory: plain(audit_document(audit, directory)),
    "report.md": lambda audit, directory: markdown(audit_document(audit, directory)),
    "report.csv": lambda audit, _: audit_csv(audit),
    "report.json": audit_json,
    "report.html": audit_page,
}


@dataclass(frozen=True)
class Verification:
    """What was recomputed of one run or audit, and what did not come out as on file."""

    run_id: str
    sealed: bool
    windows: int
    """Of an audit, its metered stretches."""
    readings: int
    """With joules, all recomputed."""
    reports: tuple[str, ...]
    problems: tuple[str, ...]
    answers: int | None = None
    """Answer records of an audit, each held to its questions; null for a run."""


def verify(run: Run, directory: Path | None = None) -> Verification:
    """Recompute a run; ``directory`` is where its file lies, with the reports made from it."""
    problems = [p for window in run.windows for p in _window(run, window)]
    untrusted = distrusted(run.header.fingerprint)
    for event in run.events:
        if isinstance(event, Setup | Window | Idle | Replay):
            problems += [
                f"{_where(event)}: {p}"
                for reading in event.readings
                for p in _reading(reading, reading.device in untrusted)
            ]
    reports, wrong = _beside(run, directory, _REPORTS)
    problems += wrong
    readings = [
        r
        for e in run.events
        if isinstance(e, Setup | Window | Idle | Replay)
        for r in e.readings
        if r.joules is not None
    ]
    return Verification(
        run_id=run.header.run_id,
        sealed=run.sealed,
        windows=len(run.windows),
        readings=len(readings),
        reports=reports,
        problems=tuple(problems),
    )


def verify_audit(audit: Audit, directory: Path | None = None) -> Verification:
    """Recompute an audit, as :func:`verify` a run."""
    spent: list[Spent] = list(audit.of(Spent))
    answers: list[Answered] = list(audit.of(Answered))
    problems = [
        p for number, stretch in enumerate(spent, 1) for p in _spent(audit, stretch, number)
    ]
    asked = {(a.context_length, a.haystack): a for a in audit.of(Asked)}
    problems += [
        p for a in answers for p in _answered(a, asked.get((a.context_length, a.haystack)))
    ]
    reports, wrong = _beside(audit, directory, _AUDIT_REPORTS)
    return Verification(
        run_id=audit.header.audit_id,
        sealed=audit.sealed,
        windows=len(spent),
        readings=sum(r.joules is not None for s in spent for r in s.readings),
        reports=reports,
        problems=(*problems, *wrong),
        answers=len(answers),
    )


def _beside(
    source: _Source, directory: Path | None, made: Mapping[str, Callable[[_Source, Path], str]]
) -> tuple[tuple[str, ...], list[str]]:
    """The reports that lie in ``directory``, and a problem for each that ``source`` is not of."""
    if directory is None:
        return (), []
    kind = "run" if isinstance(source, Run) else "audit"
    found = tuple(name for name in made if (directory / name).is_file())
    wrong = [
        f"{name} is not what green-bench report makes of this {kind}; write it again"
        for name in found
        if (directory / name).read_bytes() != made[name](source, directory).encode()
    ]
    return found, wrong


def _spent(audit: Audit, stretch: Spent, number: int) -> Iterator[str]:
    where = f"stretch {number} ({stretch.what}{f' of {stretch.method}' if stretch.method else ''})"
    for reading in stretch.readings:
        # An audit marks the stretch, and not the reading, of a device that the doctor failed.
        yield from (f"{where}: {p}" for p in _reading(reading, untrusted=False))
        yield from _moved(where, stretch, reading)
    valid, reasons = doubts(
        stretch.seconds,
        None,
        stretch.readings,
        stretch.before,
        stretch.after,
        distrusted(audit.header.fingerprint),
    )
    yield from _counted(where, stretch, valid, reasons)


def _answered(answered: Answered, asked: Asked | None) -> Iterator[str]:
    where = f"{answered.method}, haystack {answered.haystack} at {answered.context_length}"
    if asked is None:
        yield f"{where}: answered without having been asked"
        return
    questions = len(asked.questions)
    given = {
        name: len(getattr(answered, name))
        for name in ("first_right", "rest_right", "logprob", "first_logprob", "margin")
    }
    for name, count in given.items():
        if count != questions:
            yield f"{where}: {count} of {name} to {questions} questions"


def _reading(reading: Reading, untrusted: bool) -> Iterator[str]:
    if reading.joules is None:
        return
    raw = reading.evidence
    try:
        joules = evidence.recompute(raw)
    except (ValueError, KeyError, ZeroDivisionError):
        yield f"{reading.joules:g} J of {reading.device} come without the numbers behind them"
        return
    if not _same(joules, reading.joules):
        yield f"{reading.device} has {reading.joules:.6g} J, its evidence gives {joules:.6g} J"
    if untrusted:
        if not reading.disputed:
            yield f"{reading.device} failed the doctor, and the reading is not disputed"
    elif reading.check_joules is not None and "check_tolerance_joules" in raw:
        apart = abs(joules - reading.check_joules)
        if reading.disputed is not (apart > raw["check_tolerance_joules"]):
            yield (
                f"{reading.device}: counter and sampled power are {apart:.3g} J apart, "
                f"{raw['check_tolerance_joules']:.3g} J are tolerated, "
                f"and the reading says disputed: {str(reading.disputed).lower()}"
            )


def _window(run: Run, window: Window) -> Iterator[str]:
    where = _where(window)
    generated = max(0, run.header.plan.decode_tokens - 1)
    per_sequence = {
        "prefill": window.context_length,
        "decode": generated,
        "request": window.context_length + generated,
    }
    tokens = window.repeats * run.header.workload.batch * per_sequence[window.phase]
    if window.tokens != tokens:
        yield f"{where}: {window.tokens} tokens, but {window.repeats} repeats are {tokens}"
    for reading in window.readings:
        yield from _moved(where, window, reading)
    valid, reasons = doubts(
        window.seconds,
        window.device_seconds,
        window.readings,
        window.before,
        window.after,
        distrusted(run.header.fingerprint),
    )
    yield from _counted(where, window, valid, reasons)


def _moved(where: str, window: Window | Spent, reading: Reading) -> Iterator[str]:
    for end, on_file in (("start", window.start_seconds), ("end", window.end_seconds)):
        told = reading.evidence.get(f"{end}_seconds", on_file)
        if told != on_file:
            yield f"{where}: the window's {end} is {on_file}, its evidence says {told}"


def _counted(
    where: str, window: Window | Spent, valid: bool, reasons: tuple[str, ...]
) -> Iterator[str]:
    if window.valid and not valid:
        yield f"{where}: counted as valid, but {reasons[0]}"
    if not window.valid and not window.reasons:
        yield f"{where}: left out without a reason"


def _where(event: Setup | Window | Idle | Replay) -> str:
    if isinstance(event, Window):
        return f"block {event.block}, window {event.order} ({event.method})"
    return f"block {event.block}, {event.event}"


def _same(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=RELATIVE)
