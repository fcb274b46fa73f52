"""How often an audit's statistics are wrong, and what they find, on simulated audits.

Run with ``python benchmarks/audit_power.py [--sims N]``; no GPU is needed. A simulated audit
asks 28 questions of each haystack, two of each of 14 kinds, at seven depths by Latin square.
The dense model gets 97 % right. The sparse prefill drops an answer with the chance of its
haystack, which is drawn from a beta distribution with a stated correlation within haystacks;
one kind or a range of depths may be dropped more often than the rest, and rounding may flip
answers both ways.
"""

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from minference_green.answers import Answers, Score
from minference_green.counts import ALPHA
from minference_green.detectable import planned_detectable
from minference_green.groups import by_depth, by_kind, depth_trend
from minference_green.retention import (
    Finding,
    judge,
)

KINDS = (
    "code",
    "date",
    "hex",
    "measure",
    "negated",
    "non-latin",
    "number",
    "person",
    "place",
    "pseudo-word",
    "quotation",
    "table",
    "unit",
    "url",
)
DEPTHS = np.array([0.02, 0.1, 0.25, 0.5, 0.75, 0.9, 0.98])
PER_KIND = 2


@dataclass(frozen=True)
class Truth:
    """What is true of a simulated method; shares of answers."""

    loss: float = 0.02
    """Chance that any answer the dense model gets right is dropped."""
    correlation: float = 0.1
    """Of drops within a haystack."""
    extra: dict[str, float] = field(default_factory=dict)
    """More that is dropped of some kinds."""
    extra_depths: dict[float, float] = field(default_factory=dict)
    """More that is dropped at some depths."""
    dense_right: float = 0.97
    half_known: dict[str, float] = field(default_factory=dict)
    """Kinds the dense model gets right less often."""
    rounding: bool = False
    """Sparse answers are right as often as dense ones, independently of them: noise alone."""


def simulated_audit(rng: np.random.Generator, haystacks: int, truth: Truth) -> Answers:
    """Answers of one audit of ``haystacks`` times 28 questions."""
    per_haystack = PER_KIND * len(KINDS)
    shape = haystacks, per_haystack
    kind = np.tile(np.arange(len(KINDS)), PER_KIND)
    # Each kind takes each depth equally often over seven haystacks.
    turn = kind + 3 * np.repeat(np.arange(PER_KIND), len(KINDS))
    depth = DEPTHS[(np.arange(haystacks)[:, None] + turn) % len(DEPTHS)]
    names = np.array(KINDS)[kind]
    known = np.array([truth.half_known.get(k, truth.dense_right) for k in names])
    dense_right = rng.random(shape) < known
    if truth.rounding:
        sparse_right = rng.random(shape) < known
    else:
        chance = np.full((haystacks, 1), truth.loss)
        if truth.correlation and truth.loss:
            rest = (1 - truth.correlation) / truth.correlation
            chance = rng.beta(truth.loss * rest, (1 - truth.loss) * rest, (haystacks, 1))
        extra = np.array([truth.extra.get(k, 0.0) for k in names]) + sum(
            (share * (depth == d) for d, share in truth.extra_depths.items()), np.zeros(shape)
        )
        sparse_right = dense_right & (rng.random(shape) >= chance + (1 - chance) * extra)
    nothing = np.full(haystacks * per_haystack, np.nan)
    return Answers(
        haystack=np.repeat(np.arange(haystacks), per_haystack),
        kind=np.tile(names, haystacks),
        depth=depth.ravel(),
        place=np.full(haystacks * per_haystack, "after"),
        context_tokens=np.full(haystacks * per_haystack, 131072),
        dense_right=dense_right.ravel(),
        sparse_right=sparse_right.ravel(),
        log_probability_change=nothing,
        kl_above_floor_nats=nothing,
    )


def simulated_audits(
    sims: int, haystacks: int, truth: Truth, seed: int = 1
) -> Iterator[tuple[int, Answers]]:
    """Numbered audits; the same for the same arguments."""
    rng = np.random.default_rng(seed)
    return ((i, simulated_audit(rng, haystacks, truth)) for i in range(sims))


@dataclass(frozen=True)
class Said:
    """What a test of groups said over all simulations, as shares of them."""

    differ: float
    """That groups differ at all."""
    any_named: float
    named: dict[str, float]

    def falsely(self, true: str) -> float:
        """How many groups beside the true one were named, per simulation."""
        return sum(share for name, share in self.named.items() if name != true)


def kinds_said(
    sims: int,
    haystacks: int,
    truth: Truth,
    *,
    score: Score = "loss",
    resamples: int = 499,
    seed: int = 1,
) -> Said:
    """What the test of kinds says."""
    differ, any_named, named = 0, 0, Counter[str]()
    for i, audit in simulated_audits(sims, haystacks, truth, seed):
        said = by_kind(audit, score, resamples=resamples, seed=i)
        differ += said.p is not None and said.p <= ALPHA
        any_named += bool(said.named)
        named.update(said.named)
    return Said(differ / sims, any_named / sims, {name: n / sims for name, n in named.items()})


