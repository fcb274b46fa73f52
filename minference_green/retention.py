"""What sparse prefill loses, of which kind and where: pure functions of paired answers.

The same question is put to the same model after a dense and after a sparse prefill. What counts
is retention, P(sparse right | dense right): a bare difference in accuracy hides flips in both
directions. Questions that share a haystack share its luck, so a haystack is the unit of every
interval, and labels are permuted only within one. ``benchmarks/audit_power.py`` prints how often
all this is wrong.

Two scores are judged by the same functions. ``loss`` looks at the answers the dense model gave
right and counts those lost. ``net`` looks at all and counts lost minus gained: where rounding
flips near ties both ways, a kind the dense model half knows loses much and gains as much, which
is noise and no bias.
"""

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from minference_green.answers import Answers, Change, Score, scores
from minference_green.clustered import (
    ASSUMED_CORRELATION,
    Clustered,
    clustered,
    clusters_needed,
    correlation_used,
    interval,
    observed_correlation,
)
from minference_green.counts import ALPHA, mcnemar, odds_ratio
from minference_green.detectable import DECIDING_HAYSTACKS, Detectable, smallest_effects
from minference_green.errors import UsageError
from minference_green.groups import Groups
from minference_green.permutation import RESAMPLES, codes, group_means, sign_flip_p
from minference_green.stats import SHOWN_LEVEL, log_mean

MOST_HAYSTACKS = 100_000
"""A verdict that needs more is at its margin."""

Reason = Literal["nothing-to-lose", "nothing-to-gain", "no-answers"]
"""Why a share is null: dense gave no answer right, or none wrong, or none is there."""


@dataclass(frozen=True)
class Share:
    """A share of answers with its 90 % interval; null with a reason where nothing is shared out.

    Either end alone is a one-sided 95 % bound.
    """

    value: float | None
    low: float | None
    high: float | None
    items: int
    haystacks: int
    how: Literal["bootstrap", "clopper-pearson"] | None = None
    """Of the interval."""
    reason: Reason | None = None


@dataclass(frozen=True)
class Flips:
    """How often an answer changed between dense and sparse, in either direction."""

    lost: int
    gained: int
    lost_share: Share
    """Of the answers dense gave right."""
    gained_share: Share
    """Of the answers dense gave wrong."""
    p_mcnemar: float
    """Takes all answers for independent, as published comparisons do; else it is too small."""
    p_haystacks: float
    """By sign-flips of whole haystacks."""


class Finding(StrEnum):
    """What an audit shows of the loss."""

    LOSS = "loss shown"
    NO_LOSS = "no loss beyond margin shown"
    UNDECIDED = "undecided"


@dataclass(frozen=True)
class LossVerdict:
    """Whether the loss is beyond a margin, and what that rests on."""

    finding: Finding
    reason: Literal[
        "beyond-margin",
        "within-margin",
        "margin-in-interval",
        "few-haystacks",
        "nothing-to-lose",
        "no-answers",
    ]
    score: Score
    margin: float
    loss: Share
    more_haystacks: int | None = None
    """Needed beside those there, for 80 % power were the loss what it appears to be; null when
    decided, and when so near the margin that ``MOST_HAYSTACKS`` would not do."""


@dataclass(frozen=True)
class Shift:
    """Mean change of what is measured on a scale, over haystacks."""

    mean: float | None
    low: float | None
    high: float | None
    """Student t at 90 % over haystack means; null with one haystack."""
    p: float | None
    """Two-sided, by sign-flips of haystack means."""
    items: int
    haystacks: int
    reason: Literal["not-taken", "one-haystack"] | None = None


@dataclass(frozen=True)
class Disparity:
    """Retention of the worst kind over that of the best."""

    worst: str
    best: str
    ratio: float | None
    """1 is even-handed; null if nothing at all was kept."""
    low: float | None
    high: float | None
    """At 90 % or more, for these two kinds as if chosen beforehand; high is null without bound."""
    by_chance: float
    """What the worst over the best falls to in one of 20 methods that are even-handed."""
    odds_ratio: float
    """Odds of losing an answer, worst over best."""


