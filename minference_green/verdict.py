"""The gate: whether a run is worse than stored runs by more than a margin.

The reference arm is the concurrent control. What is judged is the log ratio candidate over
reference now, against the same ratio in the stored runs, so that whatever hits both arms
(machine, temperature, driver) cancels. Up to three looks at a growing run share one error
rate; a verdict may be INCONCLUSIVE.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import chain
from statistics import fmean
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
    deviation,
    invalid_share,
    kl_nats,
    method_names,
    output_error,
    paired_logs,
    peak_memory_bytes,
    prediction,
    recall,
    top1_agreement,
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

GUARD = 1.5
"""A PASS needs one arm shown to be, by its own figure, within this many margins of the stored.

What moves both arms cancels in the ratio; only the arms' own figures tell that the machine
changed. A guard of one margin doubts machines that did not change, one of two lets pass those
that did. By simulation at a margin of 5 % with a guard of 1, 1.25, 1.5 and 2 margins: of runs
2 % apart with nothing changed 84, 93, 97 and 98 % pass; with both arms 8 % dearer and noise of
3 % between blocks that both share, 0, 0, 2 and 33 %.
"""

OWN_SHARE = 1 / 3
"""A FAIL needs at least this share of the ratio's rise to be a rise of the candidate's own figure.

Otherwise the reference got cheaper. By simulation with 2 % between runs, a reference that got
10 % cheaper is blamed on the candidate in 53, 10 and 3 % of cases at a share of 0, 1/3 and 1/2,
and a true +10 % is taken for the reference's doing in 0.1, 1 and 4 %.
"""


CriterionName = Literal[
    "energy_ratio",
    "energy_absolute",
    "latency",
    "memory",
    "density",
    "output_error",
    "kl",
    "top1",
    "recall",
]
"""What can be judged of a method: joules and seconds per token against the reference arm,
its own joules per token, its peak device memory, its density, and what it lost: the error of
its last logits, the divergence of its next-token distributions, the share of its most likely
tokens that are the reference's, the share of dense attention mass it kept."""

CRITERIA: tuple[CriterionName, ...] = get_args(CriterionName)

_MORE_BLOCKS_MAY_DECIDE = (
    "margin-in-interval",
    "both-moved",
    "neither-held",
    "reference-moved",
    "few-blocks",
)

_OBSERVED: Mapping[str, Callable[[Run, int, str], Estimate]] = {
    "memory": peak_memory_bytes,
    "density": density,
    "output_error": output_error,
    "kl": kl_nats,
    "top1": top1_agreement,
    "recall": recall,
}
"""Criteria that come out the same each time, judged without an interval."""

_WORSE_WHEN_LESS = ("top1", "recall")


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
    "within-margin",
    "worse",
    "margin-in-interval",
    "both-moved",
    "neither-held",
    "reference-moved",
    "few-blocks",
    "not-observed",
]
"""What an outcome rests on; ``render/verdict.py`` says it in words."""


@dataclass(frozen=True)
class Ruling:
    """The outcome for one set of arms; changes are of logs, now minus then."""

    outcome: Outcome
    reason: Reason
    improved: bool = False
    change: LogMean | None = None
    """Of what was judged: the ratio, or the candidate's own figure."""
    candidate: LogMean | None = None
    reference: LogMean | None = None
    blocks_for_verdict: int | None = None
    """Blocks that would decide with 90 % power were the change what it appears to be."""


