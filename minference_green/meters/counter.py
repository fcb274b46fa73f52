"""Joules from a GPU's energy counter, read where it is seen to move.

A counter that moves every 100 ms, read at any moment, is up to 100 ms old: two plain reads
around one second of work are wrong by several per cent. Here a reading hangs on four moves
that were *seen* (a poll with the old value shortly before one with the new), see
``evidence`` for the formula.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import psutil

from minference_green.meters import evidence
from minference_green.meters.clock import MONOTONIC, Clock
from minference_green.meters.device import Gpu, GpuInfo
from minference_green.meters.evidence import EDGES, Edge
from minference_green.meters.faults import (
    CounterBackwardsError,
    CounterSlowError,
    CounterStuckError,
    ImplausiblePowerError,
    MigError,
    NotANumberError,
    SharedDeviceError,
    WindowError,
    WrongDeviceError,
)
from minference_green.meters.sampler import REACH_SECONDS, PowerSource
from minference_green.results import Device, DeviceState, Reading

POLL_SECONDS = 0.001
"""Shortest time between two reads of a counter that is about to move."""

SHARP_SECONDS = 0.006
"""A move counts as seen if it happened within this of the time noted; a usual NVML call
takes 3 ms, so a rare slow one (17 ms) makes the watcher wait for the next move."""

BLUNT_SECONDS = 0.025
"""On a busy host the watcher takes moves timed this badly, and the reading says so..."""

HURRY_SECONDS = 1.0
"""...once it has waited this long for better ones."""

PATIENCE_SECONDS = 3.0
"""A counter that does not move for this long is stuck: known ones move every 20 to 100 ms."""

ASLEEP_SHARE = 0.8
"""Share of the shortest interval seen between moves that is slept through."""

COVERED_SHARE = 0.9
"""The independent integral needs samples over at least this share of the window."""


class EdgeWatcher:
    """Watches one counter for moves; remembers what it learned of its period."""

    def __init__(self, gpu: Gpu, clock: Clock) -> None:
        self.gpu, self.clock = gpu, clock
        self.uuid = gpu.info.uuid
        self._shortest: float | None = None
        self._last = 0.0
        """Last value seen, across windows: a counter only grows."""

    def read(self) -> float:
        """The counter now; raises if it is no energy or went backwards."""
        joules = self.gpu.energy_joules()
        if not evidence.is_energy(joules):
            raise NotANumberError(self.uuid, "the energy counter", joules)
        if joules < self._last:
            raise CounterBackwardsError(self.uuid, self._last, joules)
        self._last = joules
        return joules

    def two_edges(self) -> tuple[Edge, Edge]:
        """Block until the counter moved at least three times; two later moves, well timed.

        The first move is let go: it may still show what was spent before the call.
        """
        begun = moved = self.clock.now()
        value, before, after = self.read(), begun, self.clock.now()
        moves, seen = 0, list[Edge]()  # all but the first
        sharp = False
        wake = after
        while True:
            self.clock.sleep_until(max(wake, before + POLL_SECONDS))
            was, was_after = before, after
            before = self.clock.now()
            new = self.read()
            after = self.clock.now()
            if new == value:
                wake = after
                if after - moved > PATIENCE_SECONDS:
                    raise CounterStuckError(self.uuid, value, after - moved)
                continue
            # The value was taken somewhere within a call, so between the two calls' middles
            # at best, and within their outer ends at worst.
            edge = Edge((was + was_after + before + after) / 4, new, (after - was) / 2)
            interval, was_sharp = edge.seconds - moved, sharp
            sharp = edge.half_width_seconds <= SHARP_SECONDS
            value, moved, moves = new, edge.seconds, moves + 1
            if moves > 1:
                seen.append(edge)
            if sharp and was_sharp:
                # Follows a shorter interval at once and a longer one slowly.
                self._shortest = min(interval, 1.1 * (self._shortest or interval))
            elif not sharp and wake > was_after:
                # It moved while slept through: shorter than thought.
                self._shortest = (self._shortest or interval) / 2
            enough = SHARP_SECONDS if after - begun < HURRY_SECONDS else BLUNT_SECONDS
            if len(best := _two_sharpest(seen, enough)) == 2:
                return best[0], best[1]
            if after - begun > PATIENCE_SECONDS:
                raise CounterSlowError(self.uuid, after - begun)
            wake = after if self._shortest is None else moved + ASLEEP_SHARE * self._shortest


def _two_sharpest(edges: Sequence[Edge], within: float) -> list[Edge]:
    """The two best timed of ``edges``, in order of time, fewer if not ``within`` seconds."""
    usable = [e for e in edges if e.half_width_seconds <= within]
    best = sorted(usable, key=lambda e: e.half_width_seconds)[:2]
    return sorted(best, key=lambda e: e.seconds)


def watch_all(watchers: Sequence[EdgeWatcher]) -> list[tuple[Edge, Edge]]:
    """Two edges of each counter.

    Several are watched from a thread each: a call takes 3 ms, and one after the other no
    move of four boards could be timed.
    """
    if len(watchers) == 1:
        return [watchers[0].two_edges()]
    with ThreadPoolExecutor(len(watchers)) as threads:
        return list(threads.map(EdgeWatcher.two_edges, watchers))


@dataclass
class _Board:
    """One GPU of a meter, and what was seen of it before the window under way."""

    gpu: Gpu
    watcher: EdgeWatcher
    index: int
    """Place among the sampler's devices."""
    idle_watts: float | None = None
    """Lowest power seen before any window."""


