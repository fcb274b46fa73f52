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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from itertools import pairwise
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from minference_green.clustered import (
    ASSUMED_CORRELATION,
    Clustered,
    clustered,
    clusters_needed,
    correlation_used,
    interval,
    observed_correlation,
)
from minference_green.counts import ALPHA, benjamini_hochberg, holm, mcnemar, odds_ratio
from minference_green.detectable import TESTABLE_ITEMS, Detectable, smallest_effects
from minference_green.errors import UsageError
from minference_green.permutation import (
    codes,
    group_means,
    holds_several,
    permutations,
    sign_flip_p,
    strata,
)
from minference_green.stats import SHOWN_LEVEL, log_mean

DECIDING_HAYSTACKS = 5
"""Fewer haystacks decide nothing: how alike their answers are is not known."""

DEPTH_EDGES = (0.05, 0.2, 0.4, 0.6, 0.8, 0.95)
"""Between the depths an audit asks at: .02 .1 .25 .5 .75 .9 .98."""

RESAMPLES = 9999
"""Of a bootstrap or a permutation test; the smallest p is 0.0001."""

MOST_HAYSTACKS = 100_000
"""A verdict that needs more is at its margin."""

Place = Literal["inside", "after"]
"""Whether the question was part of the prefill or came after it."""

Score = Literal["loss", "net"]
"""Lost among the answers dense gave right; or lost minus gained among all."""

Change = Literal["log_probability_change", "kl_above_floor_nats"]
"""What is measured on a scale of each answer rather than right or wrong."""

Reason = Literal["nothing-to-lose", "nothing-to-gain", "no-answers"]
"""Why a share is null: dense gave no answer right, or none wrong, or none is there."""


@dataclass(frozen=True)
class Answer:
    """One question of an audit, answered after dense and after sparse prefill."""

    haystack: int
    """Answers of one haystack carry one number, at every length it was padded to."""
    kind: str
    depth: float
    """Of the fact within the context, 0 to 1."""
    place: Place
    context_tokens: int
    dense_right: bool
    sparse_right: bool
    log_probability_change: float | None = None
    """Of the right answer, sparse minus dense, in nats."""
    kl_above_floor_nats: float | None = None
    """KL of sparse from dense minus that of dense with another kernel; noise alone averages 0."""


@dataclass(frozen=True, eq=False)
class Answers:
    """The same by columns, all of one length; ``collect`` makes them from answers."""

    haystack: NDArray[np.int64]
    kind: NDArray[np.str_]
    depth: NDArray[np.float64]
    place: NDArray[np.str_]
    context_tokens: NDArray[np.int64]
    dense_right: NDArray[np.bool_]
    sparse_right: NDArray[np.bool_]
    log_probability_change: NDArray[np.float64]
    """NaN where it was not taken."""
    kl_above_floor_nats: NDArray[np.float64]
    """NaN where it was not taken."""

    def __len__(self) -> int:
        return len(self.haystack)

    def where(self, chosen: NDArray[np.bool_]) -> "Answers":
        """The answers chosen by a mask, as ``answers.where(answers.place == "inside")``."""
        return Answers(**{f.name: getattr(self, f.name)[chosen] for f in fields(self)})


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
class GroupLoss:
    """One kind, depth or cell against the rest."""

    name: str
    dense_right: int
    lost: int
    gained: int
    retention: float | None
    odds_ratio: float | None
    """Of losing an answer, against the other groups tested; above 1 is worse."""
    p: float | None
    """One-sided: the group loses more than the rest."""
    p_adjusted: float | None
    """Of all groups tested, by the test's correction."""
    named: bool
    """The group is shown to lose more than the rest, at an adjusted 5 %."""
    untestable: Literal["few-right", "never-beside-another"] | None = None
    """Null if tested. Dense gave too few answers right, or no haystack holds other groups."""


