"""The regression gate on recorded blocks: how often it is right.

``python benchmarks/resample.py RUN...`` draws from runs of one experiment that have 40 blocks or
more together, without putting back, a stored run and a run to judge, and judges them at the
usual looks: 20 times as recorded, 20 times worse. Worse are blocks that were recorded with a
planted loss (``--worse RUN...``), else the same blocks with the other arms' joules raised by
10 %. Blocks are real, their division into runs is not, so every joule used here is marked
``replayed``. Exit code 1 if an unchanged run was called a regression, or a worse one passed.
"""

import argparse
import random
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from minference_green.comparable import differences
from minference_green.errors import GreenBenchError
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


def pooled(runs: Sequence[Run]) -> Run:
    """Runs of one experiment as one, their blocks numbered through.

    Raises ``SystemExit`` where they differ in more than the blocks.
    """
    first, *others = runs
    number, events = 0, list[Event](first.of(Observation))
    for run in runs:
        if [m.model_dump() for m in run.header.methods] != [
            m.model_dump() for m in first.header.methods
        ] or differences(first, run).hard:
            sys.exit(f"run {run.header.run_id} is another experiment than {first.header.run_id}")
        for block in sorted(run.blocks_done):
            for window in current_windows(run):
                if window.block == block:
                    events.append(window.model_copy(update={"block": number}))
            events.append(BlockDone(block=number))
            number += 1
    name = f"{first.header.run_id} and {len(others)} more" if others else first.header.run_id
    header = first.header.model_copy(update={"run_id": name})
    return Run(header=header, events=tuple(events))


def checked(then: Run, now: Run, blocks: Sequence[int], change: float = 0.0) -> Verdict:
    """The verdict on these blocks of ``now`` at the first look that decides, or at the last."""
    for look in LOOKS:
        verdict = compare(then, replayed(now, blocks[:look], change))
        if verdict.outcome is not Outcome.INCONCLUSIVE:
            break
    return verdict


def checks(run: Run, change: float, seed: int, worse: Run | None = None) -> Iterator[Verdict]:
    """20 verdicts, each on another draw, the judged blocks from ``worse`` where it is given.

    Raises ``SystemExit`` for too few blocks.
    """
    blocks = sorted(run.blocks_done)
    if len(blocks) < LEAST_BLOCKS:
        sys.exit(
            f"run {run.header.run_id} has {len(blocks)} blocks, resampling takes {LEAST_BLOCKS}; "
            f"measure with: green-bench run --blocks {LEAST_BLOCKS}"
        )
    others = None if worse is None else sorted(worse.blocks_done)
    if others is not None and len(others) < LOOKS[-1]:
        sys.exit(f"{len(others)} worse blocks, and a check may take {LOOKS[-1]}; measure more")
    draw = random.Random(seed)
    for _ in range(CHECKS):
        drawn = draw.sample(blocks, STORED_BLOCKS + LOOKS[-1])
        then = replayed(run, drawn[:STORED_BLOCKS])
        if worse is None or others is None:
            yield checked(then, run, drawn[STORED_BLOCKS:], change)
        else:
            yield checked(then, worse, draw.sample(others, LOOKS[-1]))


def main() -> None:
    """Print how often the gate said what."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="recorded runs, 40 blocks together")
    parser.add_argument("--worse", type=Path, nargs="+", help="runs with a planted loss")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    try:
        run = pooled([load(path) for path in arguments.runs])
        worse = pooled([load(path) for path in arguments.worse]) if arguments.worse else None
    except GreenBenchError as error:
        sys.exit(str(error))
    title = f"joules {CHANGE:+.0%}" if worse is None else "planted loss"
    said = {
        "as recorded": Counter(v.outcome for v in checks(run, 0.0, arguments.seed)),
        title: Counter(v.outcome for v in checks(run, CHANGE, arguments.seed, worse)),
    }
    print(
        f"replayed: blocks of run {run.header.run_id} ({len(run.blocks_done)} blocks, "
        f"{run.header.energy}), {STORED_BLOCKS} stored against up to {LOOKS[-1]}, margin 5 %"
    )
    for what, counts in said.items():
        shown = ", ".join(f"{outcome.upper()} {counts[outcome]}" for outcome in Outcome)
        print(f"{what:>12}: {CHECKS} checks (replayed): {shown}")
    sys.exit(said["as recorded"][Outcome.FAIL] > 0 or said[title][Outcome.PASS] > 0)


if __name__ == "__main__":
    main()
