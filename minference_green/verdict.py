"""The gate: whether a run is worse than stored runs by more than a margin.

The reference arm is the concurrent control. What is judged is the log ratio candidate over
reference now, against the same ratio in the stored runs, so that whatever hits both arms
(machine, temperature, driver) cancels. Up to three looks at a growing run share one error
rate; a verdict may be INCONCLUSIVE.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from statistics import fmean, stdev
from typing import Literal, get_args

from minference_green.comparable import HARD_KEYS, Differences, differences
from minference_green.errors import ExitCode, MeasurementError, NotComparableError, UsageError
from minference_green.results import Run
from minference_green.stats import (
    SHOWN_LEVEL,
    Estimate,
    LogMean,
    Quantity,
    blocks_needed,
    density,
    invalid_share,
    method_names,
    paired_logs,
    prediction,
    welch,
)
from minference_green.validity import MAX_INVALID_SHARE
from minference_green.workload import format_length

LOOKS = (6, 10, 16)
"""Blocks at which a verdict is sought; a run that stays inconclusive grows to the next."""

ALPHA = 0.05
"""Highest rate of wrong verdicts at the margin, over all looks, on either side."""

MIN_BLOCKS = 4
"""Fewer blocks decide nothing."""

PREDICTION_RUNS = 5
"""From this many stored runs on, their scatter says what a new run looks like."""

OWN_SHARE = 1 / 3
"""A FAIL needs at least this share of the ratio's rise to be a rise of the candidate's own figure.

Otherwise the reference got cheaper. By simulation with 2 % between runs, a reference that got
10 % cheaper is blamed on the candidate in 53, 10 and 3 % of cases at a share of 0, 1/3 and 1/2,
and a true +10 % is taken for the reference's doing in 0.1, 1 and 4 %.
"""


class Outcome(StrEnum):
    """What a comparison shows."""

    PASS = "pass"  # noqa: S105 - not a password
    FAIL = "fail"
    INCONCLUSIVE = "inconclusive"


@dataclass(frozen=True)
class Arms:
    """Block means of ln(per token) of one run: both arms, same blocks in the same order."""

    candidate: tuple[float, ...]
    reference: tuple[float, ...]

    @property
    def ratio(self) -> tuple[float, ...]:
        """ln(candidate / reference) per block."""
        return tuple(c - r for c, r in zip(self.candidate, self.reference, strict=True))


Reason = Literal[
    "within-margin", "worse", "margin-in-interval", "both-moved", "reference-moved", "few-blocks"
]
"""What an outcome rests on; ``render/verdict.py`` says it in words."""


@dataclass(frozen=True)
class Ruling:
    """The outcome for one set of arms; changes are of logs, now minus then."""

    outcome: Outcome
    reason: Reason
    improved: bool = False
    ratio: LogMean | None = None
    candidate: LogMean | None = None
    reference: LogMean | None = None
    blocks_for_verdict: int | None = None
    """Blocks that would decide with 90 % power were the change what it appears to be."""


@dataclass(frozen=True)
class Criterion:
    """One (context length, method, quantity) of a comparison; changes are fractions."""

    context_length: int
    method: str
    reference_method: str
    quantity: Quantity
    kind: Literal["ratio", "absolute"]
    """Against the reference arm, or the method's own figure."""
    judged: bool
    """False: shown beside the verdict and no part of it."""
    outcome: Outcome
    reason: Reason
    improved: bool
    change: Estimate
    """Now over then, minus 1, with its 90 % interval."""
    decision_low: float | None
    decision_high: float | None
    """Ends of the interval that decides whether this is a PASS."""
    candidate_change: float | None
    reference_change: float | None
    """How far each arm's own figure moved."""
    density_then: float | None
    density_now: float | None
    blocks_for_verdict: int | None


