"""Figures of a run with their intervals: pure functions of its records.

Every figure is taken on logarithms. A block (one process start) is the unit of replication:
the windows of a block are averaged to one number, and Student's t over the blocks gives the
interval. Percentile and BCa bootstraps cover 75 to 83 % instead of 90 % at 5 to 10 blocks.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from minference_green.errors import MeasurementError, UsageError
from minference_green.grams import embodied_grams, operational_grams
from minference_green.results import Observation, Run, Setup, Skip, Window
from minference_green.workload import format_length

SHOWN_LEVEL = 0.90
"""Two-sided level of every interval that is shown; decisions use their own (verdict.py)."""

Quantity = Literal["joules", "seconds"]


@dataclass(frozen=True)
class Estimate:
    """A figure with its interval; null where it cannot be given, and ``reason`` says why."""

    value: float | None
    low: float | None
    high: float | None
    blocks: int
    reason: str | None = None
    """Why the figure or its interval is null, or what limits it."""


@dataclass(frozen=True)
class Cell:
    """One arm at one context length; energy, time and grams are per million tokens."""

    context_length: int
    method: str
    is_reference: bool
    joules_per_mtok: Estimate
    seconds_per_mtok: Estimate
    operational_g_per_mtok: Estimate
    sci_g_per_mtok: Estimate
    """Operational plus embodied grams (ISO/IEC 21031)."""
    ttft_seconds: Estimate
    """Seconds per prefill of the whole batch."""
    joules_per_prompt: Estimate
    windows_used: int
    windows_invalid: int
    obtained: str
    """How the joules were obtained; ``none`` without any."""


@dataclass(frozen=True)
class Comparison:
    """One arm against the run's reference arm at one context length, paired by block."""

    context_length: int
    method: str
    reference: str
    energy_saving: Estimate
    """``1 - candidate / reference`` in joules per token; below zero it costs more."""
    time_saving: Estimate
    speedup: Estimate
    """``reference / candidate`` in seconds per token."""


@dataclass(frozen=True)
class BreakEven:
    """The context length from which a method saves, with its interval."""

    method: str
    quantity: Quantity
    tokens: float | None
    low: float | None
    """Below it the method costs more; null when the measured lengths do not show such a one."""
    high: float | None
    """Above it the method saves; null when the measured lengths do not show such a one."""
    reason: str | None = None


@dataclass(frozen=True)
class LogMean:
    """A mean of logarithms, its standard error and degrees of freedom."""

    mean: float
    standard_error: float
    dof: float

    def interval(self, level: float) -> tuple[float, float]:
        """Two-sided Student t interval at ``level``."""
        half = student_quantile((1 + level) / 2, self.dof) * self.standard_error
        return self.mean - half, self.mean + half


def student_quantile(probability: float, dof: float) -> float:
    """Quantile of Student's t distribution."""
    from scipy.special import stdtrit  # half a second that a run without blocks need not pay

    return float(stdtrit(dof, probability))


def log_mean(logs: Sequence[float]) -> LogMean:
    """Mean of one value per block; raises ``ValueError`` below two values."""
    if len(logs) < 2:
        raise ValueError(f"a spread needs two blocks or more, got {len(logs)}")
    return LogMean(fmean(logs), stdev(logs) / math.sqrt(len(logs)), len(logs) - 1)


def welch(now: Sequence[float], then: Sequence[float]) -> LogMean:
    """``mean(now) - mean(then)`` with unequal spreads (Welch 1947, Satterthwaite's dof)."""
    a, b = log_mean(now), log_mean(then)
    variances = a.standard_error**2, b.standard_error**2
    weights = variances[0] ** 2 / a.dof + variances[1] ** 2 / b.dof
    # Without any spread every number of degrees of freedom gives the same, empty interval.
    dof = sum(variances) ** 2 / weights if weights > 0 else a.dof + b.dof
    return LogMean(a.mean - b.mean, math.sqrt(sum(variances)), dof)