@dataclass(frozen=True)
class Criterion:
    """One (context length, method, name) of a comparison; changes are fractions."""

    name: CriterionName
    context_length: int
    method: str
    reference_method: str
    margin: float
    judged: bool
    """False: shown beside the verdict and no part of it."""
    outcome: Outcome
    reason: Reason
    improved: bool
    change: Estimate
    """Now over then, minus 1, with its 90 % interval where it varies."""
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
    margins: dict[CriterionName, float]
    criteria: tuple[Criterion, ...]
    differences: Differences
    allowed: tuple[str, ...]
    """Hard keys that differ and were allowed to; they stand on every report of the verdict."""
    blocks: int
    """Of the run judged, in the arm that has fewest."""
    stored_runs: int
    next_look: int | None
    """Blocks at the next look while more of them may decide; null after the last."""

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
    margin: float | Mapping[str, float] = 0.05,
    allow_mismatch: Sequence[str] = (),
) -> Verdict:
    """Judge ``candidate`` against one or more stored runs of the same workload.

    Every method both have beside the reference method is judged at every context length. One
    ``margin`` is for its joules, against the reference arm's and its own; a mapping names the
    criteria (``CRITERIA``), each with its margin. The method's own joules are judged from five
    stored runs on, and shown before. What is missing on either side cannot be judged:
    INCONCLUSIVE.

    Raises ``UsageError`` for a margin outside (0, 1), an unknown criterion or hard key, or
    nothing to judge; ``NotComparableError`` where hard keys differ and are not in
    ``allow_mismatch``; ``MeasurementError`` where more than 20 % of a run's windows are
    invalid, or it has none.
    """
    stored = (reference,) if isinstance(reference, Run) else tuple(reference)
    margins = check_margins(margin)
    check_allowed(allow_mismatch)
    if not stored:
        raise UsageError("there is no stored run to compare with; give one or more")
    for run in (*stored, candidate):
        _check_valid(run)
    found = [differences(run, candidate) for run in stored]
    allowed = _check_hard(found, allow_mismatch)
    judged = [n for n in margins if n != "energy_absolute" or _enough_for_own(stored, allowed)]
    cells = _judged_cells(stored, candidate)
    varying = max(1, len(cells) * sum(n not in _OBSERVED for n in judged))
    criteria = tuple(
        _criterion(stored, candidate, cell, name, margins[name], varying, name in judged)
        for cell in cells
        for name in margins
    )
    outcomes = {c.outcome for c in criteria if c.judged}
    outcome = next((o for o in (Outcome.FAIL, Outcome.INCONCLUSIVE) if o in outcomes), Outcome.PASS)
    blocks = min(len(_arms(candidate, cell, _quantity(n)).ratio) for cell in cells for n in judged)
    grows = any(c.judged and c.reason in _MORE_BLOCKS_MAY_DECIDE for c in criteria)
    return Verdict(
        outcome=outcome,
        improved=outcome is Outcome.PASS and any(c.judged and c.improved for c in criteria),
        margins=margins,
        criteria=criteria,
        differences=found[-1],
        allowed=allowed,
        blocks=blocks,
        stored_runs=len(stored),
        next_look=next_look(blocks) if grows else None,
    )


def check_margins(margin: float | Mapping[str, float]) -> dict[CriterionName, float]:
    """Margins by criterion; one number is for joules, against the reference arm and own.

    Raises ``UsageError`` for an unknown criterion, none, only ``energy_absolute`` (which few
    stored runs leave unjudged), or a margin outside (0, 1).
    """
    given = (
        margin
        if isinstance(margin, Mapping)
        else {"energy_ratio": margin, "energy_absolute": margin}
    )
    unknown = [name for name in given if name not in CRITERIA]
    if unknown or not set(given) - {"energy_absolute"}:
        raise UsageError(
            f"cannot judge by {', '.join(given) or 'nothing'}; choose from {', '.join(CRITERIA)}, "
            "energy_absolute only beside another"
        )
    for name, value in given.items():
        if not 0 < value < 1:
            raise UsageError(f"{name}: a margin of {value:g} is not a fraction; 0.05 means 5 %")
    return {name: given[name] for name in CRITERIA if name in given}


