"""Named sets of stored runs, to which later ones are compared: files, each with its hash.

A baseline is a folder: ``baseline.json`` lists the runs, and each run file lies beside it
under its run's ID. It is meant to be committed and reviewed. Nothing is replaced unasked.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from pydantic import ValidationError

from minference_green import fingerprint
from minference_green.errors import MeasurementError, NotComparableError, UsageError
from minference_green.journal import Record, SealError
from minference_green.results import Run, load, run_file
from minference_green.stats import invalid_share
from minference_green.validity import MAX_INVALID_SHARE
from minference_green.verdict import MIN_BLOCKS

ROOT = Path("reports/baselines")
"""Where baselines lie unless told otherwise."""

MANIFEST = "baseline.json"

PREFIX = "baseline:"
"""How a command's argument names a baseline instead of a run."""

STALE_AGE = timedelta(days=30)
STALE_COMMITS = 100
"""Older than either, a baseline is warned of: machine, driver and code have moved on."""


class StoredRun(Record):
    """One run of a baseline: its file, and where the code stood when it was stored."""

    run_id: str
    sha256: str
    added_at: str
    commit: str | None
    """Of the repository it was stored from; null outside one."""
    dirty: bool | None

    @property
    def file(self) -> str:
        """Name of the run file inside the baseline's folder."""
        return f"{self.run_id}.jsonl"


class _Manifest(Record):
    name: str
    runs: tuple[StoredRun, ...]
    sha256: str = ""
    """Of the same text with this field empty."""

    def text(self) -> str:
        plain = self.model_copy(update={"sha256": ""}).model_dump_json()
        digest = hashlib.sha256(plain.encode()).hexdigest()
        sealed = self.model_copy(update={"sha256": digest})
        return json.dumps(sealed.model_dump(mode="json"), indent=2) + "\n"


@dataclass(frozen=True)
class Baseline:
    """A baseline as read: every file is what was stored."""

    name: str
    directory: Path
    stored: tuple[StoredRun, ...]
    runs: tuple[Run, ...]
    """In the order they were added, as ``stored``."""


class BaselineMissingError(NotComparableError):
    """The baseline asked for does not exist."""


def save(root: Path, name: str, source: Path, *, replace: bool = False) -> Baseline:
    """Begin a baseline with the run at ``source``.

    Raises ``UsageError`` for a name that exists (unless ``replace``) or is no file name, or
    an unfinished run; ``MeasurementError`` for one whose windows do not count.
    """
    directory = root / _checked(name)
    if (directory / MANIFEST).exists() and not replace:
        raise UsageError(
            f"baseline {name} exists in {root}; append with: green-bench baseline promote "
            f"{name} RUN, or start it anew with --replace"
        )
    _write(directory, name, (), source)
    return read(root, name)


def promote(root: Path, name: str, source: Path) -> Baseline:
    """Append the run at ``source`` to a baseline; raises as :func:`save` and :func:`read` do."""
    before = read(root, name)
    run_id = load(source).header.run_id
    if run_id in [s.run_id for s in before.stored]:
        raise UsageError(f"baseline {name} already holds run {run_id}")
    _write(before.directory, name, before.stored, source)
    return read(root, name)


def read(root: Path, name: str) -> Baseline:
    """A baseline with its runs.

    Raises ``BaselineMissingError`` naming those that exist, and ``SealError`` where a file is
    gone or not what was stored.
    """
    directory = root / _checked(name)
    file = directory / MANIFEST
    if not file.is_file():
        raise BaselineMissingError(
            f"there is no baseline {name} in {root} (there: {', '.join(names(root)) or 'none'}); "
            f"make it with: green-bench baseline save {name} RUN"
        )
    raw = file.read_bytes()
    try:
        manifest = _Manifest.model_validate_json(raw)
        intact = manifest.name == name and raw == manifest.text().encode()
    except ValidationError:
        intact = False
    if not intact:
        raise _tampered(file)
    return Baseline(
        name, directory, manifest.runs, tuple(_read_run(directory, s) for s in manifest.runs)
    )


