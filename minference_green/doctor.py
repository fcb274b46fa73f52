"""Can this machine measure? Each check looks at one property of the sensors, under a load.

The checks take a GPU, a load on it, a sampler of its power and a clock, and nothing else: real
ones, or a simulated GPU of known truth in virtual time. A counter that is wrong must fail the
check that is there to find it.
"""

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import fmean, median, quantiles, stdev

from minference_green import fingerprint
from minference_green.diagnosis import Check, Diagnosis, Outcome
from minference_green.errors import MeasurementError
from minference_green.load import Load, SimulatedLoad, WorkerLoad
from minference_green.meters.choose import open_meters
from minference_green.meters.clock import MONOTONIC, Clock
from minference_green.meters.counter import (
    BLUNT_SECONDS,
    SHARP_SECONDS,
    CounterMeter,
    as_state,
    open_checked,
    shared_doubts,
)
from minference_green.meters.device import Conditions, Gpu, PowerField
from minference_green.meters.lock import DeviceLock
from minference_green.meters.sampler import PERIOD_SECONDS, PowerSource, Sampler
from minference_green.meters.simulated import (
    SimulatedGpu,
    SimulatedPower,
    VirtualClock,
    load_specs,
)
from minference_green.results import Reading

POLLED_SECONDS = 3.0
STEADY_SECONDS, FULL_STEADY_SECONDS = 10.0, 20.0
PHASES = 8
_MODULATION_SECONDS = 0.137
"""Pulses that are no multiple of any update period known."""
_GOLDEN = 1.618
_PULSED_SECONDS = 1.5
_SETTLE_SECONDS = 1.0
_STEP_SECONDS = 0.65
_WORK_SECONDS = 3.0
_WARM_SECONDS = 3.0

INTEGRAL_LIMITS = (0.01, 0.02)
"""Counter against sampled integral under steady load: OK up to the first, FAIL beyond the
second; so in every pair below."""
IDLE_LIMITS = (0.05, 0.15)
PHASE_LIMITS = (0.15, 0.30)
"""Spread of mean power over the phases; a sensor that looks at a quarter of each period shows
2.0, and pulses made by real launches are themselves equal to a few per cent only."""
INCOMMENSURATE_LIMITS = (0.10, 0.25)
ADDITIVITY_LIMITS = (0.003, 0.01)
REPEATABILITY_LIMITS = (0.003, 0.01)
LATENCY_LIMITS = (0.001, 0.01)
OBSERVER_LIMITS = (0.002, 0.01)
LAG_LIMITS_SECONDS = (0.1, 0.2)
"""A window's end waits for the counter's second move: what lags by more than that is lost."""
PERIOD_LIMITS_SECONDS = (0.15, 0.5)
CALL_LIMITS_SECONDS = (2 * SHARP_SECONDS, 2 * BLUNT_SECONDS)
HOT_CELSIUS = 85.0
DISK_LIMITS_BYTES = (2**30, 50 * 2**20)


@dataclass
class Patient:
    """A GPU under examination."""

    gpu: Gpu
    load: Load
    open_sampler: Callable[[], PowerSource]
    clock: Clock
    period_seconds: float = 0.1
    """Of the counter; the nominal one until it has been measured."""
    last_move: float = 0.0


@dataclass(frozen=True)
class _Read:
    """One window of the counter beside the samples."""

    joules: float
    seconds: float
    check_joules: float | None
    peak_reason: str | None

    @property
    def watts(self) -> float:
        return self.joules / self.seconds

    @property
    def disagreement(self) -> float | None:
        """Of the samples with the counter, relative."""
        return None if self.check_joules is None else self.check_joules / self.joules - 1


def examine(
    patient: Patient, *, full: bool, say: Callable[[str], None] = lambda _: None
) -> Diagnosis:
    """Every check of one GPU; about 70 s, with ``full`` about 4 minutes."""
    gpu = patient.gpu
    info = gpu.info
    checks = [_exclusive(gpu), _limits(gpu)]
    if not info.has_counter:
        checks.append(_no_counter(gpu))
        if info.power_field is not None:
            checks += _guarded("update periods", partial(_power_alone, patient, info.power_field))
    else:
        sampler = patient.open_sampler()
        try:
            for name, check in _counter_checks(full):
                say(name)
                checks += _guarded(name, partial(check, patient, sampler))
        finally:
            patient.load.idle()
            sampler.close()
        if full:
            say("observer effect")
            checks += _guarded("observer effect", partial(_observer, patient))
    return Diagnosis(
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        device=info.uuid,
        name=info.name,
        driver=info.driver,
        full=full,
        checks=tuple(checks),
    )


