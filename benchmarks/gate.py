"""Error rates of the regression gate and of naive rules, on simulated runs with known truth.

Run with ``python benchmarks/gate.py [--sims N]``; no GPU is needed. Each simulated block has
four windows in ABBA order, the starting arm changing from block to block. A window has 1.2 %
of noise; one in 20 is an outlier that costs 2 to 10 % more; the first is cold and costs 2 %
less; 1 % of drift runs through the block; 2 % separate one run from another and hit both arms.
Where it is said, so much more separates one block from another, and hits both arms too.
"""

import argparse
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from minference_green.verdict import LOOKS, Arms, Outcome, Ruling, rule

MARGIN = 0.05
UNCHANGED = 0.95  # share of runs with nothing changed that ought to pass

# Position of an ABBA block's windows, as masks of the candidate's; even and odd blocks.
CANDIDATE = np.array([[False, True, True, False], [True, False, False, True]])


@dataclass(frozen=True)
class Noise:
    """What disturbs a simulated run, as fractions of a window's joules."""

    window: float = 0.012
    outlier_share: float = 0.05
    outlier_low: float = 0.02
    outlier_high: float = 0.10
    drift: float = 0.01
    cold: float = 0.02
    between_runs: float = 0.02
    between_blocks: float = 0.0


def simulated_run(
    rng: np.random.Generator,
    blocks: int,
    *,
    candidate_change: float = 0.0,
    reference_change: float = 0.0,
    noise: Noise,
) -> Arms:
    """Block means of both arms; changes are fractions of joules that truly happened."""
    outlier = rng.random((blocks, 4)) < noise.outlier_share
    logs = (
        rng.normal(0, noise.between_runs)
        + (rng.normal(0, noise.between_blocks, (blocks, 1)) if noise.between_blocks else 0.0)
        + rng.normal(0, noise.window, (blocks, 4))
        + outlier * np.log1p(rng.uniform(noise.outlier_low, noise.outlier_high, (blocks, 4)))
        + rng.normal(0, noise.drift, (blocks, 1)) * np.linspace(-0.5, 0.5, 4)
    )
    logs[:, 0] += math.log1p(-noise.cold)
    mask = CANDIDATE[np.arange(blocks) % 2]
    candidate = logs[mask].reshape(blocks, 2).mean(axis=1) + math.log1p(candidate_change)
    reference = logs[~mask].reshape(blocks, 2).mean(axis=1) + math.log1p(reference_change)
    return Arms(tuple(candidate.tolist()), tuple(reference.tolist()))


def first(arms: Arms, blocks: int) -> Arms:
    """The run as it stands at an early look."""
    return Arms(arms.candidate[:blocks], arms.reference[:blocks])


def judged_in_looks(now: Arms, stored: Sequence[Arms], *, criteria: int = 1) -> tuple[Ruling, int]:
    """The ruling at the first look that decides, or at the last, and its number of blocks."""
    for look in LOOKS:
        ruling = rule(first(now, look), stored, margin=MARGIN, criteria=criteria)
        if ruling.outcome is not Outcome.INCONCLUSIVE:
            break
    return ruling, look


def simulate(
    sims: int,
    *,
    candidate_change: float = 0.0,
    reference_change: float = 0.0,
    stored_runs: int = 1,
    stored_blocks: int = 10,
    noise: Noise | None = None,
    seed: int = 1,
) -> Counter[tuple[str, str, int]]:
    """How often the gate said what, and on how many blocks: (outcome, reason, blocks)."""
    noise, rng, said = noise or Noise(), np.random.default_rng(seed), Counter()
    for _ in range(sims):
        stored = [simulated_run(rng, stored_blocks, noise=noise) for _ in range(stored_runs)]
        now = simulated_run(
            rng,
            LOOKS[-1],
            candidate_change=candidate_change,
            reference_change=reference_change,
            noise=noise,
        )
        ruling, look = judged_in_looks(now, stored)
        said[ruling.outcome.value, ruling.reason, look] += 1
    return said


def share(said: Counter[tuple[str, str, int]], outcome: Outcome, by_blocks: int = 10**9) -> float:
    """Share of simulations that ended with ``outcome`` on at most ``by_blocks`` blocks."""
    hits = sum(n for (what, _, look), n in said.items() if what == outcome and look <= by_blocks)
    return hits / said.total()


def least_wrong_passes(
    change: float, *, between_runs: float, stored_runs: int = 1, unchanged: float = UNCHANGED
) -> float:
    """Share of runs with both arms changed that any rule passes which passes ``unchanged`` others.

    Of rules that treat dearer and cheaper alike. The best of them knows how far runs scatter and
    measures each without error; what it sees of both arms is then normal around ``change``, with
    the scatter of a run and of the mean of the stored ones, and it passes what is near nought.
    """
    spread = between_runs * math.sqrt(1 + 1 / stored_runs)
    if not spread:
        return 0.0
    width, shift = stats.norm.ppf((1 + unchanged) / 2), math.log1p(change) / spread
    return float(stats.norm.cdf(width - shift) - stats.norm.cdf(-width - shift))