class CounterMeter:
    """Reads the energy counters of GPUs; see :class:`meter.Meter`.

    ``gpus`` maps a place among the sampler's devices to the GPU there. The sampler supplies
    the independent integral; ``None`` leaves it out, with a reason in each reading.
    """

    def __init__(
        self,
        gpus: Mapping[int, Gpu],
        sampler: PowerSource | None,
        *,
        allow_shared: bool = False,
        release: Callable[[], None] = lambda: None,
        clock: Clock = MONOTONIC,
    ) -> None:
        self._clock, self._sampler, self._allow_shared = clock, sampler, allow_shared
        self._boards = [_Board(g, EdgeWatcher(g, clock), i) for i, g in gpus.items()]
        self._begun: list[tuple[Edge, Edge]] | None = None
        self._release = release
        for gpu in gpus.values():
            refuse_shared(gpu, allow_shared)

    @property
    def description(self) -> str:
        """In words: how energy is obtained, for the first line of every report."""
        info = self._boards[0].gpu.info
        check = "checked by sampled power" if self._sampler else "without an independent check"
        return f"{info.library} energy counter of {describe(self._gpus)}, edge to edge, {check}"

    @property
    def devices(self) -> tuple[Device, ...]:
        """Devices read, for the fingerprint."""
        return tuple(as_device(g) for g in self._gpus)

    def begin(self) -> None:
        """Block until each counter was seen to move three times (0.2 to 0.3 s)."""
        for gpu in self._gpus:
            refuse_shared(gpu, self._allow_shared)
        self._begun = watch_all([b.watcher for b in self._boards])

    def end(self, start: float, end: float) -> Sequence[Reading]:
        """Readings of the window; blocks until each counter moved three times after it."""
        begun, self._begun = self._begun, None
        if begun is None:
            raise WindowError("end() was called without begin()")
        latest = max(t0.seconds for _, t0 in begun)
        check_window(start, end, latest, self._clock.now())
        done = watch_all([b.watcher for b in self._boards])
        for gpu in self._gpus:
            refuse_shared(gpu, self._allow_shared)
        return [
            self._reading(board, evidence.bracket(*before, *after, start, end))
            for board, before, after in zip(self._boards, begun, done, strict=True)
        ]

    def state(self) -> Sequence[DeviceState]:
        """Temperature, clocks and throttle times now, one per device."""
        return [as_state(g) for g in self._gpus]

    def close(self) -> None:
        """Release what was opened for this meter."""
        self._release()

    @property
    def _gpus(self) -> list[Gpu]:
        return [b.gpu for b in self._boards]

    def _reading(self, board: _Board, raw: dict[str, float]) -> Reading:
        info = board.gpu.info
        joules = evidence.bracketed(raw)
        seconds = raw["end_seconds"] - raw["start_seconds"]
        before, _ = evidence.slopes(raw)
        # Only from before: a counter that failed in the window would vouch for itself after it.
        board.idle_watts = min(before, board.idle_watts or before)
        uncertainty = evidence.bracket_uncertainty(raw)
        update = raw["t0_seconds"] - raw["before_seconds"]
        if seconds < update and uncertainty >= abs(joules):
            return _unresolved(info, seconds, uncertainty, raw)
        low, high = 0.3 * board.idle_watts, info.power_limit_watts
        mean = joules / seconds
        if not low <= mean or mean <= 0 or (high and mean > 1.3 * high):
            raise ImplausiblePowerError(info.uuid, mean, low, 1.3 * high if high else None)
        check, disputed, missing = self._check(board, raw, joules)
        doubts = [f"no independent check: {missing}"] if missing else []
        if (widest := max(raw[f"{e}_half_width_seconds"] for e in EDGES)) > SHARP_SECONDS:
            doubts.append(
                f"the host was busy: counter moves are timed to {widest * 1000:.0f} ms only"
            )
        if self._allow_shared:
            doubts += shared_doubts(board.gpu)
        return Reading(
            device=info.uuid,
            scope=info.scope,
            obtained="simulated" if info.simulated else "counter",
            source=f"{info.library} energy counter",
            joules=joules,
            reason="; ".join(doubts) or None,
            uncertainty_joules=uncertainty,
            check_joules=check,
            disputed=disputed,
            evidence=raw,
        )

    def _check(
        self, board: _Board, raw: dict[str, float], joules: float
    ) -> tuple[float | None, bool, str | None]:
        """Integral of sampled power, whether it disputes the counter, and why it is missing.

        Adds what the verdict hangs on to ``raw``.
        """
        field = board.gpu.info.power_field
        if self._sampler is None or field is None:
            return None, False, "power is not sampled on this device"
        t0, t1 = raw["t0_seconds"], raw["t1_seconds"]
        samples = self._sampler.samples(board.index, t0, t1)
        share = evidence.coverage(samples, t0, t1, REACH_SECONDS)
        raw["check_coverage"] = share
        if share < COVERED_SHARE:
            why = f", {self._sampler.problem}" if self._sampler.problem else ""
            return None, False, f"samples cover {share:.0%} of the window{why}"
        check, swing = evidence.held_bracket(
            samples, t0, raw["start_seconds"], raw["end_seconds"], t1
        )
        raw["peak_watts"] = max(s.watts for s in samples)
        hidden = hidden_seconds(board.gpu)
        missed = evidence.sampling_error(samples, raw["start_seconds"], raw["end_seconds"])
        raw["check_tolerance_joules"] = evidence.check_tolerance(joules, swing, hidden, missed)
        return check, abs(joules - check) > raw["check_tolerance_joules"], None


