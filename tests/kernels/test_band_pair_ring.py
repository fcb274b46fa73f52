"""A model of the pair kernel's ring: its barriers, in random order, with copies that come late.

The kernel needs Hopper and cannot show that an order of events never happens. The model walks
as the kernel does (``_produce``, ``_consume``, ``_pass_over``), one barrier operation at a time.
"""

import random
from collections.abc import Generator
from dataclasses import dataclass

import pytest

from minference_green.kernels.band_pair import RING

Steps = Generator[None]


@dataclass(frozen=True)
class Pair:
    """Lengths of a pair's lists, and whether its second tile sees the first's diagonal whole."""

    shared: int
    columns: int
    first: int
    second: int
    sees_first: bool

    def walk(self) -> list[str | None]:
        """Names of the items in the producer's order; ``None`` where one is left out."""
        items: list[str | None] = ["diagonal 1", "diagonal 0"]
        items += [f"shared {i}" for i in range(self.shared)]
        items += [f"columns {i}" for i in range(self.columns)]
        for i in range(max(self.first, self.second)):
            items.append(f"own 0 {i}" if i < self.first else None)
            items.append(f"own 1 {i}" if i < self.second else None)
        return items


@dataclass
class Barrier:
    """Completes a phase at ``count`` arrivals; a waiter is told the phase's parity, no more."""

    count: int
    arrived: int = 0
    phases: int = 0

    def arrive(self, count: int = 1) -> None:
        self.arrived += count
        assert self.arrived <= self.count, "more arrivals than a phase has"
        if self.arrived == self.count:
            self.arrived = 0
            self.phases += 1

    def wait(self, use: int) -> Steps:
        """For phase number ``use``."""
        while self.phases & 1 == use & 1:
            yield
        assert self.phases == use + 1, "took another phase for its own"


class Ring:
    """Keys or values: slots, their barriers and the copies on their way. Or two query tiles."""

    def __init__(self, slots: int = RING, readers: int = 2) -> None:
        self.slots = slots
        self.full = [Barrier(1) for _ in range(slots)]
        self.empty = [Barrier(readers) for _ in range(slots)]
        self.held: list[object] = [None] * slots
        self.coming: list[tuple[int, object]] = []

    def land(self, which: int) -> None:
        slot, item = self.coming.pop(which)
        self.held[slot] = item
        self.full[slot].arrive()

    def until_full(self, t: int) -> Steps:
        return self.full[t % self.slots].wait(t // self.slots)

    def free(self, t: int, count: int) -> None:
        self.empty[t % self.slots].arrive(count)

    def copy(self, t: int, item: object, in_order: bool) -> Steps:
        s = t % self.slots
        if t >= self.slots:
            yield from self.empty[s].wait(t // self.slots - 1)
        before = t + 2 - self.slots
        if in_order and before >= 0:
            yield from self.until_full(before)
        if item is None:
            self.full[s].arrive()
        else:
            self.held[s] = "on its way"
            self.coming.append((s, item))
        yield


def produce(pairs: list[Pair], ring: Ring, queries: Ring | None, in_order: bool) -> Steps:
    t = 0
    for w, pair in enumerate(pairs):
        if queries:
            for side in (0, 1):
                yield from queries.copy(2 * w + side, ("queries", w, side), False)
        for item in pair.walk():
            yield from ring.copy(t, item and (w, item), in_order)
            t += 1


def consume(
    side: int, pairs: list[Pair], keys: Ring, values: Ring, queries: Ring, seen: list[object]
) -> Steps:
    def pass_over(t: int, count: int) -> Steps:
        for ring in (keys, values):
            yield from ring.until_full(t)
            ring.free(t, count)

    t = 0
    for w, pair in enumerate(pairs):
        own = (pair.first, pair.second)[side]
        turns = max(pair.first, pair.second)
        both = 2 + pair.shared + pair.columns
        visits = [(t + i, 1) for i in range(2, both)]
        visits += [(t + both + 2 * i + side, 2) for i in range(own)]
        yield from queries.until_full(2 * w + side)
        if side == 0:
            yield from pass_over(t, 1)
        diagonal = t + 1 - side
        yield from keys.until_full(diagonal)
        # Read until the first product is done.
        assert queries.held[side] == ("queries", w, side), (
            "queries overwritten before they are read"
        )
        seen.append(keys.held[diagonal % RING])
        queries.free(2 * w + side, 1)
        keys.free(diagonal, 1)
        yield from values.until_full(diagonal)
        last, last_count = diagonal, 1
        if side == 1 and pair.sees_first:
            visits.insert(0, (t + 1, 1))
        elif side == 1:
            yield from pass_over(t + 1, 1)
        for x, count in visits:
            yield from keys.until_full(x)
            item, weighted = keys.held[x % RING], values.held[last % RING]
            yield
            assert keys.held[x % RING] == item, "keys overwritten while read"
            seen.append(item)
            keys.free(x, count)
            yield
            yield from values.until_full(x)
            assert values.held[last % RING] == weighted, "values overwritten while read"
            values.free(last, last_count)
            last, last_count = x, count
        yield
        values.free(last, last_count)
        for i in range(own, turns):
            yield from pass_over(t + both + 2 * i + side, 2)
        t += both + 2 * turns


def expected(side: int, pairs: list[Pair]) -> list[object]:
    items: list[object] = []
    for w, pair in enumerate(pairs):
        names = [n for n in pair.walk()[2:] if n and not n.startswith(f"own {1 - side}")]
        first = [f"diagonal {side}"] + ["diagonal 0"] * (side == 1 and pair.sees_first)
        items += [(w, n) for n in first + names]
    return items


def play(rng: random.Random, sizes: list[int], in_order: bool) -> None:
    """One program's pairs; asserts what each group read, and that all of it ends."""
    pairs = [
        Pair(*(rng.choice(sizes) for _ in range(4)), rng.random() < 0.7)
        for _ in range(rng.randint(1, 6))
    ]
    keys, values, queries = Ring(), Ring(), Ring(slots=2, readers=1)
    rings = (keys, values, queries)
    seen: list[list[object]] = [[], []]
    actors = [
        produce(pairs, keys, queries, in_order),
        produce(pairs, values, None, in_order),
        *(consume(side, pairs, keys, values, queries, seen[side]) for side in (0, 1)),
    ]
    eagerness = [rng.random() + 0.05 for _ in actors]
    speed = rng.choice([1.0, 0.3, 0.05])
    idle = 0
    while actors:
        which = rng.choices(range(len(actors)), eagerness)[0]
        before = [b.phases for r in rings for b in r.full + r.empty]
        for ring in rings:
            if ring.coming and rng.random() < speed:
                ring.land(rng.randrange(len(ring.coming)))
        try:
            next(actors[which])
        except StopIteration:
            del actors[which], eagerness[which]
        idle = idle + 1 if before == [b.phases for r in rings for b in r.full + r.empty] else 0
        assert idle < 5000, "nobody gets on"
    assert seen == [expected(0, pairs), expected(1, pairs)]


@pytest.mark.parametrize("sizes", [[0, 1], [0, 0, 1, 2, 3, 7]], ids=["short", "long"])
def test_each_group_reads_its_own_tiles_however_late_copies_come(sizes):
    rng = random.Random(0)
    for _ in range(300):
        play(rng, sizes, in_order=True)


def test_unless_older_copies_are_waited_for_a_group_takes_another_for_its_own():
    rng = random.Random(0)
    with pytest.raises(AssertionError, match="took another phase for its own"):
        for _ in range(3000):
            play(rng, [0, 1], in_order=False)