_Examination = Callable[[Patient, PowerSource], Sequence[Check]]


def _counter_checks(full: bool) -> Iterator[tuple[str, _Examination]]:
    yield "idle", _idle
    yield "update periods", _periods
    yield "counter lag", _lag
    seconds = FULL_STEADY_SECONDS if full else STEADY_SECONDS
    yield "steady load", lambda patient, sampler: _steady(patient, sampler, seconds)
    yield "pulses", _pulses
    if full:
        yield "repeatability", _repeatability


def _guarded(name: str, check: Callable[[], Sequence[Check]]) -> Sequence[Check]:
    """A source that refuses fails the check it refused in."""
    try:
        return check()
    except MeasurementError as error:
        return [Check(name=name, outcome="FAIL", finding=str(error), advice="see the message")]


def _exclusive(gpu: Gpu) -> Check:
    """Nobody else may compute on the device."""
    others = shared_doubts(gpu)
    if others:
        return Check(
            name="exclusive",
            outcome="FAIL",
            finding="; ".join(others),
            advice="wait until the GPU is free, or turn MIG off; then run doctor again",
        )
    used = gpu.conditions().memory_used_bytes
    held = "" if used is None else f"; {used / 2**30:.1f} GiB of its memory in use"
    return Check(
        name="exclusive",
        outcome="OK",
        finding=f"no other compute process is shown (inside a virtual machine none ever is){held}",
    )


def _limits(gpu: Gpu) -> Check:
    """Power limit, clocks, temperature and what the driver counts, now."""
    state = as_state(gpu)
    known = [
        ("limit", state.power_limit_watts, "W"),
        ("SM clock", state.sm_clock_mhz, "MHz"),
        ("memory clock", state.memory_clock_mhz, "MHz"),
        ("GPU", state.temperature_celsius, "C"),
        ("memory", state.memory_temperature_celsius, "C"),
    ]
    finding = ", ".join(f"{name} {value:.0f} {unit}" for name, value, unit in known if value)
    counted = ", ".join(state.throttle_seconds) or "no cause"
    missing = [c for c in ("thermal", "power_brake") if c not in state.throttle_seconds]
    return Check(
        name="state",
        outcome="WARN" if missing or state.power_limit_watts is None else "OK",
        finding=f"driver {gpu.info.driver}; {finding}; slowdown counted by {counted}",
        advice="slowdown cannot be seen by cause here: watch temperatures yourself"
        if missing
        else ("the power limit is not told" if state.power_limit_watts is None else ""),
    )


def _no_counter(gpu: Gpu) -> Check:
    field = gpu.info.power_field
    if field is None:
        return Check(
            name="energy counter",
            outcome="FAIL",
            finding="neither an energy counter nor power is shown",
            advice="measure on the bare device, or only times with --no-energy",
        )
    return Check(
        name="energy counter",
        outcome="WARN",
        finding=f"none; joules come from sampled power ({field})",
        advice="expect a wider uncertainty; windows of 10 s or more help",
    )


def _read(patient: Patient, sampler: PowerSource | None, seconds: float) -> _Read:
    """One window of whatever load is running."""
    meter = _meter(patient, sampler)
    meter.begin()
    start = patient.clock.now()
    patient.clock.sleep(seconds)
    end = patient.clock.now()
    [reading] = meter.end(start, end)
    return _as_read(reading, end - start)


def _meter(patient: Patient, sampler: PowerSource | None) -> CounterMeter:
    # What is shared has been said by its own check.
    return CounterMeter({0: patient.gpu}, sampler, allow_shared=True, clock=patient.clock)


def _as_read(reading: Reading, seconds: float) -> _Read:
    assert reading.joules is not None
    return _Read(reading.joules, seconds, reading.check_joules, reading.reason)


def _idle(patient: Patient, sampler: PowerSource) -> list[Check]:
    """Honesty (e): with nothing running, counter and samples agree."""
    patient.load.idle()
    patient.clock.sleep(_SETTLE_SECONDS)
    read = _read(patient, sampler, 2.0)
    return [_integral("idle", read, IDLE_LIMITS)]