@dataclass(frozen=True)
class Verdict:
    """The outcome of a comparison, with everything it rests on."""

    outcome: Outcome
    improved: bool
    margin: float
    criteria: tuple[Criterion, ...]
    differences: Differences
    allowed: tuple[str, ...]
    """Hard keys that differ and were allowed to; they stand on every report of the verdict."""
    blocks: int
    """Of the run judged, in the criterion that has fewest."""
    stored_runs: int
    next_look: int | None
    """Blocks at the next look while the run may grow; null after the last."""

    @property
    def exit_code(self) -> ExitCode:
        """0 pass or improved, 1 proven regression, 3 inconclusive."""
        match self.outcome:
            case Outcome.PASS:
                return ExitCode.PASS
            case Outcome.FAIL:
                return ExitCode.REGRESSION
            case Outcome.INCONCLUSIVE:
                return ExitCode.INCONCLUSIVE


def decision_level(criteria: int = 1) -> float:
    """Two-sided level of the interval that decides at one look, for one of ``criteria``."""
    return 1 - 2 * ALPHA / (len(LOOKS) * criteria)


def next_look(blocks: int) -> int | None:
    """The number of blocks at which to look next, ``None`` after the last look."""
    return next((look for look in LOOKS if look > blocks), None)


def compare(
    reference: Run | Sequence[Run],
    candidate: Run,
    *,
    margin: float = 0.05,
    quantities: Sequence[Quantity] = ("joules",),
    allow_mismatch: Sequence[str] = (),
) -> Verdict:
    """Judge ``candidate`` against one or more stored runs of the same workload.

    Every method both have beside the reference method is a criterion at every context length
    and for every one of ``quantities``. The method's own figure is judged too from five stored
    runs on, and shown before. A figure that is in neither run cannot be judged: INCONCLUSIVE.

    Raises ``UsageError`` for a margin outside (0, 1), an unknown hard key or nothing to judge;
    ``NotComparableError`` where hard keys differ and are not in ``allow_mismatch``;
    ``MeasurementError`` where more than 20 % of a run's windows are invalid.
    """
    stored = (reference,) if isinstance(reference, Run) else tuple(reference)
    _check_request(stored, margin, quantities, allow_mismatch)
    found = [differences(run, candidate) for run in stored]
    allowed = _check_hard(found, allow_mismatch)
    for run in (*stored, candidate):
        _check_valid(run)
    cells = _judged_cells(stored, candidate, quantities)
    absolute = len(stored) >= PREDICTION_RUNS and not allowed
    count = len(cells) * (2 if absolute else 1)
    criteria = tuple(
        criterion
        for cell in cells
        for criterion in _criteria(stored, candidate, cell, margin, count, absolute)
    )
    judged = [c for c in criteria if c.judged]
    blocks = min(c.change.blocks for c in judged)
    outcomes = {c.outcome for c in judged}
    outcome = next((o for o in (Outcome.FAIL, Outcome.INCONCLUSIVE) if o in outcomes), Outcome.PASS)
    return Verdict(
        outcome=outcome,
        improved=outcome is Outcome.PASS and any(c.improved for c in judged),
        margin=margin,
        criteria=criteria,
        differences=found[-1],
        allowed=allowed,
        blocks=blocks,
        stored_runs=len(stored),
        next_look=next_look(blocks),
    )