def prediction(now: Sequence[float], stored_means: Sequence[float]) -> LogMean:
    """``mean(now)`` against where the means of stored runs say that a new one falls.

    The new run varies as the stored ones do between each other, and by no less than its own
    blocks say: with fewer blocks than they had, it is noisier than they were.
    """
    new, stored = log_mean(now), log_mean(stored_means)
    between, own = stdev(stored_means) ** 2, new.standard_error**2
    variance = max(between, own) + stored.standard_error**2
    dof = stored.dof if between >= own else min(new.dof, stored.dof)
    return LogMean(new.mean - stored.mean, math.sqrt(variance), dof)


def current_windows(run: Run) -> tuple[Window, ...]:
    """Windows of each block's last start.

    A block cut off and started again on ``--resume`` is measured anew: windows of two
    process starts are not one block. Each start writes a ``Setup`` before its windows.
    """
    windows: dict[int, list[Window]] = {}
    for event in run.events:
        if isinstance(event, Setup):
            windows[event.block] = []
        elif isinstance(event, Window):
            windows.setdefault(event.block, []).append(event)
    return tuple(w for block in windows.values() for w in block)


def invalid_share(run: Run) -> float:
    """Share of windows that are invalid, 0 for a run without any."""
    windows = current_windows(run)
    return sum(not w.valid for w in windows) / len(windows) if windows else 0.0


def method_names(run: Run) -> tuple[str, ...]:
    """Methods of a run in the order asked for; the first is the reference."""
    return tuple(m.name for m in run.header.methods)


def cells(run: Run) -> tuple[Cell, ...]:
    """Every (context length, method) of the run, also those that were not measured."""
    names = method_names(run)
    return tuple(
        _cell(run, length, name, is_reference=name == names[0])
        for length in run.header.workload.context_lengths
        for name in names
    )


def _cell(run: Run, length: int, method: str, *, is_reference: bool) -> Cell:
    terms, batch = run.header.carbon, run.header.workload.batch
    windows = _windows(run, length, method)
    valid = [w for w in windows if w.valid]
    absent = _absence(run, length, method)

    def over(value: Callable[[Window], float | None]) -> Estimate:
        return _estimate(valid, value, absent)

    joules_per_mtok = over(_joules_per_mtok)
    g_per_joule = operational_grams(1.0, terms)

    def sci(window: Window) -> float | None:
        joules = _joules_per_mtok(window)
        if joules is None:
            return None
        return operational_grams(joules, terms) + embodied_grams(_seconds_per_mtok(window), terms)

    no_grams = g_per_joule == 0 and embodied_grams(1.0, terms) == 0
    return Cell(
        context_length=length,
        method=method,
        is_reference=is_reference,
        joules_per_mtok=joules_per_mtok,
        seconds_per_mtok=over(_seconds_per_mtok),
        operational_g_per_mtok=_transformed(joules_per_mtok, lambda j: j * g_per_joule),
        sci_g_per_mtok=_transformed(joules_per_mtok, lambda _: 0.0) if no_grams else over(sci),
        ttft_seconds=over(lambda w: w.seconds / w.repeats),
        joules_per_prompt=over(
            lambda w: None if w.joules is None else w.joules / (w.repeats * batch)
        ),
        windows_used=len(valid),
        windows_invalid=len(windows) - len(valid),
        obtained="+".join(sorted({w.obtained for w in valid if w.joules is not None})) or "none",
    )


def comparisons(run: Run) -> tuple[Comparison, ...]:
    """Every method but the first against the first, at every context length."""
    reference, *others = method_names(run)
    return tuple(
        _comparison(run, length, method, reference)
        for length in run.header.workload.context_lengths
        for method in others
    )


