"""What counts of answers show: tests, sizes of effects, bounds, corrections for many tests."""

import math
from collections.abc import Sequence
from statistics import NormalDist

from minference_green.errors import UsageError

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


def benjamini_hochberg(p_values: Sequence[float]) -> tuple[float, ...]:
    """Adjusted p in the order given: 5 % of those found may be false (1995)."""
    from scipy.stats import false_discovery_control

    return tuple(false_discovery_control(p_values).tolist()) if len(p_values) else ()


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
    z_alpha, z_power = normal_quantile(1 - ALPHA / 2 / tests), normal_quantile(POWER)
    root = z_alpha * math.sqrt(discordant) + z_power * math.sqrt(discordant - net_loss**2)
    design_effect = 1 + (items_per_haystack - 1) * correlation
    return math.ceil(design_effect * (root / net_loss) ** 2)


def normal_quantile(probability: float) -> float:
    """Of the standard normal distribution."""
    return NormalDist().inv_cdf(probability)