def _integral(name: str, read: _Read, limits: tuple[float, float]) -> Check:
    difference = read.disagreement
    if difference is None:
        return Check(
            name=name,
            outcome="WARN",
            finding=f"{read.watts:.1f} W by the counter; {read.peak_reason}",
            advice="without samples nothing checks the counter: leave the machine to the run",
            figures={"watts": read.watts},
        )
    return Check(
        name=name,
        outcome=_grade(abs(difference), limits),
        finding=f"{read.watts:.1f} W by the counter over {read.seconds:.1f} s, "
        f"sampled power {difference:+.2%}",
        advice=_advice(
            abs(difference),
            limits,
            "counter and sampled power contradict each other: update the driver, and trust "
            "only ratios between arms until they agree",
        ),
        figures={"watts": read.watts, "seconds": read.seconds, "relative_difference": difference},
    )


def _grade(value: float, limits: tuple[float, float]) -> Outcome:
    good, bad = limits
    return "OK" if value <= good else "FAIL" if value > bad else "WARN"


def _advice(value: float, limits: tuple[float, float], text: str) -> str:
    return "" if value <= limits[0] else text


def _periods(patient: Patient, sampler: PowerSource) -> list[Check]:  # noqa: ARG001
    """Poll counter and power under pulses; when they move and how long a call takes."""
    gpu, clock = patient.gpu, patient.clock
    field = gpu.info.power_field
    patient.load.pulsed(_MODULATION_SECONDS, clock.now())
    counter, power = _Polled(), _Polled()
    until = clock.now() + POLLED_SECONDS
    while clock.now() < until:
        counter.poll(gpu.energy_joules, clock)
        if field is not None:
            power.poll(partial(gpu.watts, field), clock)
        clock.sleep(0.001)
    checks = [counter.period("counter period"), counter.calls("counter call")]
    if field is not None:
        checks += _power_checks(power, field)
    if counter.moves:
        patient.period_seconds = counter.median_period or patient.period_seconds
        patient.last_move = counter.moves[-1]
    return checks


def _power_alone(patient: Patient, field: PowerField) -> list[Check]:
    """The same of the power reading alone, on a GPU without a counter."""
    clock, power = patient.clock, _Polled()
    patient.load.pulsed(_MODULATION_SECONDS, clock.now())
    until = clock.now() + POLLED_SECONDS
    while clock.now() < until:
        power.poll(partial(patient.gpu.watts, field), clock)
        clock.sleep(0.001)
    patient.load.idle()
    return _power_checks(power, field)


def _power_checks(power: "_Polled", field: PowerField) -> list[Check]:
    # An update to the same power is not seen: the shortest intervals tell the period.
    return [power.period(f"power period ({field})", may_repeat=True), power.calls("power call")]


class _Polled:
    """What was seen of one source by asking again and again."""

    def __init__(self) -> None:
        self.moves: list[float] = []
        self.call_seconds: list[float] = []
        self._value: float | None = None
        self._at = 0.0

    def poll(self, read: Callable[[], float], clock: Clock) -> None:
        """Ask once; a move is noted halfway between the two calls that frame it."""
        before = clock.now()
        value = read()
        after = clock.now()
        self.call_seconds.append(after - before)
        middle = (before + after) / 2
        if self._value is not None and value != self._value:
            self.moves.append((self._at + middle) / 2)
        self._value, self._at = value, middle

    @property
    def median_period(self) -> float | None:
        return median(self._intervals) if self._intervals else None

    @property
    def _intervals(self) -> list[float]:
        return [b - a for a, b in zip(self.moves, self.moves[1:], strict=False)]

    def period(self, name: str, *, may_repeat: bool = False) -> Check:
        """How often it moves; judged by the shortest intervals if an update ``may_repeat``."""
        intervals = self._intervals
        if len(intervals) < 2:
            return Check(
                name=name,
                outcome="FAIL",
                finding=f"{len(self.moves)} moves in {POLLED_SECONDS:g} s under a changing load",
                advice="it does not follow the load: update the driver, or use --no-energy",
                figures={"moves": float(len(self.moves))},
            )
        cuts = quantiles(intervals, n=20, method="inclusive")
        middle = median(intervals)
        judged = cuts[0] if may_repeat else middle
        return Check(
            name=name,
            outcome=_grade(judged, PERIOD_LIMITS_SECONDS),
            finding=f"median {1000 * middle:.1f} ms, p5 {1000 * cuts[0]:.1f}, "
            f"p95 {1000 * cuts[-1]:.1f}, {len(self.moves)} moves in {POLLED_SECONDS:g} s",
            advice=_advice(judged, PERIOD_LIMITS_SECONDS, "slow updates need longer windows"),
            figures={
                "median_seconds": middle,
                "p5_seconds": cuts[0],
                "p95_seconds": cuts[-1],
                "moves": float(len(self.moves)),
            },
        )

    def calls(self, name: str) -> Check:
        """How long one call takes."""
        middle = median(self.call_seconds)
        slow = quantiles(self.call_seconds, n=100, method="inclusive")[-1]
        return Check(
            name=name,
            outcome=_grade(middle, CALL_LIMITS_SECONDS),
            finding=f"median {1000 * middle:.2f} ms, p99 {1000 * slow:.2f} ms",
            advice=_advice(
                middle,
                CALL_LIMITS_SECONDS,
                "moves cannot be timed well: end other tools that poll this GPU",
            ),
            figures={"median_seconds": middle, "p99_seconds": slow},
        )