@dataclass(frozen=True)
class GroupTest:
    """Whether what is lost depends on the group."""

    groups: tuple[GroupLoss, ...]
    score: Score
    p: float | None
    """That groups differ at all, by the variance between them; of ``net``, that any loses more
    than the rest. Null with fewer than two to test."""
    correction: Literal["holm", "benjamini-hochberg"]
    resamples: int

    @property
    def named(self) -> tuple[str, ...]:
        """Groups shown to lose more than the rest."""
        return tuple(g.name for g in self.groups if g.named)

    @property
    def untestable(self) -> tuple[str, ...]:
        """Groups of which nothing can be said, neither good nor bad."""
        return tuple(g.name for g in self.groups if g.untestable)


@dataclass(frozen=True)
class Trend:
    """How the score rises from the start of the context to its end."""

    slope: float | None
    """Share lost per whole depth; null where no haystack holds several depths."""
    p: float | None
    """Two-sided."""
    items: int


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


def collect(answers: Iterable[Answer]) -> Answers:
    """Answers by columns; raises ``UsageError`` for none, or a depth or place that is none."""
    rows = tuple(answers)
    if not rows:
        raise UsageError("there are no answers to judge; run the audit first")
    for row in rows:
        if not 0 <= row.depth <= 1:
            raise UsageError(f"a depth of {row.depth:g} is not within the context: give 0 to 1")
        if row.place not in get_args(Place):
            raise UsageError(
                f"a question is asked {' or '.join(get_args(Place))}, not {row.place!r}"
            )

    def column(name: str, dtype: type) -> NDArray[Any]:
        values = [getattr(row, name) for row in rows]
        return np.array([math.nan if v is None else v for v in values], dtype)

    return Answers(
        haystack=column("haystack", np.int64),
        kind=column("kind", np.str_),
        depth=column("depth", np.float64),
        place=column("place", np.str_),
        context_tokens=column("context_tokens", np.int64),
        dense_right=column("dense_right", np.bool_),
        sparse_right=column("sparse_right", np.bool_),
        log_probability_change=column("log_probability_change", np.float64),
        kl_above_floor_nats=column("kl_above_floor_nats", np.float64),
    )


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