def rule(now: Arms, stored: Sequence[Arms], *, margin: float, criteria: int = 1) -> Ruling:
    """Judge one run's arms against those of one or more stored runs.

    PASS if the upper end of the ratio's decision interval is below ``ln(1 + margin)``, FAIL
    if the lower end is not; a FAIL shares its error rate with the other ``criteria``.
    INCONCLUSIVE also when both arms moved beyond the margin (``both-moved``) and when a worse
    ratio is the reference's doing (``reference-moved``).
    """
    if min(len(now.ratio), sum(len(s.ratio) for s in stored)) < MIN_BLOCKS:
        return Ruling(Outcome.INCONCLUSIVE, "few-blocks")
    ratio = _change(now.ratio, [s.ratio for s in stored])
    candidate = _change(now.candidate, [s.candidate for s in stored])
    reference = _change(now.reference, [s.reference for s in stored])
    limit = math.log1p(margin)
    outcome, reason = _decide(ratio, limit, criteria)
    needed: int | None = None
    if all(_moved(arm, limit) for arm in (candidate, reference)):
        outcome, reason = Outcome.INCONCLUSIVE, "both-moved"
    elif outcome is Outcome.FAIL and candidate.mean < OWN_SHARE * ratio.mean:
        outcome, reason = Outcome.INCONCLUSIVE, "reference-moved"
    elif outcome is Outcome.INCONCLUSIVE:
        needed = _blocks_for_verdict(ratio, stdev(now.ratio), len(now.ratio), limit, criteria)
    improved = (
        outcome is Outcome.PASS
        and ratio.interval(decision_level())[1] < 0
        and candidate.mean < 0  # a ratio that fell because the reference rose is no merit
    )
    return Ruling(outcome, reason, improved, ratio, candidate, reference, needed)


def _change(now: Sequence[float], stored: Sequence[Sequence[float]]) -> LogMean:
    if len(stored) >= PREDICTION_RUNS:
        return prediction(now, [fmean(s) for s in stored])
    return welch(now, [value for s in stored for value in s])


def _decide(change: LogMean, limit: float, criteria: int) -> tuple[Outcome, Reason]:
    if change.interval(decision_level())[1] < limit:
        return Outcome.PASS, "within-margin"
    if change.interval(decision_level(criteria))[0] >= limit:
        return Outcome.FAIL, "worse"
    return Outcome.INCONCLUSIVE, "margin-in-interval"


def _moved(arm: LogMean, limit: float) -> bool:
    """Whether an arm's own figure is shown to be beyond the margin, on either side."""
    low, high = arm.interval(decision_level())
    return low > limit or high < -limit


def _blocks_for_verdict(
    change: LogMean, spread: float, blocks: int, limit: float, criteria: int
) -> int | None:
    own_variance = spread**2 / blocks
    gap = change.mean - limit
    return blocks_needed(
        gap,
        spread,
        decision_level(criteria if gap > 0 else 1),
        other_error=math.sqrt(max(change.standard_error**2 - own_variance, 0.0)),
    )


def _check_request(
    stored: Sequence[Run],
    margin: float,
    quantities: Sequence[Quantity],
    allow_mismatch: Sequence[str],
) -> None:
    if not stored:
        raise UsageError("there is no stored run to compare with; give one or more")
    if not 0 < margin < 1:
        raise UsageError(f"a margin of {margin:g} is not a fraction; 0.05 means 5 %")
    unknown_quantities = [q for q in quantities if q not in get_args(Quantity)]
    if unknown_quantities or not quantities:
        raise UsageError(f"cannot judge {list(quantities)}; choose from {list(get_args(Quantity))}")
    unknown = [key for key in allow_mismatch if key not in HARD_KEYS]
    if unknown:
        raise UsageError(f"{', '.join(unknown)}: no such hard key; they are {', '.join(HARD_KEYS)}")


def _check_hard(found: Sequence[Differences], allow_mismatch: Sequence[str]) -> tuple[str, ...]:
    """Hard keys that differ and may; raises for one that may not."""
    hard = {d.key: d for one in found for d in one.hard}
    refused = [d for key, d in hard.items() if key not in allow_mismatch]
    if refused:
        raise NotComparableError(
            "the runs cannot be compared, for they differ in "
            + "; ".join(str(d) for d in refused)
            + ". Measure on the same ground, or allow it with "
            + " ".join(f"--allow-mismatch {d.key}" for d in refused)
        )
    return tuple(hard)


def _check_valid(run: Run) -> None:
    share = invalid_share(run)
    if share > MAX_INVALID_SHARE:
        reasons = dict.fromkeys(r for w in run.windows if not w.valid for r in w.reasons)
        raise MeasurementError(
            f"{share:.0%} of the windows of run {run.header.run_id} are invalid, at most "
            f"{MAX_INVALID_SHARE:.0%} may be: {'; '.join(reasons) or 'no reason on file'}"
        )