def _lag(patient: Patient, sampler: PowerSource) -> list[Check]:  # noqa: ARG001
    """From when on the counter shows a step of the load: where its two slopes cross."""
    lags = [_one_lag(patient) for _ in range(2)]
    lag = min(lags)  # launches and clocks come late, never early
    return [
        Check(
            name="counter lag",
            outcome=_grade(lag, LAG_LIMITS_SECONDS),
            finding=f"{1000 * lag:.0f} ms from the start of a load to its joules, "
            "the load's own rise included",
            advice=_advice(
                lag,
                LAG_LIMITS_SECONDS,
                "joules of a window's end may be counted after it: use windows of 10 s or more",
            ),
            figures={"lag_seconds": lag},
        )
    ]


def _one_lag(patient: Patient) -> float:
    clock = patient.clock
    patient.load.idle()
    clock.sleep(_SETTLE_SECONDS)
    before = _edges(patient, _STEP_SECONDS)
    step = patient.load.steady()
    clock.sleep(0.5)
    after = _edges(patient, _STEP_SECONDS)
    (slope_low, at_low), (slope_high, at_high) = _line(before), _line(after)
    if not slope_high > slope_low:
        raise MeasurementError(
            f"the counter gains {slope_high:.0f} W under load and {slope_low:.0f} W idle, "
            "so it does not follow the load; update the driver, or use --no-energy"
        )
    return (at_low - at_high) / (slope_high - slope_low) - step


def _edges(patient: Patient, seconds: float) -> list[tuple[float, float]]:
    """(moment, joules) of each move of the counter."""
    polled, edges = _Polled(), list[tuple[float, float]]()
    value = 0.0

    def read() -> float:
        nonlocal value
        value = patient.gpu.energy_joules()
        return value

    until = patient.clock.now() + seconds
    while patient.clock.now() < until:
        known = len(polled.moves)
        polled.poll(read, patient.clock)
        if len(polled.moves) > known:
            edges.append((polled.moves[-1], value))
        patient.clock.sleep(0.001)
    if len(edges) < 3:
        raise MeasurementError(
            f"the counter moved {len(edges)} times in {seconds:g} s; it does not measure: "
            "update the driver, or use --no-energy"
        )
    return edges


