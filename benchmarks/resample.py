"""The regression gate on recorded blocks: how often it is right.

``python benchmarks/resample.py RUN`` draws from a run of 40 blocks or more, without putting
back, a stored run and a run to judge, and judges them at the usual looks: 20 times as
recorded, 20 times with the other arms' joules raised by 10 %. Blocks are real, their division
into runs is not, so every joule used here is marked ``replayed``. Exit code 1 if an unchanged
run was called a regression, or a raised one passed.
"""

import argparse
import random
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from minference_green.results import BlockDone, Event, Observation, Run, Window, load
from minference_green.stats import current_windows, method_names
from minference_green.verdict import LOOKS, Outcome, Verdict, compare

LEAST_BLOCKS = 40
STORED_BLOCKS = 10
CHECKS = 20
CHANGE = 0.10


def replayed(run: Run, blocks: Sequence[int], change: float = 0.0) -> Run:
    """These blocks as a run of their own, joules of all but the reference raised by ``change``."""
    reference = method_names(run)[0]
    events: list[Event] = list(run.of(Observation))
    by_block: dict[int, list[Window]] = {block: [] for block in blocks}
    for window in current_windows(run):
        if window.block in by_block:
            by_block[window.block].append(window)
    for number, block in enumerate(blocks):
        for window in by_block[block]:
            factor = 1.0 if window.method == reference else 1.0 + change
            readings = tuple(
                reading.model_copy(
                    update={
                        "obtained": "replayed",
                        "joules": None if reading.joules is None else reading.joules * factor,
                    }
                )
                for reading in window.readings
            )
            events.append(window.model_copy(update={"block": number, "readings": readings}))
        events.append(BlockDone(block=number))
    plan = run.header.plan.model_copy(update={"blocks": len(blocks)})
    header = run.header.model_copy(update={"run_id": f"{run.header.run_id}-replayed", "plan": plan})
    return Run(header=header, events=tuple(events))


def checked(run: Run, stored: Sequence[int], now: Sequence[int], change: float) -> Verdict:
    """The verdict at the first look that decides, or at the last."""
    then = replayed(run, stored)
    for look in LOOKS:
        verdict = compare(then, replayed(run, now[:look], change))
        if verdict.outcome is not Outcome.INCONCLUSIVE:
            break
    return verdict


def checks(run: Run, change: float, seed: int) -> Iterator[Verdict]:
    """20 verdicts, each on another draw; raises ``SystemExit`` for a run with too few blocks."""
    blocks = sorted(run.blocks_done)
    if len(blocks) < LEAST_BLOCKS:
        sys.exit(
            f"run {run.header.run_id} has {len(blocks)} blocks, resampling takes {LEAST_BLOCKS}; "
            f"measure with: green-bench run --blocks {LEAST_BLOCKS}"
        )
    draw = random.Random(seed)
    for _ in range(CHECKS):
        drawn = draw.sample(blocks, STORED_BLOCKS + LOOKS[-1])
        yield checked(run, drawn[:STORED_BLOCKS], drawn[STORED_BLOCKS:], change)


def main() -> None:
    """Print how often the gate said what."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="a recorded run of 40 blocks or more")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    run = load(arguments.run)
    said = {
        change: Counter(v.outcome for v in checks(run, change, arguments.seed))
        for change in (0.0, CHANGE)
    }
    print(
        f"replayed: blocks of run {run.header.run_id} ({len(run.blocks_done)} blocks, "
        f"{run.header.energy}), {STORED_BLOCKS} stored against up to {LOOKS[-1]}, margin 5 %"
    )
    for change, counts in said.items():
        title = "as recorded" if change == 0 else f"joules {change:+.0%}"
        shown = ", ".join(f"{outcome.upper()} {counts[outcome]}" for outcome in Outcome)
        print(f"{title:>12}: {CHECKS} checks (replayed): {shown}")
    sys.exit(said[0.0][Outcome.FAIL] > 0 or said[CHANGE][Outcome.PASS] > 0)


if __name__ == "__main__":
    main()
