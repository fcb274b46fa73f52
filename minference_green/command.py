"""What one run of any command costs on this machine: joules, grams, seconds, its exit code."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime

import psutil

from minference_green.errors import MeasurementError, UsageError
from minference_green.grams import embodied_grams, operational_grams
from minference_green.journal import Record
from minference_green.meters.meter import Meter
from minference_green.results import CarbonTerms, Reading
from minference_green.validity import doubts

FORWARDED = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
)
_FROM_KEYBOARD = (signal.SIGINT, signal.SIGQUIT)


class CommandCost(Record):
    """One run of a command; ``joules`` and ``grams`` are null, with the reason, if not read."""

    command: tuple[str, ...]
    started_at: str
    exit_code: int
    """As a shell gives it: 128 plus the number of the signal that ended it."""
    seconds: float
    readings: tuple[Reading, ...]
    carbon: CarbonTerms
    valid: bool
    doubts: tuple[str, ...]

    @property
    def joules(self) -> float | None:
        """Headline joules over all devices."""
        parts = [r.joules for r in self.readings if r.headline]
        known = [p for p in parts if p is not None]
        return sum(known) if known and len(known) == len(parts) else None

    @property
    def operational_grams(self) -> float | None:
        """Grams of CO2e to supply the joules."""
        return None if self.joules is None else operational_grams(self.joules, self.carbon)

    @property
    def embodied_grams(self) -> float:
        """Grams of making the hardware, by the seconds it was held."""
        return embodied_grams(self.seconds, self.carbon)


def measure_command(
    command: Sequence[str], meters: Sequence[Meter], carbon: CarbonTerms
) -> CommandCost:
    """Run ``command`` to its end between two readings of ``meters``.

    A board's joules are those of the command, its children and whatever else runs there. Its
    output, its input and its working directory are this process's own, and so are signals:
    they are passed on. Children it leaves behind are named, and not waited for.

    Raises ``UsageError`` if it cannot be started, ``MeasurementError`` if a source cannot be
    read; a source that fails after the command has run is a doubt, so that its exit code and
    time are not lost.
    """
    _adopt_orphans()
    for meter in meters:
        meter.begin()
    before = [s for m in meters for s in m.state()]
    started_at = datetime.now(UTC).isoformat(timespec="seconds")
    known = {p.pid for p in psutil.Process().children()}
    start = time.monotonic()
    code = _run(command)
    end = time.monotonic()
    left = [p for p in psutil.Process().children() if p.pid not in known and _runs(p)]
    readings, unread = _read(meters, start, end)
    after = [s for m in meters for s in m.state()] if not unread else []
    valid, marks = doubts(end - start, None, readings, before, after)
    if left:
        names = ", ".join(f"{p.name()} ({p.pid})" for p in left)
        marks = (*marks, f"still running, its later energy not counted: {names}")
    return CommandCost(
        command=tuple(command),
        started_at=started_at,
        exit_code=128 - code if code < 0 else code,
        seconds=end - start,
        readings=readings,
        carbon=carbon,
        valid=valid and not unread,
        # A run's remedy for a short window is an option that a command does not have.
        doubts=(*unread, *(m.replace("raise --window", "measure it for longer") for m in marks)),
    )


def peak_watts(reading: Reading) -> float | None:
    """Highest sampled power of the window; null without samples."""
    return reading.evidence.get("peak_watts")


def _read(
    meters: Sequence[Meter], start: float, end: float
) -> tuple[tuple[Reading, ...], tuple[str, ...]]:
    readings: list[Reading] = []
    unread: list[str] = []
    for meter in meters:
        try:
            readings += meter.end(start, end)
        except MeasurementError as error:
            unread.append(str(error))
    return tuple(readings), tuple(unread)


def _run(command: Sequence[str]) -> int:
    try:
        process = subprocess.Popen(list(command))
    except OSError as error:
        raise UsageError(f"cannot start {command[0]}: {error.strerror}") from error
    with _forwarding(process):
        return process.wait()


@contextmanager
def _forwarding(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Pass signals on to the command, except those it gets from the keyboard itself."""

    def forward(number: int, _: object) -> None:
        if number in _FROM_KEYBOARD and _at_keyboard():
            return  # the terminal signals every process in the foreground, so the command too
        process.send_signal(number)

    previous = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _at_keyboard() -> bool:
    return sys.stdin.isatty() and os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp()


def _adopt_orphans() -> None:
    """Keep children of children ours when their parent ends: they are not strangers on a GPU."""
    pr_set_child_subreaper = 36
    ctypes.CDLL(None).prctl(pr_set_child_subreaper, 1)


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