_CellKey = tuple[int, str, Quantity]


def _judged_cells(
    stored: Sequence[Run], candidate: Run, quantities: Sequence[Quantity]
) -> list[_CellKey]:
    shared = set.intersection(*({*method_names(run)[1:]} for run in stored))
    methods = [m for m in method_names(candidate)[1:] if m in shared]
    lengths_shared = set.intersection(*({*r.header.workload.context_lengths} for r in stored))
    lengths = [n for n in candidate.header.workload.context_lengths if n in lengths_shared]
    if not methods or not lengths:
        raise UsageError(
            "the runs share no method beside their reference at a common context length; "
            f"this one has {', '.join(method_names(candidate))} at "
            f"{', '.join(format_length(n) for n in candidate.header.workload.context_lengths)}"
        )
    return [(n, m, q) for n in lengths for m in methods for q in quantities]


def _criteria(
    stored: Sequence[Run],
    candidate: Run,
    cell: _CellKey,
    margin: float,
    count: int,
    absolute: bool,
) -> tuple[Criterion, Criterion]:
    """The ratio, which is judged, and the method's own figure, judged if ``absolute``."""
    length, method, quantity = cell
    now = _arms(candidate, cell)
    ruling = rule(now, [_arms(run, cell) for run in stored], margin=margin, criteria=count)
    own = _own_ruling(ruling, margin, count)

    def criterion(kind: Literal["ratio", "absolute"], ruled: Ruling, judged: bool) -> Criterion:
        change = ruled.ratio if kind == "ratio" else ruled.candidate
        low, high = (None, None) if change is None else change.interval(decision_level())
        return Criterion(
            context_length=length,
            method=method,
            reference_method=method_names(candidate)[0],
            quantity=quantity,
            kind=kind,
            judged=judged,
            outcome=ruled.outcome,
            reason=ruled.reason,
            improved=ruled.improved,
            change=_shown(change, len(now.ratio)),
            decision_low=_fraction(low),
            decision_high=_fraction(high),
            candidate_change=_fraction(ruling.candidate.mean if ruling.candidate else None),
            reference_change=_fraction(ruling.reference.mean if ruling.reference else None),
            density_then=density(stored[-1], length, method).value,
            density_now=density(candidate, length, method).value,
            blocks_for_verdict=ruled.blocks_for_verdict,
        )

    return criterion("ratio", ruling, judged=True), criterion("absolute", own, judged=absolute)


def _own_ruling(ruling: Ruling, margin: float, criteria: int) -> Ruling:
    """The ruling on the candidate's own figure; both arms moving leaves it open as well."""
    if ruling.candidate is None or ruling.reason == "both-moved":
        return replace(ruling, improved=False)
    outcome, reason = _decide(ruling.candidate, math.log1p(margin), criteria)
    improved = outcome is Outcome.PASS and ruling.candidate.interval(decision_level())[1] < 0
    return replace(
        ruling, outcome=outcome, reason=reason, improved=improved, blocks_for_verdict=None
    )


def _arms(run: Run, cell: _CellKey) -> Arms:
    length, method, quantity = cell
    pairs = paired_logs(run, length, method, method_names(run)[0], quantity).values()
    return Arms(tuple(c for c, _ in pairs), tuple(r for _, r in pairs))


def _shown(change: LogMean | None, blocks: int) -> Estimate:
    if change is None:
        reason = f"{blocks} block(s) with both arms; a verdict takes {MIN_BLOCKS} on each side"
        return Estimate(None, None, None, blocks, reason)
    low, high = change.interval(SHOWN_LEVEL)
    return Estimate(math.expm1(change.mean), math.expm1(low), math.expm1(high), blocks)


def _fraction(log: float | None) -> float | None:
    return None if log is None else math.expm1(log)
