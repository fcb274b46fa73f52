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
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from itertools import pairwise
from statistics import NormalDist
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from minference_green.errors import UsageError
from minference_green.stats import SHOWN_LEVEL, log_mean

ALPHA = 0.05
"""Highest rate of false findings of a test, and the tail beyond either end of an interval."""

POWER = 0.80
"""Share of runs in which an effect called detectable is found."""

ASSUMED_CORRELATION = 0.2
"""Correlation of losses within a haystack where the answers say too little of it.

With fewer than ``BOOTSTRAP_HAYSTACKS`` that lost something, the larger of this and the observed
one sets the interval. By simulation a true correlation of 0.3 then leaves the true loss above
the upper end in at most 8 % of audits of 12 to 120 haystacks; assuming 0.1, in 12 %.
"""

BOOTSTRAP_HAYSTACKS = 15
"""Haystacks that must hold something lost, and as many something kept, before BCa is used.

By simulation its upper end misses a loss of 2 % in 24 % of audits where about three haystacks
lost something, and a loss in 4 to 9 % from 15 on.
"""

DECIDING_HAYSTACKS = 5
"""Fewer haystacks decide nothing: how alike their answers are is not known."""

TESTABLE_ITEMS = 5
"""A group needs as many answers that the dense model gave right before it is tested."""

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


@dataclass(frozen=True)
class Detectable:
    """Smallest effects that an audit of this size finds in 80 % of cases."""

    loss: float
    """Share of the answers dense gave right whose loss is shown to be beyond the margin."""
    margin: float
    one_kind: dict[str, float | None]
    """Share that one kind must lose beyond the others to be named; null if no share is enough."""
    other_loss: float
    """Of the other kinds, as this was reckoned."""
    correlation: float
    """Within haystacks, as this was reckoned."""
    correlation_is: Literal["observed", "stated"]
    haystacks: int
    items: int


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

    BCa bootstrap of whole haystacks (Efron 1987) where at least ``BOOTSTRAP_HAYSTACKS`` hold
    something lost and as many something kept. Else, so also with all kept or all lost,
    Clopper-Pearson bounds at the effective number of answers (Korn and Graubard 1998), which
    the larger of ``correlation`` and the observed one gives: never an interval without width.
    Lost minus gained then joins the bounds of both. Dense right nowhere: null with the reason.
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
    gains = _counts_of(
        answers.haystack, gained.astype(float), ~answers.dense_right, both_ways=False
    )
    nothing: Reason = "nothing-to-gain" if len(answers) else "no-answers"
    net = _counts(answers, "net")
    return Flips(
        lost=int(lost.sum()),
        gained=int(gained.sum()),
        lost_share=loss(answers, correlation=correlation, resamples=resamples, seed=seed),
        gained_share=_share(gains, nothing, correlation, resamples, seed),
        p_mcnemar=mcnemar(int(lost.sum()), int(gained.sum())),
        p_haystacks=_sign_flip_p(net.net, resamples, seed),
    )


def mcnemar(lost: int, gained: int) -> float:
    """Two-sided p that flips balance: exact, mid-p above 25 (Fagerland, Lydersen, Laake 2013).

    Raises ``ValueError`` for a negative count.
    """
    if min(lost, gained) < 0:
        raise ValueError(f"flips are counted from 0 up, got {lost} lost and {gained} gained")
    from scipy.stats import binom

    discordant, fewer = lost + gained, min(lost, gained)
    p = 2 * float(binom.cdf(fewer, discordant, 0.5))
    if discordant > 25:
        p -= float(binom.pmf(fewer, discordant, 0.5))
    return min(p, 1.0)


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
    needed = _haystacks_needed(counts, margin, correlation)
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
    centred = part.depth - _group_means(stratum, part.depth)[stratum]
    # Equal depths may differ by rounding after their mean is taken away.
    spread = float((centred**2).sum())
    if spread < 1e-12 * max(len(part), 1):
        return Trend(None, None, len(part))
    moved, draws = _permutations(stratum, value, resamples, seed)
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
    means = _group_means(_codes(taken.haystack), getattr(taken, of))
    p = _sign_flip_p(means, resamples, seed)
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


def odds_ratio(lost: int, kept: int, other_lost: int, other_kept: int) -> float:
    """Odds of losing against those of others; half an answer added to each count (Haldane 1956)."""
    return (lost + 0.5) * (other_kept + 0.5) / ((kept + 0.5) * (other_lost + 0.5))


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """Adjusted p in the order given: no false finding at all in 95 of 100 families (Holm 1979)."""
    adjusted, so_far = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        so_far = max(so_far, min(1.0, p_values[i] * (len(p_values) - rank)))
        adjusted[i] = so_far
    return tuple(adjusted)