def naive_alarms(sims: int, change: float, *, blocks: int = 10, seed: int = 1) -> dict[str, float]:
    """How often rules that look at the sparse arm's joules alone raise an alarm."""
    rng, noise = np.random.default_rng(seed), Noise()
    alarms = Counter[str]()
    for _ in range(sims):
        then = np.array(simulated_run(rng, blocks, noise=noise).candidate)
        now = np.array(simulated_run(rng, blocks, candidate_change=change, noise=noise).candidate)
        worse = now.mean() > then.mean()
        welch = stats.ttest_ind(now, then, equal_var=False)
        overlap = (
            stats.ttest_1samp(now, 0).confidence_interval(0.95).low
            <= stats.ttest_1samp(then, 0).confidence_interval(0.95).high
        )
        alarms["Welch on a stored run, p < 0.05"] += bool(worse and welch.pvalue < 0.05)
        alarms["Mann-Whitney on a stored run, p < 0.05"] += bool(
            worse and stats.mannwhitneyu(now, then).pvalue < 0.05
        )
        alarms["95 % intervals do not overlap"] += bool(not overlap)
    return {name: count / sims for name, count in alarms.items()}


def _print_gate(title: str, changes: Sequence[float], sims: int, **options: object) -> None:
    print(f"\n{title}")
    print(f"{'true change':>12}  {'FAIL':>7}  {'by 10':>7}  {'PASS':>7}  {'INCONCL.':>8}")
    for change in changes:
        said = simulate(sims, candidate_change=change, **options)
        figures = (
            share(said, Outcome.FAIL),
            share(said, Outcome.FAIL, by_blocks=10),
            share(said, Outcome.PASS),
        )
        cells = "  ".join(f"{100 * f:6.1f}%" for f in figures)
        print(f"{100 * change:+11.1f}%  {cells}  {100 * share(said, Outcome.INCONCLUSIVE):7.1f}%")


def _print_outcomes(title: str, said: Counter[tuple[str, str, int]]) -> None:
    print(f"\n{title}")
    for outcome in Outcome:
        print(f"{outcome.upper():>13}  {100 * share(said, outcome):5.1f}%")


BOTH_ARMS = {
    "calm": (1, Noise(between_runs=0.0)),
    "blocks 3 %": (1, Noise(between_runs=0.0, between_blocks=0.03)),
    "blocks 6 %": (1, Noise(between_runs=0.0, between_blocks=0.06)),
    "runs 1 %": (1, Noise(between_runs=0.01)),
    "runs 2 %": (1, Noise(between_runs=0.02)),
    "2 %, five": (5, Noise(between_runs=0.02)),
}
"""Stored runs and noise; what separates blocks or runs hits both arms."""


def _print_both_arms(sims: int) -> None:
    print("\nPASS where both arms changed alike, by what separates blocks or runs; one stored run")
    print("of 10 blocks, five in the last column. In brackets the least that any rule passes which")
    print(f"passes {UNCHANGED:.0%} with nothing changed, where runs scatter.")
    room = {name: 8 if noise.between_runs else 0 for name, (_, noise) in BOTH_ARMS.items()}
    print(f"{'both arms':>12}" + "".join(f"{name:>12}{'':{room[name]}}" for name in BOTH_ARMS))
    for change in (0.0, -0.06, 0.06, -0.08, 0.08, -0.10, 0.10, -0.12, 0.12, -0.20, 0.20):
        cells = []
        for name, (stored, noise) in BOTH_ARMS.items():
            both = {"candidate_change": change, "reference_change": change}
            said = simulate(sims, **both, stored_runs=stored, noise=noise)
            bound = ""
            if noise.between_runs and change:
                least = least_wrong_passes(
                    change, between_runs=noise.between_runs, stored_runs=stored
                )
                bound = f"({100 * least:.1f})"
            cells.append(f"{100 * share(said, Outcome.PASS):11.1f}%{bound:>{room[name]}}")
        print(f"{100 * change:+11.1f}%" + "".join(cells))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sims", type=int, default=2000, help="simulations per line")
    sims = parser.parse_args().sims
    print(f"{sims} simulated experiments per line, margin {MARGIN:.0%}, looks at {LOOKS} blocks")
    changes = (-0.10, 0.0, 0.025, 0.05, 0.075, 0.10, 0.20)
    _print_gate("This gate, one stored run of 10 blocks", changes, sims)
    _print_gate("The same, one stored run of 6 blocks", changes, sims, stored_blocks=6)
    _print_gate("The same, five stored runs of 10 blocks", changes, sims, stored_runs=5)
    harsh = Noise(outlier_low=0.05, outlier_high=0.15)
    _print_gate("One stored run of 10 blocks, outliers of 5 to 15 %", changes, sims, noise=harsh)
    steady = Noise(between_runs=0.01)
    _print_gate("One stored run of 10 blocks, 1 % between runs", changes, sims, noise=steady)
    _print_outcomes(
        "The reference arm became 10 % cheaper, the candidate stayed as it was",
        simulate(sims, reference_change=-0.10),
    )
    _print_both_arms(sims)
    print("\nNaive rules on the sparse arm's joules, 10 blocks each: share of alarms")
    none, tenth = naive_alarms(sims, 0.0), naive_alarms(sims, 0.10)
    print(f"{'':40}  no change  +10 %")
    for name in none:
        print(f"{name:40}  {100 * none[name]:8.1f}%  {100 * tenth[name]:5.1f}%")


if __name__ == "__main__":
    main()