def depths_said(
    sims: int, haystacks: int, truth: Truth, *, resamples: int = 499, seed: int = 1
) -> Said:
    """What the test of depths says; ``differ`` is that of a trend."""
    trend, any_named, named = 0, 0, Counter[str]()
    for i, audit in simulated_audits(sims, haystacks, truth, seed):
        p = depth_trend(audit, resamples=resamples, seed=i).p
        trend += p is not None and p <= ALPHA
        said = by_depth(audit, resamples=resamples, seed=i)
        any_named += bool(said.named)
        named.update(said.named)
    return Said(trend / sims, any_named / sims, {name: n / sims for name, n in named.items()})


def verdicts(
    sims: int,
    haystacks: int,
    truth: Truth,
    *,
    margin: float = 0.02,
    resamples: int = 999,
    seed: int = 1,
) -> dict[Finding, float]:
    """How often each finding is the verdict on the overall loss."""
    said = Counter(
        judge(audit, margin, resamples=resamples, seed=i).finding
        for i, audit in simulated_audits(sims, haystacks, truth, seed)
    )
    return {finding: said[finding] / sims for finding in Finding}


SIZES = (24, 120)
CLUSTERED = (Truth(0.02, 0.1), Truth(0.05, 0.3), Truth(0.3, 0.3))


def _print_false_alarms(sims: int) -> None:
    print("\nNo kind is treated worse: how often the test of kinds says otherwise")
    print(f"{'haystacks':>9}  {'loss':>5}  {'correlation':>11}  {'differ':>7}  {'named':>7}")
    for haystacks in SIZES:
        for truth in CLUSTERED:
            said = kinds_said(sims, haystacks, truth)
            print(
                f"{haystacks:9d}  {truth.loss:5.1%}  {truth.correlation:11.1f}  "
                f"{said.differ:7.1%}  {said.any_named:7.1%}"
            )
    print("\nNoise alone, on two kinds that the dense model half knows: a kind is named")
    rounding = Truth(rounding=True, half_known={"hex": 0.6, "url": 0.75})
    for haystacks in SIZES:
        loss, net = (kinds_said(sims, haystacks, rounding, score=s) for s in ("loss", "net"))
        print(f"{haystacks:9d}  by loss {loss.any_named:6.1%}  by net {net.any_named:6.1%}")


def _print_kind_power(sims: int) -> None:
    print("\nOne kind loses more: how often it is named, around what is said to be detectable")
    print(f"{'haystacks':>9}  {'loss':>5}  {'correlation':>11}  {'more':>6}  named  others/audit")
    for haystacks in SIZES:
        for truth in CLUSTERED:
            planned = planned_detectable(
                KINDS, haystacks, other_loss=truth.loss, correlation=truth.correlation
            ).one_kind["hex"]
            for share in (0.0,) if planned is None else (0.85 * planned, planned, 1.15 * planned):
                worse = replace(
                    truth, extra={"hex": min(share / (1 - truth.loss), 1)}, dense_right=1.0
                )
                said = kinds_said(sims, haystacks, worse, resamples=1999)
                print(
                    f"{haystacks:9d}  {truth.loss:5.1%}  {truth.correlation:11.1f}  {share:6.1%}  "
                    f"{said.named.get('hex', 0):5.1%}  {said.falsely('hex'):.3f}"
                )


def _print_depths(sims: int) -> None:
    print("\nDepths: a trend is seen, any range named, the middle named")
    for haystacks in SIZES:
        for share in (0.0, 0.1, 0.3):
            said = depths_said(sims, haystacks, Truth(extra_depths={0.5: share}))
            print(
                f"{haystacks:9d}  middle loses {share:3.0%} more  {said.differ:6.1%}  "
                f"{said.any_named:6.1%}  {said.named.get('0.4-0.6', 0):6.1%}"
            )


def _print_verdicts(sims: int, margin: float) -> None:
    print(f"\nVerdict on the overall loss at a margin of {margin:.0%}")
    print(f"{'haystacks':>9}  {'correlation':>11}  {'true loss':>9}  ", end="")
    print("  ".join(f"{finding:>28}" for finding in Finding))
    for haystacks in SIZES:
        for correlation in (0.0, 0.1, 0.3):
            planned = planned_detectable(KINDS, haystacks, margin=margin, correlation=correlation)
            for loss in (margin / 4, margin, 0.85 * planned.loss, planned.loss):
                said = verdicts(
                    sims, haystacks, Truth(loss, correlation, dense_right=1.0), margin=margin
                )
                print(f"{haystacks:9d}  {correlation:11.1f}  {loss:9.2%}  ", end="")
                print("  ".join(f"{said[finding]:28.1%}" for finding in Finding))


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sims", type=int, default=400, help="simulated audits per line")
    sims = parser.parse_args(arguments).sims
    print(f"{sims} simulated audits per line, 28 questions per haystack")
    _print_false_alarms(sims)
    _print_kind_power(sims)
    _print_depths(sims)
    _print_verdicts(sims, margin=0.02)


if __name__ == "__main__":
    main()