def by_kind(
    answers: Answers,
    score: Score = "loss",
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> GroupTest:
    """Whether kinds of information are lost unequally, and which ones; Holm over kinds.

    Kinds are permuted among the answers of one haystack, place and length. That kinds differ at
    all is judged by the variance between kinds; a kind is named where it loses more than the
    rest, over its standard error (Janssen 1997). A kind of which dense got fewer than
    ``TESTABLE_ITEMS`` answers right is not tested.
    """
    return _group_test(answers, answers.kind, score, "holm", resamples, seed)


def by_depth(
    answers: Answers,
    score: Score = "loss",
    *,
    edges: Sequence[float] = DEPTH_EDGES,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> GroupTest:
    """The same of depths, between ``edges``: a method may drop a range of them."""
    return _group_test(answers, _depth_names(answers, edges), score, "holm", resamples, seed)


def by_kind_and_depth(
    answers: Answers,
    score: Score = "loss",
    *,
    edges: Sequence[float] = DEPTH_EDGES,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> GroupTest:
    """The same of each kind at each depth, to explore: 5 % of what is named may be false.

    The correction is that of Benjamini and Hochberg (1995).
    """
    names = np.char.add(np.char.add(answers.kind, " "), _depth_names(answers, edges))
    return _group_test(answers, names, score, "benjamini-hochberg", resamples, seed)


def depth_trend(
    answers: Answers,
    score: Score = "loss",
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Trend:
    """Linear contrast on depth, with depths permuted as kinds are in ``by_kind``."""
    value, eligible = _score(answers, score)
    part, value = answers.where(eligible), value[eligible]
    stratum = _strata(part)
    centred = part.depth - group_means(stratum, part.depth)[stratum]
    # Equal depths may differ by rounding after their mean is taken away.
    spread = float((centred**2).sum())
    if spread < 1e-12 * max(len(part), 1):
        return Trend(None, None, len(part))
    moved, draws = permutations(stratum, value, resamples, seed)
    observed = abs(float(centred[moved] @ value[moved]))
    reached = sum(
        int((np.abs(centred[drawn] @ value[moved]) >= observed * (1 - 1e-9)).sum())
        for drawn in draws
    )
    return Trend(float(centred @ value) / spread, (reached + 1) / (resamples + 1), len(part))


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
    groups = _Groups.of(answers, answers.kind, "loss")
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
    *,
    correlation: float = ASSUMED_CORRELATION,
) -> Detectable | None:
    """What this audit could have seen at 80 % power; ``None`` where nothing could be lost.

    The clustering is the observed one, or ``correlation`` where that is larger and too few
    haystacks lost something. Kinds as in ``by_kind``; one that is not tested is null.
    """
    counts = _counts(answers, "loss")
    if not len(counts.items):
        return None
    groups = _Groups.of(answers, answers.kind, "loss")
    sizes = dict(zip(groups.names.tolist(), groups.sizes.tolist(), strict=True))
    used, observed = correlation_used(counts, correlation)
    return smallest_effects(
        {str(kind): int(sizes.get(kind, 0)) for kind in np.unique(answers.kind)},
        items=int(counts.items.sum()),
        haystacks=len(counts.items),
        alike=counts.alike,
        margin=margin,
        other_loss=counts.share,
        correlation=used,
        correlation_is="observed" if observed else "stated",
        stated=correlation,
    )


def _score(answers: Answers, score: Score) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Score of each answer and which take part."""
    net = answers.dense_right.astype(float) - answers.sparse_right
    eligible = answers.dense_right if score == "loss" else np.ones(len(answers), bool)
    return np.where(eligible, net, 0.0), eligible


def _counts(answers: Answers, score: Score) -> Clustered:
    return clustered(answers.haystack, *_score(answers, score), both_ways=score == "net")


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


@dataclass(frozen=True, eq=False)
class _Groups:
    """The answers of groups that can be tested, with sums of scores per group."""

    names: NDArray[np.str_]
    label: NDArray[np.intp]
    """Place of each answer's group in ``names``."""
    value: NDArray[np.float64]
    stratum: NDArray[np.intp]
    sizes: NDArray[np.float64]
    sums: NDArray[np.float64]
    """Of scores per group."""
    moved: NDArray[np.float64]
    """Flips per group, either way."""
    untestable: dict[str, Literal["few-right", "never-beside-another"]]

    @classmethod
    def of(cls, answers: Answers, names: NDArray[np.str_], score: Score) -> "_Groups":
        found, label = np.unique(names, return_inverse=True)
        right = np.bincount(label[answers.dense_right], minlength=len(found))
        value, eligible = _score(answers, score)
        part = eligible & (right >= TESTABLE_ITEMS)[label]
        stratum = _strata(answers)
        beside = np.bincount(
            label[part & holds_several(stratum, label, part)], minlength=len(found)
        )
        tested = (right >= TESTABLE_ITEMS) & (beside >= TESTABLE_ITEMS)
        if tested.sum() == 1:
            tested[:] = False  # its few neighbours are not tested: there is no rest
        part &= tested[label]
        kept, own = np.unique(label[part], return_inverse=True)
        return cls(
            names=found[kept],
            label=own,
            value=value[part],
            stratum=codes(stratum[part]),
            sizes=np.bincount(own, minlength=len(kept)).astype(float),
            sums=np.bincount(own, value[part], minlength=len(kept)).astype(float),
            moved=np.bincount(own, value[part] != 0, minlength=len(kept)).astype(float),
            untestable={
                str(name): "few-right" if few else "never-beside-another"
                for name, few, yes in zip(found, right < TESTABLE_ITEMS, tested, strict=True)
                if not yes
            },
        )

    def worse(self, sums: NDArray[np.float64], moved: NDArray[np.float64]) -> NDArray[np.float64]:
        """How much more each group loses than the rest, by sums and flips per group, (..., groups).

        Over its standard error, for a group that flips more often both ways scatters more. Where
        all flips are losses this ranks permutations as the sums alone do.
        """
        rest = self.sizes.sum() - self.sizes
        apart = sums / self.sizes - (sums.sum(-1, keepdims=True) - sums) / rest
        # Half a flip more on each side, so that none at all is not taken for certainty.
        own = (moved + 0.5) / self.sizes**2
        others = (moved.sum(-1, keepdims=True) - moved + 0.5) / rest**2
        in_errors: NDArray[np.float64] = apart / np.sqrt(own + others)
        return in_errors

    def permuted(
        self, resamples: int, seed: int
    ) -> Iterator[tuple[NDArray[np.float64], NDArray[np.float64]]]:
        """Sums and flips per group with groups permuted within strata, (some, groups) at a time."""
        scored, draws = permutations(self.stratum, self.value, resamples, seed)
        groups, value = len(self.names), self.value[scored]
        for drawn in draws:
            place = (self.label[drawn] + groups * np.arange(len(drawn))[:, None]).ravel()
            shape = len(drawn), groups
            moved = np.bincount(place, minlength=math.prod(shape)).astype(float).reshape(shape)
            if (value == 1).all():
                yield moved, moved
                continue
            weights = np.broadcast_to(value, drawn.shape).ravel()
            yield np.bincount(place, weights, math.prod(shape)).astype(float).reshape(shape), moved


def _group_test(
    answers: Answers,
    names: NDArray[np.str_],
    score: Score,
    correction: Literal["holm", "benjamini-hochberg"],
    resamples: int,
    seed: int,
) -> GroupTest:
    groups = _Groups.of(answers, names, score)
    worse = groups.worse(groups.sums, groups.moved)
    between = float((groups.sums**2 / groups.sizes).sum())
    reached, differ = np.zeros(len(groups.names)), 0
    for sums, moved in groups.permuted(resamples, seed):
        reached += (groups.worse(sums, moved) >= worse - 1e-9).sum(0)
        differ += int(((sums**2 / groups.sizes).sum(1) >= between * (1 - 1e-9)).sum())
    p = ((reached + 1) / (resamples + 1)).tolist()
    adjusted = holm(p) if correction == "holm" else benjamini_hochberg(p)
    # A group that flips more both ways varies more, so the variance of net says too much.
    overall = (differ + 1) / (resamples + 1) if score == "loss" else min(adjusted, default=None)
    tested = dict(zip(groups.names.tolist(), zip(p, adjusted, strict=True), strict=True))
    return GroupTest(
        groups=tuple(
            _group_loss(answers, names, name, tested, groups.untestable)
            for name in np.unique(names).tolist()
        ),
        score=score,
        p=overall if tested else None,
        correction=correction,
        resamples=resamples,
    )


def _group_loss(
    answers: Answers,
    names: NDArray[np.str_],
    name: str,
    tested: dict[str, tuple[float, float]],
    untestable: dict[str, Literal["few-right", "never-beside-another"]],
) -> GroupLoss:
    own = names == name
    right, kept = answers.dense_right, answers.dense_right & answers.sparse_right
    others = np.isin(names, list(tested)) & ~own
    dense_right, lost = int(right[own].sum()), int((right & ~kept)[own].sum())
    p, adjusted = tested.get(name, (None, None))
    return GroupLoss(
        name=name,
        dense_right=dense_right,
        lost=lost,
        gained=int((~right & answers.sparse_right)[own].sum()),
        retention=1 - lost / dense_right if dense_right else None,
        odds_ratio=None
        if p is None
        else odds_ratio(
            lost, dense_right - lost, int((right & ~kept)[others].sum()), int(kept[others].sum())
        ),
        p=p,
        p_adjusted=adjusted,
        named=adjusted is not None and adjusted <= ALPHA,
        untestable=untestable.get(name),
    )


def _strata(answers: Answers) -> NDArray[np.intp]:
    """Answers of one haystack, place and length carry one number."""
    return strata(answers.haystack, answers.place, answers.context_tokens)


def _depth_names(answers: Answers, edges: Sequence[float]) -> NDArray[np.str_]:
    bounds = (0.0, *edges, 1.0)
    if any(a >= b for a, b in pairwise(bounds)):
        raise UsageError(f"depth edges {tuple(edges)} do not rise within 0 to 1")
    names = np.array([f"{a:g}-{b:g}" for a, b in pairwise(bounds)])
    return names[np.searchsorted(edges, answers.depth, side="right")]