def _comparison(run: Run, length: int, method: str, reference: str) -> Comparison:
    energy = _ratio(run, length, method, reference, "joules")
    seconds = _ratio(run, length, method, reference, "seconds")
    return Comparison(
        context_length=length,
        method=method,
        reference=reference,
        energy_saving=_transformed(energy, lambda ratio: 1 - ratio),
        time_saving=_transformed(seconds, lambda ratio: 1 - ratio),
        speedup=_transformed(seconds, lambda ratio: 1 / ratio),
    )


def _ratio(run: Run, length: int, method: str, reference: str, quantity: Quantity) -> Estimate:
    """Candidate over reference per token."""
    pairs = paired_logs(run, length, method, reference, quantity)
    if pairs:
        return _from_logs([candidate - base for candidate, base in pairs.values()])
    for name in (reference, method):
        if not block_logs(run, length, name, quantity):
            valid = [w for w in _windows(run, length, name) if w.valid]
            why = _no_joules(valid) if valid else _absence(run, length, name)
            return Estimate(None, None, None, 0, f"{name}: {why}")
    return Estimate(None, None, None, 0, f"no block measured both {method} and {reference}")


def block_logs(run: Run, length: int, method: str, quantity: Quantity) -> dict[int, float]:
    """Mean over each block's valid windows of ln(joules or seconds per million tokens)."""
    value = _joules_per_mtok if quantity == "joules" else _seconds_per_mtok
    return _block_logs([w for w in _windows(run, length, method) if w.valid], value)


def paired_logs(
    run: Run, length: int, method: str, reference: str, quantity: Quantity
) -> dict[int, tuple[float, float]]:
    """As :func:`block_logs`, (method, reference) of the blocks that measured both."""
    candidate = block_logs(run, length, method, quantity)
    base = block_logs(run, length, reference, quantity)
    return {b: (candidate[b], base[b]) for b in sorted(candidate.keys() & base.keys())}


def break_even(run: Run, method: str, quantity: Quantity = "joules") -> BreakEven:
    """The context length from which ``method`` needs less than the reference.

    Between measured lengths the log ratio is taken as linear in the logarithm of the length.
    The interval holds every length at which the 90 % interval of the ratio, by Student's t
    over the blocks that measured all lengths, includes no difference (Fieller's argument).

    Raises ``UsageError`` if the run has no such method beside its reference.
    """
    reference, *others = method_names(run)
    if method not in others:
        raise UsageError(f"{method!r} is not compared in this run; it has {others}")
    by_length = {
        length: {b: c - r for b, (c, r) in pairs.items()}
        for length in sorted(run.header.workload.context_lengths)
        if (pairs := paired_logs(run, length, method, reference, quantity))
    }

    def without(reason: str) -> BreakEven:
        return BreakEven(method, quantity, None, None, None, reason)

    if len(by_length) < 2:
        return without(f"{len(by_length)} context length(s) compared; it takes two")
    shared = sorted(set.intersection(*({*logs} for logs in by_length.values())))
    if len(shared) < 2:
        return without(f"{len(shared)} block(s) measured every length; an interval takes two")
    lengths = np.array(list(by_length), dtype=float)
    ratios = np.array([[logs[b] for b in shared] for logs in by_length.values()])
    return _crossing(method, quantity, lengths, ratios)