def _unresolved(
    info: GpuInfo, seconds: float, uncertainty: float, raw: dict[str, float]
) -> Reading:
    """The reading of a window too short for its counter: no number, and why."""
    return Reading(
        device=info.uuid,
        scope=info.scope,
        obtained="simulated" if info.simulated else "counter",
        source=f"{info.library} energy counter",
        joules=None,
        reason=f"{seconds:.3f} s is too short for this counter, which resolves "
        f"{uncertainty:.1f} J here; repeat the work until it lasts 2 s",
        evidence=raw,
    )


def hidden_seconds(gpu: Gpu) -> float:
    """How long this GPU's sampled power may hide a step."""
    instant = gpu.info.power_field == "instant"
    return evidence.UPDATE_SECONDS if instant else evidence.TRAILING_SECONDS


def check_window(start: float, end: float, not_before: float, now: float) -> None:
    """Raise ``WindowError`` unless ``not_before <= start < end <= now``."""
    if not end > start:
        raise WindowError(f"a window from {start:.6f} to {end:.6f} s has no length")
    if start < not_before:
        raise WindowError(
            f"the window began at {start:.6f} s, before the meter was ready at {not_before:.6f} s"
        )
    if end > now:
        raise WindowError(f"the window ends at {end:.6f} s, after now, {now:.6f} s")


def refuse_shared(gpu: Gpu, allow_shared: bool) -> None:
    """Raise unless the device's joules are this run's alone, or ``allow_shared``."""
    if allow_shared:
        return
    if gpu.info.mig:
        raise MigError(gpu.info.uuid)
    if others := _other_processes(gpu):
        raise SharedDeviceError(gpu.info.uuid, others)


def shared_doubts(gpu: Gpu) -> list[str]:
    """What a reading of a device that may be shared has to say about it."""
    doubts = ["board shared by MIG slices"] if gpu.info.mig else []
    if others := _other_processes(gpu):
        doubts.append(f"shared with {others}")
    return doubts


def open_checked(gpu: Gpu, wanted: str) -> Gpu:
    """``gpu`` if it is the one that was asked for; raises ``WrongDeviceError``.

    A slice's name opens the board it is cut from.
    """
    if gpu.info.uuid != wanted and not gpu.info.mig:
        raise WrongDeviceError(wanted, gpu.info.uuid)
    return gpu


def describe(gpus: Sequence[Gpu]) -> str:
    """Names and number of GPUs, in words."""
    names = sorted({g.info.name for g in gpus})
    return f"{len(gpus)} x {', '.join(names)}" if len(gpus) > 1 else names[0]


def as_device(gpu: Gpu) -> Device:
    """A GPU for the fingerprint."""
    info = gpu.info
    return Device(
        kind="gpu",
        name=info.name,
        uuid=info.uuid,
        memory_bytes=info.memory_bytes,
        power_limit_watts=info.power_limit_watts,
        mig_profile="shared board" if info.mig else None,
        capability=info.capability,
        driver=info.driver,
    )


def as_state(gpu: Gpu) -> DeviceState:
    """A GPU's state now."""
    return DeviceState(device=gpu.info.uuid, **vars(gpu.conditions()))


def _other_processes(gpu: Gpu) -> str:
    """Compute processes on the GPU that are not of this run, in words; empty if none.

    From inside a container NVML may show process numbers of the host. One of those can be
    this run's own worker, so only a second one proves company.
    """
    shown = set(gpu.process_ids())
    if not shown:
        return ""
    me = psutil.Process()
    own = {me.pid, *(p.pid for p in me.children(recursive=True))}
    visible = {p for p in shown - own if psutil.pid_exists(p)}
    hidden = shown - own - visible
    if shown & own or len(hidden) > 1:
        visible |= hidden
    return ", ".join(f"process {p}" for p in sorted(visible))