def intra_haystack_correlation(answers: Answers, score: Score = "loss") -> float | None:
    """Correlation of losses that share a haystack, by analysis of variance, 0 to 1.

    ``None`` where it cannot be told: one haystack, one answer in each, or nothing lost or kept.
    """
    return _observed_correlation(_counts(answers, score))


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
    used, observed = _correlation(counts, correlation)
    return _detectable(
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


def planned_detectable(
    kinds: Sequence[str],
    haystacks: int,
    *,
    items_per_kind: int = 2,
    margin: float = 0.02,
    other_loss: float = 0.02,
    correlation: float = ASSUMED_CORRELATION,
) -> Detectable:
    """What an audit will see at 80 % power, were every dense answer right.

    ``items_per_kind`` are questions of one kind per haystack; ``other_loss`` and ``correlation``
    are stated, for there are no answers yet. Raises ``UsageError`` for less than one kind,
    haystack or question, or a share outside [0, 1).
    """
    if min(len(kinds), haystacks, items_per_kind) < 1:
        raise UsageError(
            f"an audit of {len(kinds)} kinds, {haystacks} haystacks and {items_per_kind} questions "
            "of each kind asks nothing; give one or more of each"
        )
    for name, share in (("other_loss", other_loss), ("correlation", correlation)):
        if not 0 <= share < 1:
            raise UsageError(f"{name}: {share:g} is not a share; give 0 to below 1")
    per_haystack = len(kinds) * items_per_kind
    return _detectable(
        dict.fromkeys(kinds, haystacks * items_per_kind),
        items=haystacks * per_haystack,
        haystacks=haystacks,
        alike=float(per_haystack),
        margin=margin,
        other_loss=other_loss,
        correlation=correlation,
        correlation_is="stated",
        stated=max(correlation, ASSUMED_CORRELATION),
    )


def pairs_needed(
    net_loss: float,
    discordant: float,
    *,
    tests: int = 1,
    items_per_haystack: float = 1.0,
    correlation: float = 0.0,
) -> int:
    """Pairs at which McNemar's test finds a net loss at two-sided 5 % with 80 % power.

    ``discordant`` is the share of answers that flip either way, at least ``net_loss``; ``tests``
    share the 5 % as Holm's first step does. Connor (1987), times the design effect of questions
    that share a haystack. Raises ``UsageError`` where the shares contradict each other.
    """
    if not 0 < net_loss <= discordant <= 1:
        raise UsageError(
            f"a net loss of {net_loss:g} with {discordant:g} discordant cannot be: "
            "give 0 < net loss <= discordant <= 1"
        )
    z_alpha, z_power = _normal(1 - ALPHA / 2 / tests), _normal(POWER)
    root = z_alpha * math.sqrt(discordant) + z_power * math.sqrt(discordant - net_loss**2)
    design_effect = 1 + (items_per_haystack - 1) * correlation
    return math.ceil(design_effect * (root / net_loss) ** 2)


@dataclass(frozen=True, eq=False)
class _Counts:
    """Answers of each haystack that has any: scored +1, scored -1, and all."""

    up: NDArray[np.float64]
    down: NDArray[np.float64]
    items: NDArray[np.float64]
    both_ways: bool
    """Whether an answer can score -1 at all."""

    @property
    def net(self) -> NDArray[np.float64]:
        return self.up - self.down

    @property
    def share(self) -> float:
        return float(self.net.sum() / self.items.sum())

    @property
    def bootstraps(self) -> bool:
        """Whether enough haystacks hold something moved and something not, and they differ."""
        moved = self.up + self.down
        fewer = int(min((moved > 0).sum(), (moved < self.items).sum()))
        return fewer >= BOOTSTRAP_HAYSTACKS and float(np.ptp(self.net / self.items)) > 1e-12

    @property
    def alike(self) -> float:
        """Answers that share an answer's haystack, itself included, on average over answers."""
        return float((self.items**2).sum() / self.items.sum())


def _score(answers: Answers, score: Score) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Score of each answer and which take part."""
    net = answers.dense_right.astype(float) - answers.sparse_right
    eligible = answers.dense_right if score == "loss" else np.ones(len(answers), bool)
    return np.where(eligible, net, 0.0), eligible


def _counts(answers: Answers, score: Score) -> _Counts:
    return _counts_of(answers.haystack, *_score(answers, score), both_ways=score == "net")


def _counts_of(
    haystack: NDArray[np.int64],
    value: NDArray[np.float64],
    eligible: NDArray[np.bool_],
    *,
    both_ways: bool,
) -> _Counts:
    codes, scored = _codes(haystack[eligible]), value[eligible]
    up, down = (np.bincount(codes, sign * scored > 0).astype(float) for sign in (1, -1))
    return _Counts(up, down, np.bincount(codes).astype(float), both_ways)


def _share(
    counts: _Counts, nothing: Reason, correlation: float, resamples: int, seed: int
) -> Share:
    haystacks, items = len(counts.items), int(counts.items.sum())
    if not items:
        return Share(None, None, None, 0, 0, reason=nothing)
    if not counts.bootstraps:
        ends = _exact_ends(counts, correlation)
        return Share(counts.share, *ends, items, haystacks, "clopper-pearson")
    ends = _bootstrap_ends(counts, resamples, seed)
    return Share(counts.share, *ends, items, haystacks, "bootstrap")


def _bootstrap_ends(counts: _Counts, resamples: int, seed: int) -> tuple[float, float]:
    from scipy.stats import bootstrap

    def mean(net: Any, items: Any, axis: int = -1) -> Any:
        return net.sum(axis) / items.sum(axis)

    found = bootstrap(
        (counts.net, counts.items),
        mean,
        paired=True,
        vectorized=True,
        confidence_level=1 - 2 * ALPHA,
        n_resamples=resamples,
        method="BCa",
        random_state=np.random.default_rng(seed),
    ).confidence_interval
    return float(found.low), float(found.high)


def _exact_ends(counts: _Counts, correlation: float) -> tuple[float, float]:
    used, _ = _correlation(counts, correlation)
    items = float(counts.items.sum())
    effective = items / (1 + (counts.alike - 1) * used)
    low, high = _clopper_pearson(float(counts.up.sum()) / items, effective)
    if not counts.both_ways:
        return low, high
    down_low, down_high = _clopper_pearson(float(counts.down.sum()) / items, effective)
    return low - down_high, high - down_low


def _clopper_pearson(share: float, items: float) -> tuple[float, float]:
    from scipy.special import betaincinv

    hits = share * items
    low = float(betaincinv(hits, items - hits + 1, ALPHA)) if share > 0 else 0.0
    high = float(betaincinv(hits + 1, items - hits, 1 - ALPHA)) if share < 1 else 1.0
    return low, high


def _observed_correlation(counts: _Counts) -> float | None:
    """Intraclass correlation by analysis of variance (Donald and Donner 1987)."""
    haystacks, items = len(counts.items), float(counts.items.sum())
    if haystacks < 2 or items == haystacks:
        return None
    squares = float((counts.up + counts.down).sum())
    explained = float((counts.net**2 / counts.items).sum())
    between = (explained - counts.net.sum() ** 2 / items) / (haystacks - 1)
    within = (squares - explained) / (items - haystacks)
    size = (items - counts.alike) / (haystacks - 1)
    if between + (size - 1) * within <= 0:
        return None
    return float(np.clip((between - within) / (between + (size - 1) * within), 0, 1))


def _correlation(counts: _Counts, stated: float) -> tuple[float, bool]:
    """The correlation to reckon with, and whether it is the observed one."""
    observed = _observed_correlation(counts)
    if observed is None:
        return stated, False
    if not counts.bootstraps:
        return max(stated, observed), observed >= stated
    return observed, True


def _haystacks_needed(counts: _Counts, margin: float, correlation: float) -> int | None:
    """Haystacks at which such a share is shown, in the cases wanted, on its side of the margin.

    Of losses by the binomial at the effective number of answers, whose scatter at the margin is
    not that at the share; of lost minus gained by the normal approximation.
    """
    present, share = len(counts.items), counts.share
    used, _ = _correlation(counts, correlation)
    effective = float(counts.items.sum()) / (1 + (counts.alike - 1) * used) / present
    apart = counts.net - share * counts.items
    variance = float((apart**2).mean() / counts.items.mean() ** 2)
    quantiles = _normal(1 - ALPHA) + _normal(POWER)

    def decides(haystacks: int) -> bool:
        if counts.both_ways and variance > 0:
            return abs(share - margin) * math.sqrt(haystacks) >= quantiles * math.sqrt(variance)
        answers = effective * haystacks
        if share > margin:
            return share >= _share_above(margin, answers)
        # With nothing lost the first is true of any number; the bound must clear the margin too.
        bounded = _clopper_pearson(share, answers)[1] < margin
        return bounded and 1 - share >= _share_above(1 - margin, answers)

    sizes = range(max(present, DECIDING_HAYSTACKS), MOST_HAYSTACKS + 1)
    found = bisect_left(sizes, True, key=decides)
    return sizes[found] if found < len(sizes) else None


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


def _detectable(
    sizes: dict[str, int],
    *,
    items: int,
    haystacks: int,
    alike: float,
    margin: float,
    other_loss: float,
    correlation: float,
    correlation_is: Literal["observed", "stated"],
    stated: float,
) -> Detectable:
    if not 0 < margin < 1:
        raise UsageError(f"a margin of {margin:g} is not a share of answers; 0.02 means 2 points")
    tested = [n for n in sizes.values() if n >= TESTABLE_ITEMS]
    # Holm's first step: the kind that stands out has to pass it.
    alpha = ALPHA / max(len(tested), 1)
    in_one = {
        n: _detectable_in_one(n, sum(tested) - n, other_loss, correlation, alpha)
        for n in set(tested)
        if len(tested) > 1
    }
    return Detectable(
        loss=_detectable_beyond(margin, items, haystacks, alike, correlation, stated),
        margin=margin,
        one_kind={kind: in_one.get(n) for kind, n in sizes.items()},
        other_loss=other_loss,
        correlation=correlation,
        correlation_is=correlation_is,
        haystacks=haystacks,
        items=items,
    )


def _detectable_beyond(
    margin: float, items: int, haystacks: int, alike: float, correlation: float, stated: float
) -> float:
    """Share whose lower bound is above ``margin`` in the cases wanted.

    Either Clopper-Pearson bounds find it, which reckon with ``stated``; or enough haystacks lose
    something for the bootstrap, which sees the correlation there is.
    """
    from scipy.special import betaln
    from scipy.stats import binom

    def bounded(correlation: float) -> float:
        return _share_above(margin, items / (1 + (alike - 1) * correlation))

    def bootstrapped(share: float) -> bool:
        if correlation > 0:
            rest = (1 - correlation) / correlation
            a, b = share * rest, (1 - share) * rest
            spared = math.exp(betaln(a, b + alike) - betaln(a, b))
        else:
            spared = (1 - share) ** alike
        return float(binom.sf(BOOTSTRAP_HAYSTACKS - 1, haystacks, 1 - spared)) >= POWER

    exact = bounded(max(correlation, stated))
    if not bootstrapped(exact):
        return exact
    return min(exact, max(bounded(correlation), _smallest(bootstrapped, 0.0, exact)))


def _share_above(margin: float, effective: float) -> float:
    """Share whose Clopper-Pearson bound is above ``margin``, of so many independent answers.

    The binomial made continuous: the hits from which the bound is above the margin, then the
    share at which so many come up in the cases wanted.
    """
    from scipy.optimize import brentq
    from scipy.special import betainc, betaincinv

    hits = brentq(
        lambda x: betainc(x, effective - x + 1, margin) - ALPHA, 1e-9, effective + 1 - 1e-9
    )
    return float(betaincinv(hits, effective - hits + 1, POWER))


def _smallest(enough: Callable[[float], bool], low: float, high: float) -> float:
    """Where ``enough`` turns true, to 0.0001; it is true at ``high``."""
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _detectable_in_one(
    items: int, rest: int, other_loss: float, correlation: float, alpha: float
) -> float | None:
    """Loss beyond the others' at which one group is named at ``alpha`` with the power wanted.

    Given how many answers were lost in all, permuting within haystacks spreads those of a group
    like a hypergeometric of the same variance: haystacks with many losses leave less to chance,
    by the factor ``1 - correlation``. Which losses the rest has is taken at ten quantiles.
    """
    from scipy.stats import binom, hypergeom

    share = items / (items + rest)
    other = binom.ppf(np.arange(0.05, 1, 0.1), rest, other_loss)[:, None]
    own = np.arange(items + 1)
    lost = own + other
    factor = (1 - lost / (items + rest)) * (1 - correlation)
    population = np.maximum((lost - factor) / np.maximum(1 - factor, 1e-9), lost).round()
    p = hypergeom.sf(own - 1, population, (share * population).round(), lost)
    needed = np.where((p <= alpha).any(1), (p <= alpha).argmax(1), items + 1)

    def named(own_loss: float) -> bool:
        return float(binom.sf(needed - 1, items, own_loss).mean()) >= POWER

    return _smallest(named, other_loss, 1.0) - other_loss if named(1.0) else None


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
        strata = _strata(answers)
        beside = np.bincount(
            label[part & _holds_several(strata, label, part)], minlength=len(found)
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
            stratum=_codes(strata[part]),
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
        scored, draws = _permutations(self.stratum, self.value, resamples, seed)
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
    adjusted = holm(p) if correction == "holm" else _benjamini_hochberg(p)
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


def _benjamini_hochberg(p_values: Sequence[float]) -> tuple[float, ...]:
    from scipy.stats import false_discovery_control

    return tuple(false_discovery_control(p_values).tolist()) if len(p_values) else ()


def _permutations(
    stratum: NDArray[np.intp], value: NDArray[np.float64], resamples: int, seed: int
) -> tuple[NDArray[np.intp], Iterator[NDArray[np.intp]]]:
    """Answers with a score, and for each of them the answer whose label it is given.

    Uniform over permutations within strata. What has no score adds nothing to any statistic, so
    only the first steps of each Fisher-Yates shuffle are taken, those of scored answers.
    Returns indices, (scored) and an iterator of (some permutations, scored).
    """
    order = np.lexsort((value == 0, stratum))
    sizes = np.bincount(stratum)
    starts = np.cumsum(sizes) - sizes
    scored = np.bincount(stratum, value != 0)
    columns = np.flatnonzero(value[order])

    def draws() -> Iterator[NDArray[np.intp]]:
        rng, done = np.random.default_rng(seed), 0
        at_once = max(1, _AT_ONCE // max(len(order), 1))
        while done < resamples:
            shape = min(at_once, resamples - done), 1
            done += shape[0]
            state = np.tile(order, shape)
            for step in range(int(scored.max(initial=0))):
                going = np.flatnonzero(scored > step)
                here = starts[going] + step
                there = here + rng.integers(sizes[going] - step, size=(shape[0], len(going)))
                picked = np.take_along_axis(state, there, 1)
                np.put_along_axis(state, there, state[:, here], 1)
                state[:, here] = picked
            yield state[:, columns]

    return order[columns], draws()


_AT_ONCE = 1 << 20
"""Elements of a working array: what fits a processor's cache is quickest."""


def _sign_flip_p(values: NDArray[np.float64], resamples: int, seed: int) -> float:
    """Two-sided p that one value per haystack is as likely on either side of 0."""
    rng, reached = np.random.default_rng(seed), 0
    observed = abs(float(values.sum())) * (1 - 1e-9)
    at_once = max(1, _AT_ONCE // max(len(values), 1))
    for done in range(0, resamples, at_once):
        signs = rng.integers(0, 2, (min(at_once, resamples - done), len(values))) * 2 - 1
        reached += int((np.abs(signs @ values) >= observed).sum())
    return (reached + 1) / (resamples + 1)


def _strata(answers: Answers) -> NDArray[np.intp]:
    """Answers of one haystack, place and length carry one number."""
    code = _codes(answers.haystack)
    for column in (answers.place, answers.context_tokens):
        own = _codes(column)
        code = code * (own.max(initial=0) + 1) + own
    return _codes(code)


def _holds_several(
    stratum: NDArray[np.intp], label: NDArray[np.intp], part: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Whether each answer's stratum holds more than one group among those that take part."""
    high = np.zeros(stratum.max(initial=-1) + 1, np.intp)
    low = np.full_like(high, label.max(initial=0) + 1)
    np.maximum.at(high, stratum[part], label[part])
    np.minimum.at(low, stratum[part], label[part])
    return (low < high)[stratum]


def _depth_names(answers: Answers, edges: Sequence[float]) -> NDArray[np.str_]:
    bounds = (0.0, *edges, 1.0)
    if any(a >= b for a, b in pairwise(bounds)):
        raise UsageError(f"depth edges {tuple(edges)} do not rise within 0 to 1")
    names = np.array([f"{a:g}-{b:g}" for a, b in pairwise(bounds)])
    return names[np.searchsorted(edges, answers.depth, side="right")]


def _group_means(code: NDArray[np.intp], values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.bincount(code, values) / np.bincount(code)


def _codes(column: NDArray[Any]) -> NDArray[np.intp]:
    return np.unique(column, return_inverse=True)[1].astype(np.intp)


def _normal(probability: float) -> float:
    return NormalDist().inv_cdf(probability)
