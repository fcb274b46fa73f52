"""Smallest effects that an audit of a given size finds, before or after it was made."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from minference_green.clustered import ASSUMED_CORRELATION, BOOTSTRAP_CLUSTERS
from minference_green.counts import ALPHA, POWER, clopper_pearson, share_above
from minference_green.errors import UsageError

DECIDING_HAYSTACKS = 5
"""Fewer haystacks decide nothing: how alike their answers are is not known."""

TESTABLE_ITEMS = 5
"""A group needs as many answers that the dense model gave right before it is tested."""


@dataclass(frozen=True)
class Detectable:
    """Smallest effects that an audit of this size finds in 80 % of cases."""

    loss: float | None
    """Share of answers whose loss is shown to be beyond the margin; null if no share is enough."""
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
    return smallest_effects(
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


def smallest_effects(
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
    both_ways: bool = False,
) -> Detectable:
    """What so many answers find, ``sizes`` of them of each kind.

    ``alike`` are those that share an answer's haystack, on average over answers; ``stated`` is
    the correlation that exact bounds reckon with at least; ``both_ways`` whether the verdict is
    on lost less gained, whose exact bounds allow for gains that were not seen. Raises
    ``UsageError`` for a margin outside (0, 1).
    """
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
        loss=_detectable_beyond(margin, items, haystacks, alike, correlation, stated, both_ways),
        margin=margin,
        one_kind={kind: in_one.get(n) for kind, n in sizes.items()},
        other_loss=other_loss,
        correlation=correlation,
        correlation_is=correlation_is,
        haystacks=haystacks,
        items=items,
    )


def _detectable_beyond(
    margin: float,
    items: int,
    haystacks: int,
    alike: float,
    correlation: float,
    stated: float,
    both_ways: bool,
) -> float | None:
    """Share whose lower bound is above ``margin`` in the cases wanted.

    Either Clopper-Pearson bounds find it, which reckon with ``stated``; or enough haystacks lose
    something for the bootstrap, which sees the correlation there is.
    """
    from scipy.special import betaln
    from scipy.stats import binom

    if haystacks < DECIDING_HAYSTACKS:
        return None

    def effective(correlation: float) -> float:
        return items / (1 + (alike - 1) * correlation)

    def bootstrapped(share: float) -> bool:
        if correlation > 0:
            rest = (1 - correlation) / correlation
            a, b = share * rest, (1 - share) * rest
            spared = math.exp(betaln(a, b + alike) - betaln(a, b))
        else:
            spared = (1 - share) ** alike
        return float(binom.sf(BOOTSTRAP_CLUSTERS - 1, haystacks, 1 - spared)) >= POWER

    exactly = effective(max(correlation, stated))
    unseen = clopper_pearson(0.0, exactly)[1] if both_ways else 0.0
    if clopper_pearson(1.0, exactly)[0] <= margin + unseen:
        return None
    exact = share_above(margin + unseen, exactly)
    if not bootstrapped(exact):
        return exact
    resampled = share_above(margin, effective(correlation))
    return min(exact, max(resampled, _smallest(bootstrapped, 0.0, exact)))


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
