"""A GPU with known truth: any power over time, read through a counter with real ones' faults.

It lives by an injected clock. In virtual time tests are instant; in real time, from a JSON
file, whole runs can be measured on a machine without a GPU. Whatever comes from here says
``simulated`` in its name and source.
"""

import bisect
import itertools
import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from minference_green.meters.clock import Clock
from minference_green.meters.device import SIMULATED, Conditions, GpuInfo, PowerField
from minference_green.meters.evidence import Sample
from minference_green.meters.faults import (
    DeviceLostError,
    NoCounterError,
    NoPowerError,
    NotPermittedError,
    SimulatedSpecError,
)

PERIOD_SECONDS = 0.1
"""Update period of counter and power on the GPUs known (H200: median 100.1 ms)."""


class VirtualClock:
    """Time that passes only when somebody sleeps or makes a call that takes long."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds

    def pass_by(self, seconds: float) -> None:
        """Let ``seconds`` pass."""
        self.seconds += seconds

    @property
    def clock(self) -> Clock:
        """As meters take it."""
        return Clock(lambda: self.seconds, self.pass_by)


@dataclass(frozen=True)
class Trace:
    """Power over time: (seconds, watts) points, linear between, held outside.

    Two points at one moment are a step. With ``repeat_seconds`` the part from 0 on repeats.
    """

    points: tuple[tuple[float, float], ...]
    repeat_seconds: float | None = None

    def __post_init__(self) -> None:
        times = [t for t, _ in self.points]
        if not times or times != sorted(times):
            raise ValueError(f"trace needs points in order of time, got {times[:5]}")
        if any(not math.isfinite(w) or w < 0 for _, w in self.points):
            raise ValueError("trace needs finite watts that are not negative")
        if self.repeat_seconds is not None and self.repeat_seconds <= 0:
            raise ValueError(f"repeat_seconds must be positive, got {self.repeat_seconds}")

    def watts(self, t: float) -> float:
        """Power at ``t``; at a step the later value."""
        if self.repeat_seconds is not None:
            t %= self.repeat_seconds
        i = bisect.bisect_right(self._times, t)
        if i == 0 or i == len(self.points):
            return self.points[max(i - 1, 0)][1]
        return self._on_line(i, t)

    def joules(self, t: float) -> float:
        """Exact integral from 0 to ``t``."""
        if self.repeat_seconds is None:
            return self._from_first(t) - self._from_first(0.0)
        cycles, rest = divmod(t, self.repeat_seconds)
        zero = self._from_first(0.0)
        cycle = self._from_first(self.repeat_seconds) - zero
        return cycles * cycle + self._from_first(rest) - zero

    def _from_first(self, t: float) -> float:
        """Integral from the first point to ``t``, negative before it."""
        i = bisect.bisect_right(self._times, t)
        if i == 0:
            return (t - self._times[0]) * self.points[0][1]
        t0, w0 = self.points[i - 1]
        w1 = w0 if i == len(self.points) else self._on_line(i, t)
        return self._sums[i - 1] + (t - t0) * (w0 + w1) / 2

    def _on_line(self, i: int, t: float) -> float:
        """Power at ``t`` on the line that ends in point ``i``."""
        (t0, w0), (t1, w1) = self.points[i - 1], self.points[i]
        return w0 + (w1 - w0) * (t - t0) / (t1 - t0)

    @cached_property
    def _times(self) -> list[float]:
        return [t for t, _ in self.points]

    @cached_property
    def _sums(self) -> list[float]:
        sums = [0.0]
        for (t0, w0), (t1, w1) in itertools.pairwise(self.points):
            sums.append(sums[-1] + (t1 - t0) * (w0 + w1) / 2)
        return sums


def constant(watts: float) -> Trace:
    """The same power for ever."""
    return Trace(((0.0, watts),))


def steps(*parts: tuple[float, float]) -> Trace:
    """(from second, watts) parts, each held until the next begins."""
    points: list[tuple[float, float]] = []
    for t, w in parts:
        if points:
            points.append((t, points[-1][1]))
        points.append((t, w))
    return Trace(tuple(points))


@dataclass(frozen=True)
class CounterSpec:
    """How the energy counter shows the truth."""

    period_seconds: float = PERIOD_SECONDS
    phase_seconds: float = 0.0
    jitter_seconds: float = 0.0
    """Each update is early or late by up to this."""
    lag_seconds: float = 0.0
    """The value shown is the truth of this long before the update."""
    quantum_joules: float = 0.001
    sensed_share: float = 1.0
    """Below 1 the sensor looks at this last part of each period and takes it for the whole."""
    start_joules: float = 100_000.0
    """A counter runs since the driver was loaded."""
    call_seconds: float = 0.003
    slow_call_seconds: float = 0.0
    """Some calls take this long instead..."""
    slow_call_share: float = 0.0
    """...this share of them."""

    def __post_init__(self) -> None:
        if self.period_seconds <= 0 or not 0 <= self.jitter_seconds < self.period_seconds / 2:
            raise ValueError(
                f"counter needs a positive period and a jitter below half of it, got "
                f"{self.period_seconds} and {self.jitter_seconds}"
            )


@dataclass(frozen=True)
class FaultSpec:
    """What goes wrong, and from which second on."""

    reset_at: float | None = None
    stuck_from: float | None = None
    nan_from: float | None = None
    zero_from: float | None = None
    vanish_at: float | None = None
    scale_from: float | None = None
    """From here on the counter gains ``scale`` times the truth."""
    scale: float = 1.0
    answers_as: str | None = None
    """UUID the device gives instead of its own."""
    counter_forbidden: bool = False


@dataclass(frozen=True)
class GpuSpec:
    """A simulated GPU: its truth, its counter, its faults."""

    trace: Trace
    uuid: str = "GPU-51a0-0"
    name: str = "GPU"
    counter: CounterSpec | None = CounterSpec()
    faults: FaultSpec = FaultSpec()
    power_fields: tuple[PowerField, ...] = ("instant", "average", "usage")
    power_noise_watts: float = 0.0
    power_limit_watts: float | None = 700.0
    mig: bool = False
    process_ids: tuple[int, ...] = ()
    conditions: Conditions = field(
        default_factory=lambda: Conditions(
            temperature_celsius=40.0,
            sm_clock_mhz=1980.0,
            memory_clock_mhz=3201.0,
            memory_used_bytes=2**30,
            throttle_seconds={"power_cap": 0.0, "thermal": 0.0, "power_brake": 0.0},
        )
    )
    seed: int = 0


class SimulatedGpu:
    """A GPU that behaves as its ``GpuSpec`` says; see :class:`device.Gpu`."""

    def __init__(self, spec: GpuSpec, clock: Clock, origin: float = 0.0) -> None:
        self.spec, self.clock, self.origin = spec, clock, origin
        self.calls = 0
        """Counter reads so far, for tests of how much is polled."""
        self._latency = random.Random(f"{spec.seed} latency")  # noqa: S311 - no secret

    @property
    def info(self) -> GpuInfo:
        """Identity and what is supported."""
        spec = self.spec
        self._answer()
        return GpuInfo(
            uuid=spec.faults.answers_as or spec.uuid,
            name=f"simulated {spec.name}",
            library=SIMULATED,
            driver="none",
            has_counter=spec.counter is not None,
            power_field=spec.power_fields[0] if spec.power_fields else None,
            memory_bytes=80 * 2**30,
            power_limit_watts=spec.power_limit_watts,
            mig=spec.mig,
        )

    def energy_joules(self) -> float:
        """What the counter shows at a random moment within the call."""
        counter = self.spec.counter
        if counter is None:
            raise NoCounterError(self.spec.uuid)
        if self.spec.faults.counter_forbidden:
            raise NotPermittedError("reading the energy counter", "run as root")
        self.calls += 1
        seconds = counter.call_seconds
        if self._latency.random() < counter.slow_call_share:
            seconds = counter.slow_call_seconds
        latched = self._latency.random() * seconds
        self.clock.sleep(latched)
        moment = self._answer()
        self.clock.sleep(seconds - latched)
        return self._shown(moment)

    def watts(self, power_field: PowerField) -> float:
        """The power reading as of its last 100 ms update."""
        moment = self._answer()
        if power_field not in self.spec.power_fields:
            raise NoPowerError(self.spec.uuid)
        return self.watts_as_of(moment, power_field)

    def watts_as_of(self, moment: float, power_field: PowerField) -> float:
        """What the power reading shows, or showed, at a moment of the device's own time."""
        updated = math.floor(moment / PERIOD_SECONDS) * PERIOD_SECONDS
        noise = self._uniform("power", updated) * self.spec.power_noise_watts
        if power_field == "instant":
            return self.spec.trace.watts(updated) + noise
        return self.spec.trace.joules(updated) - self.spec.trace.joules(updated - 1) + noise

    def conditions(self) -> Conditions:
        """As specified."""
        self._answer()
        return replace(self.spec.conditions, power_limit_watts=self.spec.power_limit_watts)

    def process_ids(self) -> tuple[int, ...]:
        """As specified."""
        self._answer()
        return self.spec.process_ids

    def close(self) -> None:
        """Nothing to release."""

    def truth(self, start: float, end: float) -> float:
        """Joules really spent between two times of the clock."""
        trace = self.spec.trace
        return trace.joules(end - self.origin) - trace.joules(start - self.origin)

    def _answer(self) -> float:
        """Seconds on the device's own time, if it is still there."""
        moment = self.clock.now() - self.origin
        gone = self.spec.faults.vanish_at
        if gone is not None and moment >= gone:
            raise DeviceLostError(self.spec.uuid, "simulated: it vanished")
        return moment

    def _shown(self, moment: float) -> float:
        faults = self.spec.faults
        if faults.nan_from is not None and moment >= faults.nan_from:
            return math.nan
        if faults.zero_from is not None and moment >= faults.zero_from:
            return 0.0
        if faults.stuck_from is not None:
            moment = min(moment, faults.stuck_from)
        value = self._counted(moment)
        if faults.scale_from is not None and moment >= faults.scale_from:
            base = self._counted(faults.scale_from)
            value = base + (value - base) * faults.scale
        if faults.reset_at is not None and moment >= faults.reset_at:
            value -= self._counted(faults.reset_at)
        return value

    def _counted(self, moment: float) -> float:
        """Counter value as of the last update at or before ``moment``."""
        counter = self.spec.counter
        assert counter is not None
        k = math.floor((moment - counter.phase_seconds) / counter.period_seconds) + 1
        while self._update(k) > moment:
            k -= 1
        shown = self._update(k) - counter.lag_seconds
        if counter.sensed_share < 1:
            joules = self._sensed(shown, counter)
        else:
            joules = self.spec.trace.joules(shown)
        quantum = counter.quantum_joules
        return counter.start_joules + (
            math.floor(joules / quantum) * quantum if quantum else joules
        )

    def _update(self, k: int) -> float:
        """When the counter takes its ``k``-th value."""
        counter = self.spec.counter
        assert counter is not None
        late = self._uniform("update", k) * counter.jitter_seconds
        return counter.phase_seconds + k * counter.period_seconds + late

    def _sensed(self, shown: float, counter: CounterSpec) -> float:
        """What a part-time sensor makes of the truth up to ``shown``."""
        period, joules = counter.period_seconds, 0.0
        seen = period * counter.sensed_share
        for k in range(1, math.floor(shown / period + 1e-9) + 1):
            trace = self.spec.trace
            joules += (trace.joules(k * period) - trace.joules(k * period - seen)) * period / seen
        return joules

    def _uniform(self, what: str, key: float) -> float:
        """The same number in -1..1 for the same key, in every process."""
        return random.Random(f"{self.spec.seed} {what} {key}").uniform(-1, 1)  # noqa: S311