def _crossing(
    method: str, quantity: Quantity, lengths: NDArray[np.float64], ratios: NDArray[np.float64]
) -> BreakEven:
    """Break-even from log ratios ``[lengths, blocks]``."""
    # A step of the grid is at most 0.6 % in length, finer than any interval in practice.
    steps = 1 + math.ceil(math.log(lengths[-1] / lengths[0]) / 0.005)
    grid = np.union1d(np.geomspace(lengths[0], lengths[-1], steps)[1:-1], lengths)
    at = np.array([np.interp(np.log(grid), np.log(lengths), column) for column in ratios.T])
    mean = at.mean(axis=0)
    half = student_quantile((1 + SHOWN_LEVEL) / 2, len(at) - 1) * at.std(axis=0, ddof=1)
    half /= math.sqrt(len(at))

    def first_of_last_stretch(holds: NDArray[np.bool_]) -> float | None:
        """Where the stretch that lasts to the longest length begins."""
        if not holds[-1]:
            return None
        failing = np.flatnonzero(~holds)
        return float(grid[failing[-1] + 1]) if failing.size else float(grid[0])

    def last_of_first_stretch(holds: NDArray[np.bool_]) -> float | None:
        """Where the stretch that starts at the shortest length ends."""
        if not holds[0]:
            return None
        failing = np.flatnonzero(~holds)
        return float(grid[failing[0] - 1]) if failing.size else float(grid[-1])

    low, high = last_of_first_stretch(mean - half > 0), first_of_last_stretch(mean + half < 0)
    shortest, longest = (format_length(int(n)) for n in (lengths[0], lengths[-1]))
    if (mean < 0).all():
        reason = f"less than the reference at every length from {shortest} on"
        return BreakEven(method, quantity, None, low, high, reason)
    if mean[-1] >= 0:
        reason = f"not less than the reference at {longest}, the longest length compared"
        return BreakEven(method, quantity, None, low, high, reason)
    return BreakEven(method, quantity, first_of_last_stretch(mean < 0), low, high)


def blocks_needed(
    gap: float,
    spread: float,
    level: float,
    *,
    power: float = 0.90,
    other_error: float = 0.0,
    at_most: int = 1000,
) -> int | None:
    """Blocks at which a true log difference ``gap`` from the margin is decided with ``power``.

    ``spread`` is the standard deviation between blocks, ``level`` the two-sided level of the
    deciding interval, ``other_error`` the standard error of what it is compared with, which
    more blocks do not lower. ``None`` if ``at_most`` blocks are not enough.
    """

    def decides(blocks: int) -> bool:
        error = math.hypot(spread / math.sqrt(blocks), other_error)
        dof = blocks - 1
        needed = student_quantile((1 + level) / 2, dof) + student_quantile(power, dof)
        return needed * error <= abs(gap)

    sizes = range(2, at_most + 1)
    found = bisect_left(sizes, True, key=decides)
    return sizes[found] if found < len(sizes) else None


def detectable_margin(spread: float, blocks: int, stored_blocks: int, level: float) -> float:
    """Smallest margin at which no change at all is shown to be within it with 90 % power.

    ``spread`` is the standard deviation between blocks of log ratios, ``level`` the two-sided
    level of the deciding interval. Raises ``ValueError`` below two blocks on either side.
    """
    if min(blocks, stored_blocks) < 2:
        raise ValueError(f"a spread needs two blocks or more, got {blocks} and {stored_blocks}")
    error = spread * math.sqrt(1 / blocks + 1 / stored_blocks)
    dof = blocks + stored_blocks - 2
    quantiles = student_quantile((1 + level) / 2, dof) + student_quantile(0.90, dof)
    return math.expm1(quantiles * error)


def observations(run: Run, length: int, method: str) -> tuple[Observation, ...]:
    """What was observed of one arm at one length, in file order."""
    return tuple(
        o for o in run.of(Observation) if o.context_length == length and o.method == method
    )


def density(run: Run, length: int, method: str) -> Estimate:
    """Computed over causal pairs, mean over the observations; without an interval."""
    seen = observations(run, length, method)
    values = [o.density for o in seen if o.density is not None]
    if values:
        return Estimate(fmean(values), None, None, len(values))
    reasons = [o.density_reason for o in seen if o.density_reason]
    return Estimate(None, None, None, 0, reasons[0] if reasons else "not observed in this run")


def output_error(run: Run, length: int, method: str) -> Estimate:
    """Relative error of the last logits against the reference arm, mean over observations."""
    seen = observations(run, length, method)
    values = [o.logits_relative_error for o in seen if o.logits_relative_error is not None]
    if values:
        return Estimate(fmean(values), None, None, len(values))
    return Estimate(None, None, None, 0, "not observed in this run")