def rule(
    now: Arms, stored: Sequence[Arms], *, margin: float, criteria: int = 1, own: bool = False
) -> Ruling:
    """Judge one run's arms against those of one or more stored runs, by ratio or ``own`` figure.

    PASS if the upper end of the decision interval is below ``ln(1 + margin)``, FAIL if the
    lower end is not; a FAIL shares its error rate with the other ``criteria``. INCONCLUSIVE
    also when both arms are shown to have left the margin (``both-moved``), when what would pass
    has neither arm shown to be within ``GUARD`` margins (``neither-held``: noise of both arms
    can hide that the machine changed), and when a worse ratio is the reference's doing
    (``reference-moved``).
    """
    if min(len(now.ratio), sum(len(s.ratio) for s in stored)) < MIN_BLOCKS:
        return Ruling(Outcome.INCONCLUSIVE, "few-blocks")
    candidates, references = [s.candidate for s in stored], [s.reference for s in stored]
    candidate, reference = _change(now.candidate, candidates), _change(now.reference, references)
    change = candidate if own else _change(now.ratio, [s.ratio for s in stored])
    # Where the arms stand, against the stored blocks however many runs they are of: how far runs
    # scatter says what is usual for the machine, not that this one stood where they did.
    arms = _pooled(now.candidate, candidates), _pooled(now.reference, references)
    limit, guard = math.log1p(margin), math.log1p(GUARD * margin)
    outcome, reason = _decide(change, limit, criteria)
    needed: int | None = None
    if all(_moved(arm, limit) for arm in arms):
        outcome, reason = Outcome.INCONCLUSIVE, "both-moved"
    elif outcome is Outcome.PASS and not any(_held(arm, guard) for arm in arms):
        outcome, reason = Outcome.INCONCLUSIVE, "neither-held"
    elif outcome is Outcome.FAIL and candidate.mean < OWN_SHARE * change.mean:
        outcome, reason = Outcome.INCONCLUSIVE, "reference-moved"
    elif outcome is Outcome.INCONCLUSIVE:
        blocks = now.candidate if own else now.ratio
        needed = _blocks_for_verdict(change, blocks, limit, criteria)
    improved = (
        outcome is Outcome.PASS
        and _deciding(change)[1] < 0
        and candidate.mean < 0  # a ratio that fell because the reference rose is no merit
    )
    return Ruling(outcome, reason, improved, change, candidate, reference, needed)


def _change(now: Sequence[float], stored: Sequence[Sequence[float]]) -> LogMean:
    """Now minus then: by the scatter of the stored runs where it is known, else of the blocks."""
    if len(stored) >= PREDICTION_RUNS:
        return prediction(now, [fmean(s) for s in stored])
    return _pooled(now, stored)


def _pooled(now: Sequence[float], stored: Sequence[Sequence[float]]) -> LogMean:
    return welch(now, [*chain(*stored)])


def _deciding(change: LogMean, criteria: int = 1) -> tuple[float, float]:
    return change.interval(decision_level(criteria))


def _decide(change: LogMean, limit: float, criteria: int) -> tuple[Outcome, Reason]:
    if _deciding(change)[1] < limit:
        return Outcome.PASS, "within-margin"
    if _deciding(change, criteria)[0] >= limit:
        return Outcome.FAIL, "worse"
    return Outcome.INCONCLUSIVE, "margin-in-interval"


def _moved(arm: LogMean, limit: float) -> bool:
    """Whether an arm's own figure is shown to be beyond the limit, on either side."""
    low, high = _deciding(arm)
    return low > limit or high < -limit


def _held(arm: LogMean, limit: float) -> bool:
    """Whether an arm's own figure is shown to be within the limit, on both sides."""
    low, high = _deciding(arm)
    return -limit < low and high < limit


def _blocks_for_verdict(
    change: LogMean, blocks: Sequence[float], limit: float, criteria: int
) -> int | None:
    spread, gap = deviation(blocks), change.mean - limit
    rest = change.standard_error**2 - spread**2 / len(blocks)
    return blocks_needed(
        gap,
        spread,
        decision_level(criteria if gap > 0 else 1),
        other_error=math.sqrt(max(rest, 0.0)),
    )


def check_allowed(allow_mismatch: Sequence[str]) -> None:
    """Raise ``UsageError`` unless every name is a hard key."""
    unknown = [key for key in allow_mismatch if key not in HARD_KEYS]
    if unknown:
        raise UsageError(f"{', '.join(unknown)}: no such hard key; they are {', '.join(HARD_KEYS)}")


