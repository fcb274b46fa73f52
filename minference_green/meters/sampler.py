"""Power about 20 times a second, from a process of its own.

A sampling thread inside a Python workload is late by milliseconds and biased toward idle
moments, so the samples come from a separate, small process: ``python -P -m
minference_green.meters.sampler``. It writes one line per sample to a pipe (monotonic
seconds, then watts per device) and ends when its parent does.
"""

import contextlib
import os
import select
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from minference_green.errors import GreenBenchError
from minference_green.meters.clock import MONOTONIC, Clock
from minference_green.meters.device import Gpu, PowerField
from minference_green.meters.evidence import Sample

PERIOD_SECONDS = 0.05
REACH_SECONDS = 3 * PERIOD_SECONDS
"""A sample stands for the time until the next, at most this long."""

_KEPT = 20 * 3600
"""Samples kept: an hour."""
_LATE_SECONDS = 1.0
_START_SECONDS = 20.0


class PowerSource(Protocol):
    """Where a meter gets sampled power from."""

    def samples(self, device: int, start: float, end: float) -> list[Sample]:
        """Samples from the last before ``start`` to the first after ``end``, in order."""

    @property
    def problem(self) -> str | None:
        """Why samples are missing; null while they come."""

    def close(self) -> None:
        """Stop sampling."""


class Sampler:
    """The parent's side of the sampling process.

    ``source`` are the words after the module's name, see :func:`main`.
    """

    def __init__(self, source: Sequence[str]) -> None:
        command = [sys.executable, "-P", "-m", __name__, str(os.getpid()), *source]
        # A session of its own: Ctrl-C is for the parent, which then closes the sampler.
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._rows: deque[tuple[float, ...]] = deque(maxlen=_KEPT)
        self._said = ""
        self._arrived = threading.Condition()
        self._ended = False
        threading.Thread(target=self._read, daemon=True, name="sampler").start()

    def wait_ready(self) -> None:
        """Return once the first sample has come or the sampler has failed."""
        with self._arrived:
            self._arrived.wait_for(lambda: self._rows or self._ended, _START_SECONDS)

    def samples(self, device: int, start: float, end: float) -> list[Sample]:
        """See :class:`PowerSource`; waits up to a second for samples that are late."""
        with self._arrived:
            self._arrived.wait_for(
                lambda: self._ended or (bool(self._rows) and self._rows[-1][0] >= end),
                _LATE_SECONDS,
            )
            rows = list(self._rows)
        found = [Sample(r[0], r[1 + device]) for r in rows if r[1 + device] >= 0]
        first = max((i for i, s in enumerate(found) if s.seconds <= start), default=0)
        return [s for i, s in enumerate(found) if i >= first and s.seconds < end + REACH_SECONDS]

    @property
    def problem(self) -> str | None:
        """Why samples are missing; null while they come."""
        if self._ended:
            code = self._process.poll()
            return f"the sampler ended (exit {code})" + (f": {self._said}" if self._said else "")
        if not self._rows:
            return "the sampler has not begun"
        behind = time.monotonic() - self._rows[-1][0]
        return f"the sampler is {behind:.1f} s behind" if behind > _LATE_SECONDS else None

    @property
    def pid(self) -> int:
        """Process ID of the sampler."""
        return self._process.pid

    def close(self) -> None:
        """End the sampling process."""
        with contextlib.suppress(OSError):
            assert self._process.stdin is not None
            self._process.stdin.close()
        try:
            self._process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            # A sampler that was killed leaves half a line, whose last number may be cut as well.
            if not line.endswith("\n"):
                break
            try:
                row = tuple(float(word) for word in line.split())
            except ValueError:
                self._said = line.strip()
                continue
            with self._arrived:
                self._rows.append(row)
                self._arrived.notify_all()
        self._process.wait()
        with self._arrived:
            self._ended = True
            self._arrived.notify_all()


def sample(gpus: Sequence[Gpu], parent: int, clock: Clock = MONOTONIC) -> None:
    """Write samples to standard output until standard input or the parent is gone."""
    fields: list[PowerField | None] = [gpu.info.power_field for gpu in gpus]
    due = clock.now()
    while os.getppid() == parent:
        before = clock.now()
        watts = [
            gpu.watts(field) if field else -1.0 for gpu, field in zip(gpus, fields, strict=True)
        ]
        moment = (before + clock.now()) / 2
        print(f"{moment:.6f}", *(f"{w:.3f}" for w in watts), flush=True)  # noqa: T201 - the pipe
        due = max(due + PERIOD_SECONDS, clock.now())
        # Sleeping on standard input: it ends the moment the parent does.
        if select.select([sys.stdin], [], [], max(0.0, due - clock.now()))[0]:
            return


def main(words: Sequence[str]) -> int:
    """Sample until the parent is gone.

    ``words``: the parent's process ID, then ``nvml UUID...`` or ``simulated FILE ORIGIN``.
    """
    parent, kind, *rest = words
    gpus: list[Gpu]
    try:
        match kind:
            case "nvml":
                from minference_green.meters.nvml import NvmlGpu

                gpus = [NvmlGpu(uuid) for uuid in rest]
            case "simulated":
                from minference_green.meters.simulated import SimulatedGpu, load_specs

                file, origin = rest
                gpus = [SimulatedGpu(s, MONOTONIC, float(origin)) for s in load_specs(Path(file))]
            case _:
                raise AssertionError(kind)
        sample(gpus, int(parent))
    except BrokenPipeError:
        # The parent is gone; nothing may be flushed on the way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except GreenBenchError as error:
        print(error)  # noqa: T201 - told to the parent
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