def _line(edges: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Slope and value at time 0 of the least-squares line."""
    t, c = fmean(e[0] for e in edges), fmean(e[1] for e in edges)
    slope = sum((x - t) * (y - c) for x, y in edges) / sum((x - t) ** 2 for x, _ in edges)
    return slope, c - slope * t


def _steady(patient: Patient, sampler: PowerSource, seconds: float) -> list[Check]:
    """Honesty (a) and (d): the integral under constant load, and ten windows against one."""
    patient.load.steady()
    patient.clock.sleep(_WARM_SECONDS)
    before = patient.gpu.conditions()
    whole = _read(patient, sampler, seconds)
    after = patient.gpu.conditions()
    parts = [_read(patient, sampler, 1.0) for _ in range(10)]
    again = _read(patient, sampler, 2.0)
    # The die may warm meanwhile: the long window and a late one frame the short ones.
    frame = (whole.watts + again.watts) / 2
    sum_watts = sum(p.joules for p in parts) / sum(p.seconds for p in parts)
    difference = sum_watts / frame - 1
    return [
        _integral("steady load", whole, INTEGRAL_LIMITS),
        Check(
            name="windows add up",
            outcome=_grade(abs(difference), ADDITIVITY_LIMITS),
            finding=f"ten 1 s windows against the {whole.seconds:.0f} s window: {difference:+.3%}",
            advice=_advice(
                abs(difference), ADDITIVITY_LIMITS, "short windows are biased: use 5 s or more"
            ),
            figures={"relative_difference": difference},
        ),
        _under_load(whole, before, after),
    ]


def _under_load(read: _Read, before: Conditions, after: Conditions) -> Check:
    """Temperature, clocks and slowdown at full power."""
    gained = {
        cause: after.throttle_seconds[cause] - seconds
        for cause, seconds in before.throttle_seconds.items()
        if cause in after.throttle_seconds
    }
    slowed = [c for c in ("thermal", "power_brake") if gained.get(c, 0.0) > 0]
    # The states are read just outside the stretch: their difference can be longer than it.
    capped = min(1.0, gained.get("power_cap", 0.0) / read.seconds)
    celsius = after.temperature_celsius
    hot = celsius is not None and celsius > HOT_CELSIUS
    limit = f" of {after.power_limit_watts:.0f} W" if after.power_limit_watts else ""
    heat = "" if celsius is None else f", {celsius:.0f} C"
    clock = "" if after.sm_clock_mhz is None else f", SM clock {after.sm_clock_mhz:.0f} MHz"
    finding = f"{read.watts:.0f} W{limit}{heat}{clock}; power cap active {capped:.0%} of the time"
    if slowed:
        finding += f"; {' and '.join(slowed).replace('_', ' ')} slowdown"
    return Check(
        name="state under load",
        outcome="WARN" if slowed or hot else "OK",
        finding=finding,
        advice="improve cooling or power: such windows are invalid" if slowed or hot else "",
        figures={"watts": read.watts, "power_cap_share": capped},
    )


def _pulses(patient: Patient, sampler: PowerSource) -> list[Check]:  # noqa: ARG001
    """Honesty (b) and (c): pulses locked to the counter at eight phases, and pulses that are not.

    A counter that integrates all the time sees the same mean power wherever the pulses lie.
    """
    period = patient.period_seconds
    locked = []
    for phase in range(PHASES):
        patient.load.pulsed(period, patient.last_move + phase / PHASES * period)
        patient.clock.sleep(3 * period)
        locked.append(_read(patient, None, _PULSED_SECONDS).watts)
    patient.load.pulsed(_GOLDEN * period, patient.clock.now())
    patient.clock.sleep(3 * period)
    free = _read(patient, None, _PULSED_SECONDS).watts
    patient.load.idle()
    spread = (max(locked) - min(locked)) / fmean(locked)
    off = abs(free / fmean(locked) - 1)
    return [
        Check(
            name="pulses at the counter's period",
            outcome=_grade(spread, PHASE_LIMITS),
            finding=f"{min(locked):.0f} to {max(locked):.0f} W over {PHASES} phases of "
            f"{1000 * period:.1f} ms pulses, spread {spread:.1%}",
            advice=_advice(
                spread,
                PHASE_LIMITS,
                "the counter looks at part of the time only: joules of periodic work are wrong",
            ),
            figures={"spread": spread, "period_seconds": period},
        ),
        Check(
            name="pulses at another period",
            outcome=_grade(off, INCOMMENSURATE_LIMITS),
            finding=f"{free:.0f} W at {1000 * _GOLDEN * period:.0f} ms, "
            f"{fmean(locked):.0f} W on average at the counter's own period",
            advice=_advice(
                off,
                INCOMMENSURATE_LIMITS,
                "mean power depends on the rhythm of the load: joules of periodic work are wrong",
            ),
            figures={"relative_difference": off},
        ),
    ]


def _repeatability(patient: Patient, sampler: PowerSource) -> list[Check]:  # noqa: ARG001
    """Joules of identical work over ten windows."""
    patient.load.work(_WARM_SECONDS)
    joules = [_work(patient, None).joules for _ in range(10)]
    cov = stdev(joules) / fmean(joules)
    return [
        Check(
            name="repeatability",
            outcome=_grade(cov, REPEATABILITY_LIMITS),
            finding=f"joules of identical work, ten windows: CoV {cov:.2%}",
            advice=_advice(
                cov, REPEATABILITY_LIMITS, "let the machine settle, and leave it to the run"
            ),
            figures={"cov": cov, "mean_joules": fmean(joules)},
        )
    ]


def _work(patient: Patient, sampler: PowerSource | None) -> _Read:
    meter = _meter(patient, sampler)
    meter.begin()
    start, end = patient.load.work(_WORK_SECONDS)
    [reading] = meter.end(start, end)
    return _as_read(reading, end - start)


def _observer(patient: Patient) -> list[Check]:
    """What sampling costs: identical work with and without it, ABBA four times."""
    patient.load.work(_WARM_SECONDS)
    on: list[_Read] = []
    off: list[_Read] = []
    for _ in range(4):
        for sampled in (True, False, False, True):
            sampler = patient.open_sampler() if sampled else None
            try:
                (on if sampled else off).append(_work(patient, sampler))
            finally:
                if sampler is not None:
                    sampler.close()
    seconds = fmean(math.log(r.seconds) for r in on) - fmean(math.log(r.seconds) for r in off)
    joules = fmean(math.log(r.joules) for r in on) - fmean(math.log(r.joules) for r in off)
    worst: Outcome = max(
        _grade(abs(seconds), LATENCY_LIMITS),
        _grade(abs(joules), OBSERVER_LIMITS),
        key=("OK", "WARN", "FAIL").index,
    )
    return [
        Check(
            name="observer effect",
            outcome=worst,
            finding=f"sampling changes time by {seconds:+.3%} and joules by {joules:+.3%}",
            advice="" if worst == "OK" else "free a processor core for the sampler",
            figures={"relative_seconds": seconds, "relative_joules": joules},
        )
    ]


def examine_machine(output: Path) -> Diagnosis:
    """What belongs to the machine and to no GPU: room for runs, libraries, the host's energy."""
    return Diagnosis(
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        device="machine",
        name=fingerprint.cpu_name(),
        driver=None,
        full=False,
        checks=(_disk(output), _libraries(), *_guarded("host energy", _host)),
    )


def _disk(output: Path) -> Check:
    place = next(p for p in (output.resolve(), *output.resolve().parents) if p.exists())
    free = shutil.disk_usage(place).free
    good, bad = DISK_LIMITS_BYTES
    return Check(
        name="free disk",
        outcome="OK" if free >= good else "FAIL" if free < bad else "WARN",
        finding=f"{free / 2**30:.1f} GiB free for {output}",
        advice="" if free >= good else "make room, or choose another place with --output",
        figures={"free_bytes": float(free)},
    )


def _libraries() -> Check:
    versions = fingerprint.software(None)
    absent = [name for name, version in versions.items() if version == "absent"]
    return Check(
        name="libraries",
        outcome="WARN" if absent else "OK",
        finding=", ".join(f"{name} {version}" for name, version in versions.items()),
        advice=f"install {', '.join(absent)}" if absent else "",
    )


def _host() -> list[Check]:
    [meter] = open_meters("auto", gpu_uuids=[])
    try:
        modelled = "modelled" in meter.description
        return [
            Check(
                name="host energy",
                outcome="WARN" if modelled else "OK",
                finding=meter.description,
                advice="the host's joules are an estimate, good within a factor of 2"
                if modelled
                else "",
            )
        ]
    finally:
        meter.close()


@contextmanager
def patients(kind: str, uuids: Sequence[str]) -> Iterator[list[Patient]]:
    """The GPUs to examine: ``simulated:FILE`` in virtual time, or those of NVML by UUID.

    Each real one is locked against other measurements and gets a load process.
    """
    word, _, file = kind.partition(":")
    with ExitStack() as opened:
        if word == "simulated":
            yield _simulated(Path(file))
            return
        found = []
        for uuid in uuids:
            from minference_green.meters.nvml import NvmlGpu

            gpu = open_checked(NvmlGpu(uuid), uuid)
            opened.callback(gpu.close)
            opened.callback(DeviceLock(gpu.info.uuid).close)
            load = WorkerLoad(gpu.info.uuid)
            opened.callback(load.close)
            found.append(Patient(gpu, load, partial(_sampler, uuid), MONOTONIC))
        yield found


def _sampler(uuid: str) -> PowerSource:
    sampler = Sampler(["nvml", uuid])
    sampler.wait_ready()
    return sampler


def _simulated(file: Path) -> list[Patient]:
    clock = VirtualClock(1.0).clock
    return [simulated_patient(SimulatedGpu(spec, clock)) for spec in load_specs(file)]


def simulated_patient(gpu: SimulatedGpu) -> Patient:
    """A simulated GPU, its load being its own trace."""
    load = SimulatedLoad(gpu)
    return Patient(gpu, load, lambda: SimulatedPower([gpu], PERIOD_SECONDS), gpu.clock)
