"""What a year of a workload would cost, from the figures of a run."""

from dataclasses import dataclass

from minference_green.errors import UsageError
from minference_green.grams import JOULES_PER_KWH
from minference_green.results import CarbonTerms, Run
from minference_green.stats import Cell, Estimate, cells
from minference_green.workload import format_length

DAYS_PER_YEAR = 365


@dataclass(frozen=True)
class Projection:
    """One arm's year, at the cost per token that the run measured at one context length."""

    context_length: int
    method: str
    kwh: Estimate
    """At the meter of the data centre: PUE is in it."""
    operational_kg: Estimate
    """Its interval holds the factor's own uncertainty beside that of the joules."""
    embodied_kg: Estimate
    """By the seconds the hardware is held; null where no rate is known."""
    obtained: str


def project(run: Run, prompts_per_day: float, prompt_tokens: int) -> tuple[Projection, ...]:
    """KWh and kg CO2e per year of so many prompts of so many tokens a day, for every arm.

    Prompts are taken to cost per token what the run measured at ``prompt_tokens``: a cost per
    token at one length says nothing about another. Raises ``UsageError`` for a length the run
    has not measured, and for counts that are not positive.
    """
    if not prompts_per_day > 0 or prompts_per_day == float("inf"):
        raise UsageError(f"--prompts-per-day {prompts_per_day:g} must be more than 0")
    lengths = run.header.workload.context_lengths
    if prompt_tokens not in lengths:
        raise UsageError(
            f"the run measured {', '.join(map(format_length, lengths))} tokens and not "
            f"{prompt_tokens}; cost per token differs with length, so measure that length: "
            f"green-bench run --context {prompt_tokens}"
        )
    mtok = prompts_per_day * DAYS_PER_YEAR * prompt_tokens / 1e6
    return tuple(
        _projection(cell, run.header.carbon, mtok)
        for cell in cells(run)
        if cell.context_length == prompt_tokens
    )


def _projection(cell: Cell, carbon: CarbonTerms, mtok: float) -> Projection:
    kwh = _scaled(cell.joules_per_mtok, mtok * carbon.pue / JOULES_PER_KWH)
    kg_per_kwh = carbon.factor.g_per_kwh / 1000
    factor = carbon.factor.relative_uncertainty
    seconds = _scaled(cell.seconds_per_mtok, mtok * carbon.embodied_g_per_second / 1000)
    if carbon.embodied_g_per_second == 0:
        why = carbon.embodied_source or "no rate of embodied emissions in this run"
        seconds = Estimate(None, None, None, 0, why)
    return Projection(
        context_length=cell.context_length,
        method=cell.method,
        kwh=kwh,
        operational_kg=_widened(_scaled(kwh, kg_per_kwh), factor),
        embodied_kg=seconds,
        obtained=cell.obtained,
    )


def _scaled(estimate: Estimate, by: float) -> Estimate:
    def times(value: float | None) -> float | None:
        return None if value is None else value * by

    return Estimate(
        times(estimate.value),
        times(estimate.low),
        times(estimate.high),
        estimate.blocks,
        estimate.reason,
    )


def _widened(estimate: Estimate, relative: float) -> Estimate:
    """The ends moved out by a factor's uncertainty, as a bound and not as a deviation."""
    if estimate.low is None or estimate.high is None:
        return estimate
    return Estimate(
        estimate.value,
        estimate.low * (1 - relative),
        estimate.high * (1 + relative),
        estimate.blocks,
        estimate.reason,
    )