def retention(
    answers: Answers,
    *,
    correlation: float = ASSUMED_CORRELATION,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Share:
    """P(sparse right | dense right) with its 90 % interval, one minus that of ``loss``."""
    lost = loss(answers, correlation=correlation, resamples=resamples, seed=seed)
    if lost.value is None or lost.low is None or lost.high is None:
        return lost
    ends = 1 - lost.value, 1 - lost.high, 1 - lost.low
    return Share(*ends, lost.items, lost.haystacks, lost.how)


def loss(
    answers: Answers,
    score: Score = "loss",
    *,
    correlation: float = ASSUMED_CORRELATION,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Share:
    """Share of answers lost (or lost minus gained) with its 90 % interval.

    That of :func:`clustered.interval`, its clusters the haystacks. Dense right nowhere: null
    with the reason.
    """
    counts = _counts(answers, score)
    nothing: Reason = "nothing-to-lose" if score == "loss" and len(answers) else "no-answers"
    return _share(counts, nothing, correlation, resamples, seed)


def flips(
    answers: Answers,
    *,
    correlation: float = ASSUMED_CORRELATION,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Flips:
    """Flips in both directions, with the tests that they balance."""
    lost = answers.dense_right & ~answers.sparse_right
    gained = ~answers.dense_right & answers.sparse_right
    gains = clustered(answers.haystack, gained.astype(float), ~answers.dense_right, both_ways=False)
    nothing: Reason = "nothing-to-gain" if len(answers) else "no-answers"
    net = _counts(answers, "net")
    return Flips(
        lost=int(lost.sum()),
        gained=int(gained.sum()),
        lost_share=loss(answers, correlation=correlation, resamples=resamples, seed=seed),
        gained_share=_share(gains, nothing, correlation, resamples, seed),
        p_mcnemar=mcnemar(int(lost.sum()), int(gained.sum())),
        p_haystacks=sign_flip_p(net.net, resamples, seed),
    )


def judge(
    answers: Answers,
    margin: float = 0.02,
    score: Score = "loss",
    *,
    correlation: float = ASSUMED_CORRELATION,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> LossVerdict:
    """Whether more than ``margin`` of the answers is lost, by one-sided 95 % bounds.

    The lower bound above the margin: loss shown. The upper one below: no loss beyond the margin
    shown. Else undecided, and so with fewer than ``DECIDING_HAYSTACKS``. Raises ``UsageError``
    for a margin outside (0, 1).
    """
    if not 0 < margin < 1:
        raise UsageError(f"a margin of {margin:g} is not a share of answers; 0.02 means 2 points")
    counts = _counts(answers, score)
    lost = loss(answers, score, correlation=correlation, resamples=resamples, seed=seed)

    def verdict(finding: Finding, reason: Any, more: int | None = None) -> LossVerdict:
        return LossVerdict(finding, reason, score, margin, lost, more)

    if lost.low is None or lost.high is None:
        return verdict(Finding.UNDECIDED, lost.reason)
    if lost.haystacks >= DECIDING_HAYSTACKS:
        if lost.low > margin:
            return verdict(Finding.LOSS, "beyond-margin")
        if lost.high < margin:
            return verdict(Finding.NO_LOSS, "within-margin")
    sizes = range(max(lost.haystacks, DECIDING_HAYSTACKS), MOST_HAYSTACKS + 1)
    needed = clusters_needed(counts, margin, correlation, sizes)
    few = lost.haystacks < DECIDING_HAYSTACKS
    more = None if needed is None else max(needed - lost.haystacks, 1)
    return verdict(Finding.UNDECIDED, "few-haystacks" if few else "margin-in-interval", more)


def shift(
    answers: Answers,
    of: Change = "log_probability_change",
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Shift:
    """Mean over haystacks of each one's mean change, among the answers where it was taken."""
    taken = answers.where(~np.isnan(getattr(answers, of)))
    if not len(taken):
        return Shift(None, None, None, None, 0, 0, "not-taken")
    means = group_means(codes(taken.haystack), getattr(taken, of))
    p = sign_flip_p(means, resamples, seed)
    if len(means) < 2:
        return Shift(float(means[0]), None, None, p, len(taken), 1, "one-haystack")
    over = log_mean(means.tolist())
    return Shift(over.mean, *over.interval(SHOWN_LEVEL), p, len(taken), len(means))


def disparity(
    answers: Answers,
    *,
    correlation: float = ASSUMED_CORRELATION,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Disparity | None:
    """Retention of the worst kind over the best; ``None`` with fewer than two kinds to test.

    The interval comes from those of both kinds by the method of variance estimates recovery
    (Donner and Zou 2012), as if they were independent; that they share haystacks makes it wider
    than it need be. The worst of many kinds is low by chance alone: ``by_chance`` says how low.
    """
    groups = Groups.of(answers, answers.kind, "loss")
    if len(groups.names) < 2:
        return None
    sizes, lost = groups.sizes, groups.sums
    kept = 1 - lost / sizes
    worst, best = int(kept.argmin()), int(kept.argmax())
    if worst == best:
        worst, best = 0, 1
    by_chance = np.concatenate(
        [_worst_over_best(1 - sums / sizes) for sums, _ in groups.permuted(resamples, seed)]
    )
    names = groups.names
    ends = (
        retention(
            answers.where(answers.kind == names[i]),
            correlation=correlation,
            resamples=resamples,
            seed=seed,
        )
        for i in (worst, best)
    )
    return Disparity(
        str(names[worst]),
        str(names[best]),
        *_ratio(*ends),
        by_chance=float(np.quantile(by_chance, ALPHA)),
        odds_ratio=odds_ratio(
            int(lost[worst]),
            int(sizes[worst] - lost[worst]),
            int(lost[best]),
            int(sizes[best] - lost[best]),
        ),
    )


def intra_haystack_correlation(answers: Answers, score: Score = "loss") -> float | None:
    """Correlation of losses that share a haystack, by analysis of variance, 0 to 1.

    ``None`` where it cannot be told: one haystack, one answer in each, or nothing lost or kept.
    """
    return observed_correlation(_counts(answers, score))


def detectable(
    answers: Answers,
    margin: float = 0.02,
    score: Score = "loss",
    *,
    correlation: float = ASSUMED_CORRELATION,
) -> Detectable | None:
    """What this audit could have seen at 80 % power; ``None`` where nothing could be lost.

    Of the verdict that :func:`judge` gives on ``score``. The clustering of losses is the observed
    one, or ``correlation`` where that is larger and too few haystacks lost something. Kinds as
    in ``by_kind``; one that is not tested is null.
    """
    lost, judged = _counts(answers, "loss"), _counts(answers, score)
    if not len(lost.items):
        return None
    groups = Groups.of(answers, answers.kind, "loss")
    sizes = dict(zip(groups.names.tolist(), groups.sizes.tolist(), strict=True))
    used, observed = correlation_used(lost, correlation)
    return smallest_effects(
        {str(kind): int(sizes.get(kind, 0)) for kind in np.unique(answers.kind)},
        items=int(judged.items.sum()),
        haystacks=len(judged.items),
        alike=judged.alike,
        margin=margin,
        other_loss=lost.share,
        correlation=used,
        correlation_is="observed" if observed else "stated",
        stated=correlation,
        both_ways=judged.both_ways,
    )


def _counts(answers: Answers, score: Score) -> Clustered:
    return clustered(answers.haystack, *scores(answers, score), both_ways=score == "net")


def _share(
    counts: Clustered, nothing: Reason, correlation: float, resamples: int, seed: int
) -> Share:
    haystacks, items = len(counts.items), int(counts.items.sum())
    if not items:
        return Share(None, None, None, 0, 0, reason=nothing)
    low, high, how = interval(counts, correlation, resamples, seed)
    return Share(counts.share, low, high, items, haystacks, how)


def _ratio(worst: Share, best: Share) -> tuple[float | None, float | None, float | None]:
    """Ratio of two shares with its ends; null where the best is 0."""
    w, w_low, w_high = worst.value or 0.0, worst.low or 0.0, worst.high or 0.0
    b, b_low, b_high = best.value or 0.0, best.low or 0.0, best.high or 0.0
    if b == 0:
        return None, None, None
    product = w * b
    smaller, larger = w_low * (2 * w - w_low), w_high * (2 * w - w_high)
    above, below = b_high * (2 * b - b_high), b_low * (2 * b - b_low)
    # Solved for the root that stays finite where ``above`` is 0 or less.
    low = smaller / (product + math.sqrt(max(product**2 - smaller * above, 0))) if w > 0 else 0.0
    high = (product + math.sqrt(max(product**2 - larger * below, 0))) / below if below else None
    return w / b, low, high


def _worst_over_best(shares: NDArray[np.float64]) -> NDArray[np.float64]:
    """Along the last axis; 1 where all are 0."""
    best = shares.max(-1)
    return np.where(best > 0, shares.min(-1) / np.where(best > 0, best, 1), 1.0)
