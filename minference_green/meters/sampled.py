"""Joules from sampled power, for GPUs without an energy counter."""

from collections.abc import Callable, Mapping, Sequence

from minference_green.meters import evidence
from minference_green.meters.clock import MONOTONIC, Clock
from minference_green.meters.counter import (
    COVERED_SHARE,
    as_device,
    as_state,
    check_window,
    describe,
    hidden_seconds,
    refuse_shared,
    shared_doubts,
)
from minference_green.meters.device import Gpu
from minference_green.meters.faults import NoPowerError, SamplerError, WindowError
from minference_green.meters.sampler import REACH_SECONDS, PowerSource
from minference_green.results import Device, DeviceState, Reading

MARGIN_SECONDS = 0.2
"""Sampled before the window too: the power beside it is taken off the margins."""

_FIELDS = {
    "instant": "field 186, instantaneous power",
    "average": "field 185, power averaged over the last second",
    "usage": "legacy power reading",
}


class SampledMeter:
    """Integrates sampled power of GPUs, each value held until the next; see ``meter.Meter``.

    ``gpus`` maps a place among the sampler's devices to the GPU there.
    """

    def __init__(
        self,
        gpus: Mapping[int, Gpu],
        sampler: PowerSource,
        *,
        allow_shared: bool = False,
        release: Callable[[], None] = lambda: None,
        clock: Clock = MONOTONIC,
    ) -> None:
        self._places, self._sampler = gpus, sampler
        self._allow_shared, self._clock = allow_shared, clock
        self._release = release
        self._ready: float | None = None
        for gpu in gpus.values():
            refuse_shared(gpu, allow_shared)
            if gpu.info.power_field is None:
                raise NoPowerError(gpu.info.uuid)

    @property
    def description(self) -> str:
        """In words: how energy is obtained, for the first line of every report."""
        info = self._gpus[0].info
        return (
            f"sampled power of {describe(self._gpus)}, which has no energy counter "
            f"({info.library} {_FIELDS[info.power_field or 'usage']}): wider uncertainty"
        )

    @property
    def devices(self) -> tuple[Device, ...]:
        """Devices read, for the fingerprint."""
        return tuple(as_device(g) for g in self._gpus)

    def begin(self) -> None:
        """Block until power has been sampled for a margin before the window."""
        for gpu in self._gpus:
            refuse_shared(gpu, self._allow_shared)
        self._clock.sleep(MARGIN_SECONDS)
        if self._sampler.problem:
            raise SamplerError(self._sampler.problem)
        self._ready = self._clock.now()

    def end(self, start: float, end: float) -> Sequence[Reading]:
        """Readings of the window; null with the reason where samples are missing."""
        ready, self._ready = self._ready, None
        if ready is None:
            raise WindowError("end() was called without begin()")
        check_window(start, end, ready, self._clock.now())
        self._clock.sleep_until(end + max(hidden_seconds(g) for g in self._gpus) + MARGIN_SECONDS)
        for gpu in self._gpus:
            refuse_shared(gpu, self._allow_shared)
        return [self._reading(i, gpu, start, end) for i, gpu in self._places.items()]

    def state(self) -> Sequence[DeviceState]:
        """Temperature, clocks and throttle times now, one per device."""
        return [as_state(g) for g in self._gpus]

    def close(self) -> None:
        """Release what was opened for this meter."""
        self._release()

    @property
    def _gpus(self) -> list[Gpu]:
        return list(self._places.values())

    def _reading(self, place: int, gpu: Gpu, start: float, end: float) -> Reading:
        info, hidden = gpu.info, hidden_seconds(gpu)
        t0, t1 = start - MARGIN_SECONDS, end + hidden
        samples = self._sampler.samples(place, t0, t1)
        share = evidence.coverage(samples, t0, t1, REACH_SECONDS)
        doubts = shared_doubts(gpu) if self._allow_shared else []
        joules = uncertainty = None
        raw: dict[str, float] = {}
        if share < COVERED_SHARE:
            why = f", {self._sampler.problem}" if self._sampler.problem else ""
            doubts.append(f"power samples cover {share:.0%} of the window{why}")
        else:
            raw = evidence.sampled_evidence(samples, t0, start, end, t1)
            joules, swing = evidence.held_bracket(samples, t0, start, end, t1)
            raw["peak_watts"] = max(s.watts for s in samples)
            missed = evidence.sampling_error(samples, start, end)
            uncertainty = evidence.check_tolerance(joules, swing, hidden, missed)
        return Reading(
            device=info.uuid,
            scope=info.scope,
            obtained="simulated" if info.simulated else "sampled",
            source=f"{info.library} {_FIELDS[info.power_field or 'usage']}",
            joules=joules,
            reason="; ".join(doubts) or None,
            uncertainty_joules=uncertainty,
            evidence=raw | {"coverage": share},
        )
