"""What one haystack asks: how often, among what and how deep each fact stands.

Every haystack is a randomised block. Over 14 haystacks each kind meets every entry of the mix
and every depth once, over 196 every pair of them: kinds differ in nothing else.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from minference_green.corpus.kinds import KINDS
from minference_green.corpus.records import Mentions, Neighbour, Place
from minference_green.errors import UsageError


@dataclass(frozen=True)
class Treatment:
    """How a fact is stated and what stands beside it.

    ``mentions`` counts the statements of a repeated fact. ``hops`` of 2 and 3 ask for an alias
    of the stated key; ``alias_first`` puts the first alias before the statement.
    """

    regime: Mentions = "single"
    mentions: int = 1
    neighbour: Neighbour = "none"
    hops: int = 1
    alias_first: bool = False


PLAIN = Treatment()

MIX: tuple[tuple[Treatment, Treatment], ...] = (
    (PLAIN, PLAIN),
    (Treatment("repeated", mentions=2), Treatment("repeated", mentions=8)),
    (PLAIN, PLAIN),
    (Treatment("repeated", mentions=4), Treatment("legend", hops=2)),
    (PLAIN, PLAIN),
    (Treatment("updated"), Treatment("conflicting")),
    (PLAIN, PLAIN),
    (Treatment(neighbour="same entity"), Treatment(neighbour="near key")),
    (PLAIN, PLAIN),
    (Treatment(hops=2), Treatment(hops=2, alias_first=True)),
    (PLAIN, PLAIN),
    (Treatment(hops=3), Treatment(neighbour="same value")),
    (PLAIN, PLAIN),
    (PLAIN, PLAIN),
)
"""Eight in fourteen facts are plain. The two of a pair change places between inside and after."""


@dataclass(frozen=True)
class Slot:
    """A depth: a share of the text, ``tokens_back`` tokens before it."""

    share: float
    tokens_back: int = 0


WINDOW_TOKENS = 64
"""Query rows at the end of a prompt that MInference's estimator sees."""

_DEPTHS = tuple(Slot(share) for share in (0.1, 0.1, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75, 0.9))
_SHALLOW = (Slot(0.0), Slot(0.02))
_BEFORE_A_QUESTION = (*_SHALLOW, *_DEPTHS, Slot(0.9), Slot(0.98), Slot(0.98))
SLOTS: dict[Place, tuple[Slot, ...]] = {
    "inside": _BEFORE_A_QUESTION,
    "after": (*_SHALLOW, *_DEPTHS, Slot(0.98), Slot(1.0, WINDOW_TOKENS), Slot(1.0)),
    "end": _BEFORE_A_QUESTION,
}
"""Share 0 begins in the first 30 tokens, share 1 ends with the text, in the estimator's window
or just before it."""

DISTANCES = (0.0, 0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.85, 0.95)
"""Where an inside question stands, as a share of the text behind its fact; at 0 it follows at
once, inside the local band."""


@dataclass(frozen=True)
class Recipe:
    """How many questions of which kinds a haystack asks, and of how many facts it asks nothing.

    ``inside``, ``after`` and ``end`` count the questions of each place; ``competitors`` the
    unasked facts of each kind, so that other values of a kind stand in the text too.
    ``token_bytes`` is about how many bytes a token of the model has: it places the facts around
    the estimator's window. Raises ``UsageError`` for an unknown kind, a negative count or
    nothing to ask.
    """

    inside: int = 14
    after: int = 14
    end: int = 1
    kinds: tuple[str, ...] = KINDS
    competitors: int = 3
    mix: tuple[tuple[Treatment, Treatment], ...] = MIX
    token_bytes: int = 1

    def __post_init__(self) -> None:
        unknown = [kind for kind in self.kinds if kind not in KINDS]
        if unknown or not self.kinds:
            raise UsageError(f"unknown kind {unknown}: choose one or more of {', '.join(KINDS)}")
        counts = {"inside": self.inside, "after": self.after, "end": self.end}
        for name, count in {**counts, "competitors": self.competitors}.items():
            if count < 0:
                raise UsageError(f"{name} is {count}: give 0 or more")
        if not any(counts.values()):
            raise UsageError("a haystack without questions tells nothing: ask for at least one")
        if not self.mix:
            raise UsageError("the mix is empty: give at least one pair of treatments")
        if self.token_bytes < 1:
            raise UsageError(f"token_bytes is {self.token_bytes}: give 1 or more")


@dataclass(frozen=True)
class Item:
    """A fact to be asked."""

    place: Place
    kind: str
    treatment: Treatment
    slot: Slot


def items(recipe: Recipe, kinds: Sequence[str], index: int) -> list[Item]:
    """The facts that haystack ``index`` asks, ``kinds`` in the order in which they rotate.

    A kind's turn decides its treatment and depth, so that each kind meets all of them equally
    often however many questions a haystack has.
    """
    found = []
    places: tuple[tuple[Place, int], ...] = (
        ("inside", recipe.inside),
        ("after", recipe.after),
        ("end", recipe.end),
    )
    for shift, (place, count) in enumerate(places):
        slots = SLOTS[place]
        for number in range(index * count, (index + 1) * count):
            turn, kind = divmod(number, len(kinds))
            lap = turn // len(recipe.mix)
            pair = recipe.mix[(kind + turn) % len(recipe.mix)]
            slot = slots[(kind + 3 * turn + lap + 5 * shift) % len(slots)]
            found.append(Item(place, kinds[kind], pair[(turn + lap + shift) % 2], slot))
    return found
