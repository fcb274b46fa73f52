"""Whether what is lost depends on its kind or its depth, by permuting them within haystacks."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from minference_green.answers import Answers, Score, scores, strata_of
from minference_green.counts import ALPHA, holm, odds_ratio
from minference_green.detectable import TESTABLE_ITEMS
from minference_green.errors import UsageError
from minference_green.permutation import (
    RESAMPLES,
    codes,
    group_means,
    holds_several,
    permutations,
)

DEPTH_EDGES = (0.05, 0.2, 0.4, 0.6, 0.8, 0.95)
"""Between the depths an audit asks at: .02 .1 .25 .5 .75 .9 .98."""


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
    """Of all groups tested, by Holm."""
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
    return _group_test(answers, answers.kind, score, resamples, seed)


def by_depth(
    answers: Answers,
    score: Score = "loss",
    *,
    edges: Sequence[float] = DEPTH_EDGES,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> GroupTest:
    """The same of depths, between ``edges``: a method may drop a range of them."""
    return _group_test(answers, _depth_names(answers, edges), score, resamples, seed)


def depth_trend(
    answers: Answers,
    score: Score = "loss",
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Trend:
    """Linear contrast on depth, with depths permuted as kinds are in ``by_kind``."""
    value, eligible = scores(answers, score)
    part, value = answers.where(eligible), value[eligible]
    stratum = strata_of(part)
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


@dataclass(frozen=True, eq=False)
class Groups:
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
    def of(cls, answers: Answers, names: NDArray[np.str_], score: Score) -> "Groups":
        """Those named per answer in ``names``, of the answers that ``score`` counts."""
        found, label = np.unique(names, return_inverse=True)
        right = np.bincount(label[answers.dense_right], minlength=len(found))
        value, eligible = scores(answers, score)
        part = eligible & (right >= TESTABLE_ITEMS)[label]
        stratum = strata_of(answers)
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
    resamples: int,
    seed: int,
) -> GroupTest:
    groups = Groups.of(answers, names, score)
    worse = groups.worse(groups.sums, groups.moved)
    between = float((groups.sums**2 / groups.sizes).sum())
    reached, differ = np.zeros(len(groups.names)), 0
    for sums, moved in groups.permuted(resamples, seed):
        reached += (groups.worse(sums, moved) >= worse - 1e-9).sum(0)
        differ += int(((sums**2 / groups.sizes).sum(1) >= between * (1 - 1e-9)).sum())
    p = ((reached + 1) / (resamples + 1)).tolist()
    adjusted = holm(p)
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


def _depth_names(answers: Answers, edges: Sequence[float]) -> NDArray[np.str_]:
    bounds = (0.0, *edges, 1.0)
    if any(a >= b for a, b in pairwise(bounds)):
        raise UsageError(f"depth edges {tuple(edges)} do not rise within 0 to 1")
    names = np.array([f"{a:g}-{b:g}" for a, b in pairwise(bounds)])
    return names[np.searchsorted(edges, answers.depth, side="right")]
