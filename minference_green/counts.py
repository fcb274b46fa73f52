"""What counts of answers show: tests, sizes of effects, bounds, corrections for many tests."""

from collections.abc import Sequence
from statistics import NormalDist

ALPHA = 0.05
"""Highest rate of false findings of a test, and the tail beyond either end of an interval."""

POWER = 0.80
"""Share of runs in which an effect called detectable is found."""


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


def clopper_pearson(share: float, items: float) -> tuple[float, float]:
    """Bounds of a share of so many independent items, each one-sided at ``ALPHA``."""
    from scipy.special import betaincinv

    hits = share * items
    low = float(betaincinv(hits, items - hits + 1, ALPHA)) if share > 0 else 0.0
    high = float(betaincinv(hits + 1, items - hits, 1 - ALPHA)) if share < 1 else 1.0
    return low, high


def share_above(margin: float, effective: float) -> float:
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


def normal_quantile(probability: float) -> float:
    """Of the standard normal distribution."""
    return NormalDist().inv_cdf(probability)
