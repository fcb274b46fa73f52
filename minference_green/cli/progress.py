"""Progress of a run on stderr: a bar with the time left, or plain lines where nobody watches."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


class _Bar:
    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self._task = bar.add_task("starting", total=None)

    def block(self, number: int, of: int, windows: int, window_seconds: float) -> None:
        del window_seconds  # the bar learns the pace from the windows themselves
        done = (number - 1) * windows
        self._bar.update(self._task, total=of * windows, completed=done, refresh=True)

    def say(self, message: str) -> None:
        self._bar.update(self._task, description=message, refresh=True)

    def advance(self) -> None:
        self._bar.advance(self._task)


class _Lines:
    """One line a step, for logs."""

    def __init__(self) -> None:
        self._begin = time.monotonic()
        self._windows = self._done = 0

    def block(self, number: int, of: int, windows: int, window_seconds: float) -> None:
        self._windows, self._done = of * windows, (number - 1) * windows
        self._print(f"block {number} of {of}: {windows} windows of {window_seconds:g} s")

    def say(self, message: str) -> None:
        self._print(message)

    def advance(self) -> None:
        self._done += 1
        self._print(f"window {self._done} of {self._windows} on disk")

    def _print(self, message: str) -> None:
        seconds = time.monotonic() - self._begin
        print(f"[{seconds:6.1f} s] {message}", file=sys.stderr, flush=True)  # noqa: T201


class _Silent:
    def block(self, number: int, of: int, windows: int, window_seconds: float) -> None: ...
    def say(self, message: str) -> None: ...
    def advance(self) -> None: ...


class _AuditBar(_Bar):
    def begin(self, done: int, of: int) -> None:
        self._bar.update(self._task, total=of, completed=done, refresh=True)


class _AuditLines:
    """A line every few seconds, for logs."""

    def __init__(self) -> None:
        self._begin = self._last = time.monotonic()
        self._done = self._of = 0

    def begin(self, done: int, of: int) -> None:
        self._done, self._of = done, of
        self._print("asking")

    def say(self, message: str) -> None:
        if time.monotonic() - self._last > _LINE_SECONDS:
            self._print(message)

    def advance(self) -> None:
        self._done += 1
        if self._done == self._of:
            self._print("all asked")

    def _print(self, message: str) -> None:
        self._last = time.monotonic()
        seconds = self._last - self._begin
        line = f"[{seconds:6.1f} s] {message}: {self._done} of {self._of} answers on disk"
        print(line, file=sys.stderr, flush=True)  # noqa: T201


class _AuditSilent(_Silent):
    def begin(self, done: int, of: int) -> None: ...


_LINE_SECONDS = 5.0


@contextmanager
def open_audit_progress(quiet: bool) -> Iterator[_AuditBar | _AuditLines | _AuditSilent]:
    """Progress of an audit: a bar on a terminal, lines elsewhere, nothing when quiet."""
    console = Console(stderr=True)
    if quiet:
        yield _AuditSilent()
    elif not console.is_terminal:
        yield _AuditLines()
    else:
        columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            yield _AuditBar(bar)


@contextmanager
def open_progress(quiet: bool) -> Iterator[_Bar | _Lines | _Silent]:
    """Progress for one command: a bar on a terminal, lines elsewhere, nothing when quiet."""
    console = Console(stderr=True)
    if quiet:
        yield _Silent()
    elif not console.is_terminal:
        yield _Lines()
    else:
        columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            yield _Bar(bar)