class SimulatedPower:
    """Sampled power of simulated GPUs, computed for any time asked; see ``sampler.PowerSource``.

    For virtual time, in which no other process can live.
    """

    problem: str | None = None

    def __init__(self, gpus: Sequence[SimulatedGpu], period_seconds: float) -> None:
        self._gpus, self._period = gpus, period_seconds

    def samples(self, device: int, start: float, end: float) -> list[Sample]:
        """One sample a period, from the last before ``start`` to the first after ``end``."""
        gpu = self._gpus[device]
        field = gpu.info.power_field
        assert field is not None
        ticks = range(math.floor(start / self._period), math.floor(end / self._period) + 2)
        moments = [i * self._period for i in ticks]
        return [Sample(t, gpu.watts_as_of(t - gpu.origin, field)) for t in moments]

    def close(self) -> None:
        """Nothing to stop."""


def load_specs(path: Path) -> list[GpuSpec]:
    """Simulated GPUs from a JSON file ``{"gpus": [{"watts": 300, ...}, ...]}``.

    ``watts`` is a number or (seconds, watts) points, ``repeat_seconds`` repeats them;
    ``counter`` (null for none) and ``faults`` take the fields of their records, the rest is
    as in :class:`GpuSpec`. Raises ``SimulatedSpecError`` naming file and what is wrong.
    """
    try:
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise SimulatedSpecError(
            f"cannot read the simulated devices in {path}: {error.strerror}"
        ) from error
    except ValueError as error:
        raise SimulatedSpecError(f"{path} is not JSON: {error}") from error
    gpus = data.get("gpus") if isinstance(data, dict) else None
    if not isinstance(gpus, list) or not gpus:
        raise SimulatedSpecError(f'{path} must hold {{"gpus": [...]}} with at least one device')
    specs = []
    for number, gpu in enumerate(gpus):
        try:
            specs.append(_spec(number, gpu))
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise SimulatedSpecError(f"{path}, gpus[{number}]: {error}") from error
    if len({s.uuid for s in specs}) < len(specs):
        raise SimulatedSpecError(f"{path}: two devices have one uuid")
    return specs


def _spec(number: int, gpu: Mapping[str, Any]) -> GpuSpec:
    rest = dict(gpu)
    watts = rest.pop("watts")
    points = watts if isinstance(watts, list) else [(0.0, watts)]
    rest["trace"] = Trace(
        tuple((float(t), float(w)) for t, w in points), rest.pop("repeat_seconds", None)
    )
    rest.setdefault("uuid", f"GPU-51a0-{number}")
    if rest.get("counter") is not None:
        rest["counter"] = CounterSpec(**rest["counter"])
    if "faults" in rest:
        rest["faults"] = FaultSpec(**rest["faults"])
    if "conditions" in rest:
        rest["conditions"] = Conditions(**rest["conditions"])
    for name in ("power_fields", "process_ids"):
        if name in rest:
            rest[name] = tuple(rest[name])
    return GpuSpec(**rest)