def peak_memory_bytes(run: Run, length: int, method: str) -> Estimate:
    """Most device memory allocated in any valid window."""
    peaks = [
        w.peak_memory_bytes
        for w in _windows(run, length, method)
        if w.valid and w.peak_memory_bytes is not None
    ]
    if peaks:
        return Estimate(float(max(peaks)), None, None, len(peaks))
    return Estimate(None, None, None, 0, "no window recorded device memory (a CPU has none)")


def _windows(run: Run, length: int, method: str) -> list[Window]:
    return [w for w in current_windows(run) if w.context_length == length and w.method == method]


def _joules_per_mtok(window: Window) -> float | None:
    return None if window.joules is None else 1e6 * window.joules / window.tokens


def _seconds_per_mtok(window: Window) -> float:
    return 1e6 * window.seconds / window.tokens


def _block_logs(
    windows: Sequence[Window], value: Callable[[Window], float | None]
) -> dict[int, float]:
    logs: dict[int, list[float]] = {}
    for window in windows:
        figure = value(window)
        if figure is None:
            continue
        if not figure > 0 or math.isinf(figure):
            raise MeasurementError(
                f"block {window.block}, {window.method} at "
                f"{format_length(window.context_length)}: a valid window with {window.joules} J, "
                f"{window.seconds} s and {window.tokens} tokens; "
                "mark it invalid, or measure it again"
            )
        logs.setdefault(window.block, []).append(math.log(figure))
    return {block: fmean(values) for block, values in logs.items()}


def _estimate(
    valid: Sequence[Window], value: Callable[[Window], float | None], absent: str
) -> Estimate:
    if not valid:
        return Estimate(None, None, None, 0, absent)
    logs = _block_logs(valid, value)
    if not logs:
        return Estimate(None, None, None, 0, _no_joules(valid))
    estimate = _from_logs(list(logs.values()))
    without = sum(value(w) is None for w in valid)
    if not without:
        return estimate
    limits = [f"{without} of {len(valid)} windows without joules: {_no_joules(valid)}"]
    if estimate.reason:
        limits.append(estimate.reason)
    return Estimate(estimate.value, estimate.low, estimate.high, estimate.blocks, "; ".join(limits))


def _from_logs(logs: Sequence[float]) -> Estimate:
    value = math.exp(fmean(logs))
    if len(logs) < 2:
        return Estimate(value, None, None, len(logs), "one block, and an interval takes two")
    low, high = log_mean(logs).interval(SHOWN_LEVEL)
    return Estimate(value, math.exp(low), math.exp(high), len(logs))


def _transformed(estimate: Estimate, f: Callable[[float], float]) -> Estimate:
    """The estimate of a monotonic function of a figure; ``f`` may be a falling one."""
    if estimate.value is None:
        return estimate
    ends: tuple[float | None, float | None] = (None, None)
    if estimate.low is not None and estimate.high is not None:
        a, b = f(estimate.low), f(estimate.high)
        ends = (min(a, b), max(a, b))
    return Estimate(f(estimate.value), *ends, estimate.blocks, estimate.reason)


def _no_joules(windows: Sequence[Window]) -> str:
    reasons = [
        r.reason
        for w in windows
        for r in w.readings
        if r.headline and r.joules is None and r.reason
    ]
    return reasons[0] if reasons else "no energy reading"


def _absence(run: Run, length: int, method: str) -> str:
    """Why a cell has no valid window."""
    skips = [s.reason for s in run.of(Skip) if s.context_length == length and s.method == method]
    if skips:
        return f"skipped: {skips[0]}"
    invalid = [w for w in _windows(run, length, method) if not w.valid]
    if not invalid:
        return "not measured yet" if not run.complete else "not measured"
    why: Mapping[str, None] = dict.fromkeys(r for w in invalid for r in w.reasons)
    return f"all {len(invalid)} windows invalid: " + ("; ".join(why) or "no reason on file")
