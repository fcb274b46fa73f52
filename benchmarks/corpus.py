"""How fast texts with known facts are written, on one core.

``python benchmarks/corpus.py [--bytes 4000000] [--rounds 3]`` prints megabytes of UTF-8 per
second: of filler alone, of a long haystack (one text, written as a stream), and the haystacks
of 8 KB and 64 KB per second with all their records. Seconds are CPU seconds of this process,
which other work on the machine moves little; the best of the rounds counts. The first piece of
filler, which draws a vocabulary, is inside. Exit code 1 where a long haystack is slower than
2 MB/s.
"""

import argparse
import platform
import sys
import time
from collections.abc import Callable
from functools import partial

from minference_green.corpus.draws import Draws
from minference_green.corpus.filler import FILLERS, filler
from minference_green.corpus.haystack import haystack, plan

LEAST_MB_PER_S = 2.0
SHORT = (8_192, 65_536)


def write_filler(kind: str, size: int, seed: int) -> None:
    """So many bytes of filler."""
    pieces = filler(kind, Draws(seed, "benchmark"))
    while size > 0:
        size -= len(next(pieces).encode())


def write_long(kind: str, size: int, seed: int) -> None:
    """A haystack of so many bytes, never held whole."""
    assert sum(map(len, plan(seed, 0, length=size, filler=kind).pieces())) == size


def write_whole(kind: str, size: int, seed: int) -> None:
    """A haystack of so many bytes with its records."""
    assert len(haystack(seed, 0, length=size, filler=kind).text) == size


def least_seconds(work: Callable[[int], object], rounds: int) -> float:
    """Of the rounds, each with a seed of its own."""
    seconds = []
    for seed in range(rounds):
        begin = time.process_time()
        work(seed)
        seconds.append(time.process_time() - begin)
    return min(seconds)


def main() -> None:
    """Print the speeds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bytes", type=int, default=4_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    size, rounds = arguments.bytes, arguments.rounds
    print(f"Python {platform.python_version()} on {platform.machine()}, {size:,} bytes a text")
    print(f"{'':8} {'filler':>12} {'haystack':>12} " + " ".join(f"{n:>13} B" for n in SHORT))
    slowest = float("inf")
    for kind in FILLERS:
        alone = size / 1e6 / least_seconds(partial(write_filler, kind, size), rounds)
        long = size / 1e6 / least_seconds(partial(write_long, kind, size), rounds)
        each = [1 / least_seconds(partial(write_whole, kind, n), 5 * rounds) for n in SHORT]
        slowest = min(slowest, long)
        shown = " ".join(f"{rate:9.1f} /s   " for rate in each)
        print(f"{kind:8} {alone:7.1f} MB/s {long:7.1f} MB/s {shown}")
    if slowest < LEAST_MB_PER_S:
        sys.exit(f"a haystack was written at {slowest:.2f} MB/s, less than {LEAST_MB_PER_S} MB/s")


if __name__ == "__main__":
    main()
