"""A load on a GPU that can be switched on, off and to pulses, for looking at its sensors."""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from minference_green.channel import Message, WorkerProcess
from minference_green.errors import MeasurementError
from minference_green.meters.simulated import SimulatedGpu, Trace

DUTY = 0.5
"""Share of each period a pulsed load is on."""

_HORIZON_SECONDS = 40.0
"""How far ahead a simulated load's pulses are laid; no check is longer."""


class Load(Protocol):
    """What a check needs of a load; times are monotonic seconds."""

    def steady(self) -> float:
        """Full load until told otherwise; when it began."""

    def pulsed(self, period_seconds: float, origin: float) -> None:
        """On for ``DUTY`` of each period, beginning at ``origin`` plus whole periods."""

    def idle(self) -> float:
        """Nothing from now on; when the last of it was done."""

    def work(self, seconds: float) -> tuple[float, float]:
        """A fixed amount of work of about so many seconds; its start and end.

        The same ``seconds`` is always the same work.
        """

    def close(self) -> None:
        """End the load."""


class WorkerLoad:
    """Matrix products on one GPU, in a process of their own; this one never imports torch."""

    def __init__(self, device: str) -> None:
        """``device`` is a GPU's UUID, or ``cpu``; raises ``MeasurementError`` if it fails."""
        self._directory = tempfile.TemporaryDirectory(prefix="minference-green-")
        log = Path(self._directory.name) / "load.log"
        self._worker = WorkerProcess("minference_green.load_worker", log)
        self._ask(type_="device", name=device)

    def steady(self) -> float:
        """See :class:`Load`."""
        return float(self._ask(type_="steady")["seconds"])

    def pulsed(self, period_seconds: float, origin: float) -> None:
        """See :class:`Load`."""
        self._ask(
            type_="pulsed",
            period_seconds=period_seconds,
            on_seconds=DUTY * period_seconds,
            origin=origin,
        )

    def idle(self) -> float:
        """See :class:`Load`."""
        return float(self._ask(type_="idle")["seconds"])

    def work(self, seconds: float) -> tuple[float, float]:
        """See :class:`Load`."""
        done = self._ask(type_="work", seconds=seconds)
        return float(done["start"]), float(done["end"])

    def close(self) -> None:
        """See :class:`Load`."""
        self._worker.stop()
        self._directory.cleanup()

    def _ask(self, *, type_: str, **fields: object) -> Message:
        try:
            answer = self._worker.channel.ask(type_, **fields)
        except (EOFError, BrokenPipeError):
            code, log = self._worker.stop(), self._worker.log.read_text(errors="replace")
            last = log.strip().splitlines()[-1:] or ["without a word"]
            self._directory.cleanup()
            raise MeasurementError(
                f"the load process ended (exit code {code}): {last[0]}"
            ) from None
        if answer["type"] == "error":
            self.close()
            raise MeasurementError(f"no load could be put on the device: {answer['message']}")
        return answer


class SimulatedLoad:
    """A load on a simulated GPU: its trace's highest power, or its lowest when idle.

    A trace of one power idles at a fifth of it. Works in the GPU's own time.
    """

    def __init__(self, gpu: SimulatedGpu) -> None:
        self._gpu = gpu
        watts = [w for _, w in gpu.spec.trace.points]
        self._high = max(watts)
        self._low = min(watts) if min(watts) < self._high else self._high / 5
        self._past: list[tuple[float, float]] = [(0.0, self._low)]
        self._lay([])

    def steady(self) -> float:
        """See :class:`Load`."""
        self._lay([(self._now, self._high)])
        return self._gpu.clock.now()

    def pulsed(self, period_seconds: float, origin: float) -> None:
        """See :class:`Load`."""
        first = origin - self._gpu.origin
        first += (1 + (self._now - first) // period_seconds) * period_seconds
        steps = [(self._now, self._low)]
        for i in range(round(_HORIZON_SECONDS / period_seconds)):
            begin = first + i * period_seconds
            steps += [(begin, self._high), (begin + DUTY * period_seconds, self._low)]
        self._lay(steps)

    def idle(self) -> float:
        """See :class:`Load`."""
        self._lay([(self._now, self._low)])
        return self._gpu.clock.now()

    def work(self, seconds: float) -> tuple[float, float]:
        """See :class:`Load`."""
        start = self.steady()
        self._gpu.clock.sleep(seconds)
        return start, self.idle()

    def close(self) -> None:
        """See :class:`Load`."""
        self.idle()

    @property
    def _now(self) -> float:
        return self._gpu.clock.now() - self._gpu.origin

    def _lay(self, steps: list[tuple[float, float]]) -> None:
        """What was drawn up to now, then ``steps``, each held until the next."""
        now = self._now
        self._past = [step for step in self._past if step[0] <= now] + steps
        points: list[tuple[float, float]] = []
        for t, w in self._past:
            points += [(t, points[-1][1]), (t, w)] if points else [(t, w)]
        self._gpu.spec = replace(self._gpu.spec, trace=Trace(tuple(points)))