def names(root: Path) -> tuple[str, ...]:
    """Names of the baselines in ``root``."""
    return tuple(sorted(file.parent.name for file in root.glob(f"*/{MANIFEST}")))


def runs_of(reference: str, root: Path) -> tuple[Run, ...]:
    """The runs that a command's argument means: ``baseline:NAME``, or the path of a run."""
    if reference.startswith(PREFIX):
        return read(root, reference.removeprefix(PREFIX)).runs
    return (load(Path(reference)),)


def warnings(baseline: Baseline, now: datetime) -> tuple[str, ...]:
    """What limits a baseline: its age, the code it is of, too few blocks."""
    newest, run = baseline.stored[-1], baseline.runs[-1]
    found: list[str] = []
    age = now - datetime.fromisoformat(run.header.created_at)
    since = fingerprint.commits_since(newest.commit, Path.cwd()) if newest.commit else None
    anew = f"measure again and run: green-bench baseline promote {baseline.name} RUN"
    if age > STALE_AGE:
        found.append(f"Baseline {baseline.name} is {age.days} days old; {anew}")
    if since is not None and since > STALE_COMMITS:
        found.append(f"Baseline {baseline.name} is {since} commits old; {anew}")
    for stored, one in zip(baseline.stored, baseline.runs, strict=True):
        if stored.dirty or one.header.fingerprint.code_dirty:
            found.append(
                f"Run {stored.run_id} of baseline {baseline.name} is of a tree with uncommitted "
                "changes; nobody can measure it again"
            )
    blocks = sum(len(one.blocks_done) for one in baseline.runs)
    if blocks < MIN_BLOCKS:
        found.append(
            f"Baseline {baseline.name} holds {blocks} block(s), and a verdict takes {MIN_BLOCKS}; "
            "promote another run"
        )
    return tuple(found)


def _read_run(directory: Path, stored: StoredRun) -> Run:
    file = directory / stored.file
    if not file.is_file() or _sha256(file.read_bytes()) != stored.sha256:
        raise _tampered(file)
    return load(file)


def _tampered(file: Path) -> SealError:
    what = "was changed after it was stored" if file.exists() else "is missing"
    return SealError(
        f"{file} {what}; restore it from version control, "
        "or save the baseline anew from a run that was measured"
    )


def _write(directory: Path, name: str, before: Sequence[StoredRun], source: Path) -> None:
    raw, run = _storable(source)
    commit, dirty = fingerprint.repository_state(Path.cwd())
    stored = StoredRun(
        run_id=run.header.run_id,
        sha256=_sha256(raw),
        added_at=datetime.now(UTC).isoformat(timespec="seconds"),
        commit=commit,
        dirty=dirty,
    )
    kept = (*before, stored)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / stored.file).write_bytes(raw)
        # The list last and at once: a reader sees the old baseline or the new one.
        draft = directory / f"{MANIFEST}.new"
        draft.write_text(_Manifest(name=name, runs=kept).text(), encoding="utf-8")
        draft.replace(directory / MANIFEST)
        for file in directory.glob("*.jsonl"):
            if file.name not in [s.file for s in kept]:
                file.unlink()
    except OSError as error:
        raise UsageError(
            f"cannot write baseline {name} to {directory}: {error.strerror}; choose another place "
            "with --baselines"
        ) from error


def _storable(source: Path) -> tuple[bytes, Run]:
    run = load(source)
    if not run.complete or not run.sealed:
        raise UsageError(
            f"run {run.header.run_id} is not finished ({len(run.blocks_done)} of "
            f"{run.blocks_planned} blocks), so it is not sealed; go on with: "
            f"green-bench run --resume {run.header.run_id}"
        )
    if not run.windows or invalid_share(run) > MAX_INVALID_SHARE:
        raise MeasurementError(
            f"run {run.header.run_id} has {len(run.windows)} windows, {invalid_share(run):.0%} of "
            f"them invalid; a baseline takes some, at most {MAX_INVALID_SHARE:.0%} invalid"
        )
    return run_file(source).read_bytes(), run


def _checked(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise UsageError(
            f"{name!r} is no name for a baseline; use letters, digits, dots, dashes, underscores"
        )
    return name


def _sha256(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()