def _enough_for_own(stored: Sequence[Run], allowed: Sequence[str]) -> bool:
    """Whether the stored runs say what a method's own figure is on this ground."""
    return len(stored) >= PREDICTION_RUNS and not allowed


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
    if not run.windows:
        raise MeasurementError(
            f"run {run.header.run_id} holds no windows, so there is nothing to judge; "
            "measure it again"
        )
    share = invalid_share(run)
    if share > MAX_INVALID_SHARE:
        reasons = dict.fromkeys(r for w in run.windows if not w.valid for r in w.reasons)
        raise MeasurementError(
            f"{share:.0%} of the windows of run {run.header.run_id} are invalid, at most "
            f"{MAX_INVALID_SHARE:.0%} may be: {'; '.join(reasons) or 'no reason on file'}"
        )


_CellKey = tuple[int, str]


def _judged_cells(stored: Sequence[Run], candidate: Run) -> list[_CellKey]:
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
    return [(n, m) for n in lengths for m in methods]


def _criterion(
    stored: Sequence[Run],
    candidate: Run,
    cell: _CellKey,
    name: CriterionName,
    margin: float,
    count: int,
    judged: bool,
) -> Criterion:
    """One criterion of one cell; ``count`` of them share the error rate of a FAIL."""
    length, method = cell
    if name in _OBSERVED:
        value = _OBSERVED[name]
        then = [value(run, length, method) for run in stored]
        allowed = -margin if name in _WORSE_WHEN_LESS else margin
        ruling, shown = _observed_ruling(then, value(candidate, length, method), allowed)
    else:
        quantity = _quantity(name)
        now = _arms(candidate, cell, quantity)
        ruling = rule(
            now,
            [_arms(run, cell, quantity) for run in stored],
            margin=margin,
            criteria=count,
            own=name == "energy_absolute",
        )
        shown = _shown(ruling.change, len(now.ratio))
    low, high = _deciding(ruling.change) if ruling.change else (None, None)
    return Criterion(
        name=name,
        context_length=length,
        method=method,
        reference_method=method_names(candidate)[0],
        margin=margin,
        judged=judged,
        outcome=ruling.outcome,
        reason=ruling.reason,
        improved=ruling.improved,
        change=shown,
        decision_low=_fraction(low),
        decision_high=_fraction(high),
        candidate_change=_fraction(ruling.candidate.mean if ruling.candidate else None),
        reference_change=_fraction(ruling.reference.mean if ruling.reference else None),
        density_then=density(stored[-1], length, method).value,
        density_now=density(candidate, length, method).value,
        blocks_for_verdict=ruling.blocks_for_verdict,
    )


def _quantity(name: CriterionName) -> Quantity:
    return "seconds" if name == "latency" else "joules"


def _observed_ruling(
    then: Sequence[Estimate], now: Estimate, allowed: float
) -> tuple[Ruling, Estimate]:
    """The ruling on a figure without spread, against the mean of the stored ones.

    ``allowed`` is the change that fails, as a fraction; negative where less is worse.
    """
    for side, found in [*(("then", e) for e in then), ("now", now)]:
        if found.value is None:
            why = Estimate(None, None, None, 0, f"{side}: {found.reason}")
            return Ruling(Outcome.INCONCLUSIVE, "not-observed"), why
    before, after = fmean(e.value for e in then if e.value is not None), now.value or 0.0
    limit = before * (1 + allowed)
    fails = after != before and (after >= limit if allowed > 0 else after <= limit)
    ruling = Ruling(Outcome.FAIL, "worse") if fails else Ruling(Outcome.PASS, "within-margin")
    if before == 0:
        return ruling, Estimate(None, None, None, now.blocks, f"was 0 before, is {after:g} now")
    return ruling, Estimate(after / before - 1, None, None, now.blocks)


def _arms(run: Run, cell: _CellKey, quantity: Quantity) -> Arms:
    length, method = cell
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
