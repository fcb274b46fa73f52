"""Recompute a run from its raw numbers: every joule, every mark, every report beside it.

Needs no GPU. That a file is byte for byte what was written is the seal's part, which reading
it checks (``results.load``, ``baseline.read``); here its figures are held to their evidence.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from minference_green.meters import evidence
from minference_green.render.document import document
from minference_green.render.export import as_csv, as_json
from minference_green.render.markdown import markdown
from minference_green.render.table import plain
from minference_green.results import Idle, Reading, Replay, Run, Setup, Window
from minference_green.validity import distrusted, doubts

RELATIVE = 1e-9
"""Floating point may differ by this between machines; a measured figure may not."""

_REPORTS: Mapping[str, Callable[[Run, Path], str]] = {
    "report.txt": lambda run, directory: plain(document(run, directory)),
    "report.md": lambda run, directory: markdown(document(run, directory)),
    "report.csv": lambda run, _: as_csv(run),
    "report.json": as_json,
}
"""Reports that may lie beside a run file, and how each is made."""


@dataclass(frozen=True)
class Verification:
    """What was recomputed of one run, and what did not come out as on file."""

    run_id: str
    sealed: bool
    windows: int
    readings: int
    """With joules, all recomputed."""
    reports: tuple[str, ...]
    problems: tuple[str, ...]


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
    reports = [n for n in _REPORTS if directory is not None and (directory / n).is_file()]
    for name in reports:
        assert directory is not None
        if (directory / name).read_bytes() != _REPORTS[name](run, directory).encode():
            problems.append(
                f"{name} is not what green-bench report makes of this run; write it again"
            )
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
        reports=tuple(reports),
        problems=tuple(problems),
    )


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
        for end, on_file in (("start", window.start_seconds), ("end", window.end_seconds)):
            told = reading.evidence.get(f"{end}_seconds", on_file)
            if told != on_file:
                yield f"{where}: the window's {end} is {on_file}, its evidence says {told}"
    valid, reasons = doubts(
        window.seconds,
        window.device_seconds,
        window.readings,
        window.before,
        window.after,
        distrusted(run.header.fingerprint),
    )
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
