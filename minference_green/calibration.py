"""The noise floor of a machine, from dense measured against dense.

The run of a calibration is stored as the baseline ``calibration``. What it shows is how far
two equal arms come apart from block to block, and so the smallest margin a gate can hold.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import stdev

from minference_green import baseline
from minference_green.comparable import differences
from minference_green.errors import UsageError
from minference_green.results import Run
from minference_green.stats import (
    Comparison,
    Quantity,
    comparisons,
    detectable_margin,
    method_names,
    paired_logs,
)
from minference_green.verdict import LOOKS, decision_level

NAME = "calibration"

_MACHINE = ("device", "memory", "mig_profile", "power_limit", "energy")
"""Hard keys on which a calibration must be of the same ground; its workload may be another."""

_QUANTITIES: dict[str, Quantity] = {"energy_ratio": "joules", "latency": "seconds"}
"""Criteria that compare two arms, as a calibration does."""


@dataclass(frozen=True)
class NoiseFloor:
    """What two equal arms showed."""

    comparisons: tuple[Comparison, ...]
    """Their apparent savings by context length; the truth is none."""
    joules_spread: float | None
    """Standard deviation between blocks of the log ratio, the widest of all lengths."""
    seconds_spread: float | None
    blocks: int

    def detectable(self, quantity: Quantity, blocks: int, stored_blocks: int) -> float | None:
        """Smallest margin at which no change passes with 90 % power; null without joules."""
        spread = self.joules_spread if quantity == "joules" else self.seconds_spread
        if spread is None or min(blocks, stored_blocks) < 2:
            return None
        return detectable_margin(spread, blocks, stored_blocks, decision_level())


def noise_floor(run: Run) -> NoiseFloor:
    """The noise floor that a run of equal arms shows."""
    return NoiseFloor(
        comparisons=comparisons(run),
        joules_spread=_spread(run, "joules"),
        seconds_spread=_spread(run, "seconds"),
        blocks=len(run.blocks_done),
    )


def refuse_too_fine(
    root: Path, margins: Mapping[str, float], stored: Sequence[Run], blocks: int
) -> tuple[str, ...]:
    """Raise ``UsageError`` for a margin below what the stored calibration can detect.

    ``blocks`` is how far the judged run may grow. Without a calibration, or with one of
    another machine, nothing is refused; what is returned says so where it is worth knowing.
    """
    if NAME not in baseline.names(root):
        return ()
    run = baseline.read(root, NAME).runs[-1]
    other = [d for d in differences(run, stored[-1]).hard if d.key in _MACHINE]
    if other:
        return (
            "The calibration is of other ground ("
            + "; ".join(str(d) for d in other)
            + ") and was not used; calibrate here with: green-bench calibrate",
        )
    floor, stored_blocks = noise_floor(run), sum(len(one.blocks_done) for one in stored)
    for name, quantity in _QUANTITIES.items():
        least = floor.detectable(quantity, blocks, stored_blocks)
        if name in margins and least is not None and margins[name] < least:
            raise UsageError(
                f"{name}: a margin of {margins[name]:.2%} is below {least:.2%}, the least this "
                f"machine can tell from no change with {blocks} blocks against {stored_blocks} "
                f"stored ones (run {run.header.run_id}); raise the margin, or store more blocks"
            )
    return ()


def lines(floor: NoiseFloor) -> tuple[str, ...]:
    """The noise floor in words."""
    from minference_green.render.numbers import percent

    found = [
        f"{c.context_length} tokens, {c.method} against {c.reference}: energy differs by "
        f"{percent(c.energy_saving)}, time by {percent(c.time_saving)}; the truth is 0"
        for c in floor.comparisons
    ]
    for quantity in ("joules", "seconds"):
        for look in LOOKS:
            least = floor.detectable(quantity, look, look)
            told = "unknown" if least is None else f"{least:.2%}"
            found.append(f"Smallest margin on {quantity} with {look} against {look} blocks: {told}")
    return tuple(found)


def _spread(run: Run, quantity: Quantity) -> float | None:
    reference, *others = method_names(run)
    spreads = [
        stdev(c - r for c, r in pairs.values())
        for length in run.header.workload.context_lengths
        for method in others
        if len(pairs := paired_logs(run, length, method, reference, quantity)) > 1
    ]
    return max(spreads, default=None)
