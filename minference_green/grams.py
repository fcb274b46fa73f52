"""Joules and seconds to grams of CO2e: the arithmetic, apart from where factors come from."""

from minference_green.results import CarbonTerms

JOULES_PER_KWH = 3.6e6


def operational_grams(joules: float, terms: CarbonTerms) -> float:
    """Grams of CO2e emitted to supply ``joules``: ``E / 3.6e6 * PUE * I`` (ISO/IEC 21031, O)."""
    return joules / JOULES_PER_KWH * terms.pue * terms.factor.g_per_kwh


def embodied_grams(seconds: float, terms: CarbonTerms) -> float:
    """Grams of CO2e of making the hardware, by reserved ``seconds`` (ISO/IEC 21031, M)."""
    return seconds * terms.embodied_g_per_second
