"""What a text with known facts consists of: plain data, byte offsets into its UTF-8."""

from dataclasses import dataclass
from typing import Literal

Place = Literal["inside", "after", "end"]
"""Where a question stands: inside the prefilled prompt, behind it and asked over its cache, or
as the last bytes of a prompt that is prefilled with it (text, then question)."""

Mentions = Literal["single", "repeated", "updated", "conflicting", "legend"]
"""``legend``: stated once near the beginning under a short code that later sentences refer to."""

Neighbour = Literal["none", "same entity", "near key", "same value"]


@dataclass(frozen=True)
class Mention:
    """One place where a value is stated: bytes ``[start, end)`` of the text."""

    start: int
    end: int
    value: str


@dataclass(frozen=True)
class Fact:
    """A value under a key, and every place of the text that states it.

    ``value`` is the right answer (of an updated fact the last). ``depth`` is where its mention
    begins, as a share of the text: its first, of an updated fact the last. ``hops`` is 1 for a
    fact stated under its own key, 2 or 3 where the key is an alias. A fact of ``conflicting``
    mentions has no right answer: ``value`` is the first stated, and what is measured is which
    one a model prefers.
    """

    id: int
    kind: str
    key: str
    value: str
    mentions: tuple[Mention, ...]
    regime: Mentions
    neighbour: Neighbour
    depth: float
    hops: int


@dataclass(frozen=True)
class Question:
    """A question about a fact: ``prompt`` ends where the answer begins.

    ``answer_start`` is the byte of the text where the answer of an inside question begins.
    ``distractors`` are wrong values of the same kind: four that stand in the text under other
    keys (fewer where the text has fewer), then four that stand nowhere.
    """

    id: int
    fact: int
    place: Place
    prompt: str
    answer: str
    distractors: tuple[str, ...]
    answer_start: int | None


@dataclass(frozen=True)
class Haystack:
    """A text, its facts and the questions about them.

    ``seed``, ``index`` and the plan's settings make the same text again, byte for byte.
    """

    seed: int
    index: int
    filler: str
    text: bytes
    facts: tuple[Fact, ...]
    questions: tuple[Question, ...]
