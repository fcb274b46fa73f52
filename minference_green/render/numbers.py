"""Figures as text: no more digits than the interval justifies, and ``n/a`` for null."""

import math

from minference_green.stats import Estimate

ABSENT = "n/a"

METER_ERROR = 1e-3
"""No energy meter is truer than this, however well the blocks agree."""

BARE_DIGITS = 3
"""Significant digits of a figure without an interval."""


def figure(estimate: Estimate) -> str:
    """The value, cut where its interval makes further digits meaningless.

    The last digit shown stands where the half-width of the interval has its first; two
    significant digits are shown however wide it is, so that no figure reads as zero.
    """
    if estimate.value is None:
        return ABSENT
    if estimate.low is None or estimate.high is None:
        return significant(estimate.value, BARE_DIGITS)
    half = (estimate.high - estimate.low) / 2
    return _rounded(estimate.value, max(half, abs(estimate.value) * METER_ERROR))


def percent(estimate: Estimate) -> str:
    """A fraction with its interval in per cent: ``38 % [36, 40]``."""
    if estimate.value is None:
        return ABSENT
    if estimate.low is None or estimate.high is None:
        return f"{_plain(100 * estimate.value, 0)} %"
    decimals = 1 if 100 * (estimate.high - estimate.low) < 2 else 0
    value, low, high = (
        _plain(100 * end, decimals) for end in (estimate.value, estimate.low, estimate.high)
    )
    return f"{value} % [{low}, {high}]"


def closure(estimate: Estimate) -> str:
    """A small relative difference with its sign: ``+0.31 %``."""
    return ABSENT if estimate.value is None else f"{100 * estimate.value:+.2f} %"


def factor(estimate: Estimate) -> str:
    """A speed-up with its interval: ``1.61x [1.58, 1.64]``."""
    if estimate.value is None:
        return ABSENT
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:.2f}x"
    return f"{estimate.value:.2f}x [{estimate.low:.2f}, {estimate.high:.2f}]"


def significant(value: float | None, digits: int) -> str:
    """A number with so many significant digits, never in exponent form."""
    if value is None:
        return ABSENT
    if value == 0:
        return "0"
    return _plain(value, digits - 1 - math.floor(math.log10(abs(value))))


def fraction(value: float | None) -> str:
    """A share of one, with two digits of what it lacks: ``0.71``, ``0.99960``."""
    if value is None:
        return ABSENT
    missing = abs(1 - value)
    return _plain(value, 2 if missing >= 0.1 else min(6, 1 - math.floor(math.log10(missing or 1))))


def _rounded(value: float, half_width: float) -> str:
    if value == 0 or half_width == 0:
        return significant(value, BARE_DIGITS)
    at_least = 1 - math.floor(math.log10(abs(value)))
    return _plain(value, max(-math.floor(math.log10(half_width)), at_least))


def _plain(value: float, decimals: int) -> str:
    """Rounded at a decimal place, which may be left of the point; never ``-0``."""
    rounded = round(value, decimals) + 0.0
    return f"{rounded:.{max(decimals, 0)}f}"
