"""Texts the embedded model learns from: facts among filler, and places where one is needed.

Every family of passages gives one way of attending a true owner:

================  ============================================================================
facts             a statement, later a question: retrieval over any distance, 14 kinds
lists             dense key-value lines, JSON and tables, asked later: many competitors
legends           codes explained in the header and used all over: columns
rows              a field repeated from the row above, rows of a fixed width: slashes
copies            a verbatim repeat of an earlier passage: induction
sections          the same keys with other values in every section, asked at its end: blocks
================  ============================================================================
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import cycle, islice

import numpy as np
from numpy.typing import NDArray

from minference_green.corpus import language
from minference_green.corpus.draws import Draws
from minference_green.corpus.filler import filler
from minference_green.corpus.kinds import KINDS, value, word
from minference_green.corpus.language import ANSWER_END, Key

BOS = 256
NEAR_DUPLICATE = 0.2
"""Share of facts whose key differs from an earlier one of its kind in one word only: many similar
keys are what such a model fails at."""

SAME_ENTITY = 0.1
UPDATED = 0.1
SHARED_FILLER = 4096
"""Length from which a text has filler of its own."""

REPEATED = 0.1
CODE_LENGTH = 3
FAMILIES = (
    ("facts", 0.62),
    ("lists", 0.15),
    ("legends", 0.08),
    ("rows", 0.05),
    ("copies", 0.05),
    ("sections", 0.05),
)


@dataclass(frozen=True)
class Names:
    """How often facts get other names, as chances per fact.

    ``behind`` and ``before`` the fact is stated; ``coded`` is filed under a code that other
    sentences refer to. Of the names before, a share ``far`` stands well before it.
    """

    behind: float
    before: float
    coded: float
    far: float


SOME_NAMES = Names(behind=0.25, before=0.06, coded=0.06, far=0.0)
MANY_NAMES = Names(behind=0.35, before=0.3, coded=0.12, far=0.7)


@dataclass
class _Known:
    """A fact that has been stated."""

    kind: str
    key: Key
    value: str
    aliased: bool = False


class _Text:
    """A text being written, with the bytes marked that are answers."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.bytes = bytearray()
        self.answers: list[tuple[int, int]] = []

    @property
    def room(self) -> int:
        return self.length - len(self.bytes)

    def add(self, text: str) -> None:
        self.bytes += text.encode()

    def answer(self, text: str) -> None:
        start = len(self.bytes)
        self.bytes += text.encode()
        self.answers.append((start, len(self.bytes)))


@dataclass(frozen=True)
class Document:
    """Token ids, the first of them BOS, and what they answer, both ``[length]``.

    ``answer`` is 0 for text, 1 for the first byte of an answer, which says where the model
    looked, and 2 for its other bytes.
    """

    ids: NDArray[np.int16]
    answer: NDArray[np.int8]


def document(seed: int, index: int, length: int, names: Names = SOME_NAMES) -> Document:
    """One text of exactly ``length`` tokens, the same for the same numbers everywhere."""
    draws = Draws(seed, "document", length, index)
    text = _Text(length - 1)
    _Writer(draws, text, names).write()
    ids = np.empty(length, np.int16)
    ids[0] = BOS
    ids[1:] = np.frombuffer(bytes(text.bytes[: length - 1]), np.uint8)
    answer = np.zeros(length, np.int8)
    for start, end in text.answers:
        answer[1 + start : 1 + end] = 2
        answer[1 + start : 2 + start] = 1
    return Document(ids, answer)


class _Writer:
    """Writes passages in random order, and asks for what stands before."""

    def __init__(self, draws: Draws, text: _Text, names: Names) -> None:
        self.draws, self.text, self.names = draws, text, names
        self.known: list[_Known] = []
        self.named: list[tuple[_Known, _Known]] = []
        """Facts yet to be stated, each with the other name it has already."""
        self.keys: list[tuple[str, Key]] = []
        self.taken: set[tuple[str, Key]] = set()
        self.entries: list[tuple[str, str]] = []
        self.legend: list[tuple[str, str]] = []
        names = ("prose", "prose", "records", "code")
        self.filler = _filler(draws.pick(names), draws, text.length)
        # From almost only filler to almost only facts, each as likely; a short text is dense.
        self.density = 0.02 * 30.0 ** draws.uniform()
        if _short(text.length):
            self.density = max(self.density, 0.4)
        # Short texts are for learning to look up at all: most of them is asked for.
        self.asking = 0.5 if _short(text.length) else 0.1 + 0.3 * draws.uniform()

    def write(self) -> None:
        draws, text = self.draws, self.text
        short = _short(text.length)
        chosen = self._family() if short else None
        if chosen == "legends" or (not short and draws.chance(0.5)):
            self._open_legend()
        while text.room > 0:
            family = chosen if short and draws.chance(0.6) else self._family()
            passage: Callable[[], None] = getattr(self, f"_{family}")
            passage()
            if not short or draws.chance(0.3):
                self._fill()

    def _family(self) -> str:
        at = self.draws.uniform()
        for name, share in FAMILIES:
            at -= share
            if at < 0:
                return name
        return FAMILIES[0][0]

    def _fill(self) -> None:
        """Filler so that facts keep about their share of the text."""
        budget = int(140 * (1 / self.density - 1) * self.draws.uniform() * 2)
        budget = min(budget, self.text.length // 4)
        while budget > 0 and self.text.room > 0:
            piece = next(self.filler)
            self.text.add(piece)
            budget -= len(piece)
            if self.known and self.draws.chance(self.asking * len(piece) / 400):
                self._ask()

    # facts

    def _facts(self) -> None:
        draws = self.draws
        for _ in range(draws.between(1, 4)):
            self._state()
        while self.known and draws.chance(0.55):
            self._ask()

    def _state(self) -> None:
        """A fact; at times another said again, replaced, or given a second name."""
        draws, text, names = self.draws, self.text, self.names
        if self.named and draws.chance(0.5):
            fact, other = self.named.pop(draws.below(len(self.named)))
            self._say(fact)
            self.known += [fact, other]
            return
        kind, key = self._key()
        fact = _Known(kind, key, value(kind, draws))
        if draws.chance(names.before):
            other = self._rename(fact)
            if names.far and draws.chance(names.far):
                self.named.append((fact, other))
                return
            self.known.append(other)
            self._breathe()
        self._say(fact)
        self.known.append(fact)
        if len(key.entity) == CODE_LENGTH:
            # A code stands for others: what it is filed under is asked by their names.
            for _ in range(draws.between(1, 4)):
                self._alias(fact)
                self._breathe()
        if draws.chance(REPEATED):
            again = draws.pick(self.known)
            text.add(language.paraphrase(again.kind, again.key))
            text.answer(again.value)
            text.add(language.ending(again.kind))
        if draws.chance(UPDATED) and not (old := draws.pick(self.known)).aliased:
            old.value = value(old.kind, draws)
            text.add(language.update(old.kind, old.key) + old.value + language.ending(old.kind))
        if draws.chance(names.behind):
            self._alias(draws.pick(self.known))

    def _say(self, fact: _Known) -> None:
        form = language.paraphrase if self.draws.chance(0.3) else language.statement
        line = "\n" if fact.kind == "cell" and self.draws.chance(0.5) else ""
        self.text.add(line + form(fact.kind, fact.key) + fact.value + language.ending(fact.kind))

    def _alias(self, fact: _Known) -> None:
        """Another name for what a fact is about, to be asked under that name."""
        self.known.append(self._rename(fact))

    def _rename(self, fact: _Known) -> _Known:
        fact.aliased = True
        other = Key(fact.key.attribute, language.entity(self.draws))
        self.text.add(language.alias(fact.key, other.entity))
        return _Known(fact.kind, other, fact.value, aliased=True)

    def _breathe(self) -> None:
        if self.draws.chance(0.5):
            self.text.add(next(self.filler))

    def _key(self) -> tuple[str, Key]:
        """A kind and a key not yet used; some are near to an earlier one."""
        draws = self.draws
        kind = draws.pick(KINDS)
        key = Key(draws.pick(language.ATTRIBUTES[kind]), language.entity(draws))
        if self.keys:
            near_kind, near = draws.pick(self.keys)
            if draws.chance(NEAR_DUPLICATE) and " " in near.entity:
                kind, key = near_kind, language.near_duplicate(near, draws)
            elif draws.chance(SAME_ENTITY):
                key = Key(key.attribute, near.entity)
            elif draws.chance(self.names.coded):
                key = Key(key.attribute, _code(draws))
        if (kind, key) in self.taken:
            return self._key()
        self.taken.add((kind, key))
        self.keys.append((kind, key))
        return kind, key

    def _ask(self) -> None:
        """Ask for a fact stated anywhere before; each is asked once."""
        fact = self.known.pop(self.draws.below(len(self.known)))
        self.text.add(language.question(fact.key))
        self.text.answer(fact.value)
        self.text.add(ANSWER_END)

    # the other families

    def _lists(self) -> None:
        draws, text = self.draws, self.text
        n = draws.between(4, 12 if _short(text.length) else 60)
        kinds = [draws.pick(KINDS)] if draws.chance(0.5) else KINDS
        pairs = [(word(draws, 2, 2), value(draws.pick(kinds), draws)) for _ in range(n)]
        before, between, after = draws.pick(
            (("", " = ", "\n"), ('"', '": ', ",\n"), ("| ", " | ", " |\n"), ("", ": ", "; "))
        )
        text.add("\n")
        for key, said in pairs:
            text.add(f"{before}{key}{between}{said}{after}")
        for key, said in draws.sample(pairs, min(n, draws.between(1, 6))):
            if draws.chance(0.3):
                text.add(next(self.filler))
            text.add(f"\n? {before}{key}{between}")
            text.answer(said)
            text.add(after)

    def _open_legend(self) -> None:
        draws = self.draws
        letters = "ABCDEFGHJKLMNPQRSTUVWXYZ"
        codes = draws.sample([a + b for a in letters for b in letters], draws.between(4, 24))
        self.legend = [(code, word(draws, 2, 3)) for code in codes]
        self.text.add("Legend: " + ", ".join(f"{c}={m}" for c, m in self.legend) + ".\n")

    def _legends(self) -> None:
        if not self.legend:
            self._open_legend()
        for _ in range(self.draws.between(1, 6)):
            code, meaning = self.draws.pick(self.legend)
            self.text.add(f"[{code}:")
            self.text.answer(meaning)
            self.text.add("] ")
            if self.draws.chance(0.5):
                self.text.add(next(self.filler))

    def _rows(self) -> None:
        """Rows of one width; each field is the one above, changed in one row of eight."""
        draws, text = self.draws, self.text
        widths = [draws.between(4, 12) for _ in range(draws.between(2, 12))]
        fields = [_field(draws, width) for width in widths]
        text.add("\n")
        for row in range(draws.between(4, 12)):
            for i, width in enumerate(widths):
                if row and draws.chance(0.125):
                    fields[i] = _field(draws, width)
                    text.add(fields[i])
                elif row:
                    text.answer(fields[i])
                else:
                    text.add(fields[i])
                text.add("|")
            text.add("\n")

    def _copies(self) -> None:
        draws, text = self.draws, self.text
        if len(text.bytes) < 100:
            text.add(next(self.filler))
            return
        size = min(draws.between(40, 200), len(text.bytes) // 2)
        at = draws.below(len(text.bytes) - size)
        passage = bytes(text.bytes[at : at + size]).decode(errors="ignore")
        if len(passage) < 24:
            return
        text.add("\nAgain: " + passage[:16])
        text.answer(passage[16:])
        text.add("\n")

    def _sections(self) -> None:
        draws, text = self.draws, self.text
        keys = [word(draws, 2, 2) for _ in range(draws.between(2, 5))]
        for number in range(draws.between(2, 6)):
            text.add(f"\nSection {number + 1}\n")
            values = [value(draws.pick(KINDS), draws) for _ in keys]
            for key, said in zip(keys, values, strict=True):
                text.add(f"{key}: {said}\n")
            if draws.chance(0.5):
                text.add(next(self.filler))
            i = draws.below(len(keys))
            text.add(f"Here {keys[i]}: ")
            text.answer(values[i])
            text.add("\n")


def _filler(name: str, draws: Draws, length: int) -> Iterator[str]:
    """Filler of its own for a long text; a short one begins anywhere in one of 32 shared ones.

    Drawing a vocabulary takes longer than writing 2 000 bytes with it.
    """
    if length >= SHARED_FILLER:
        return filler(name, draws.child("filler"))
    pieces = _pieces(name, draws.below(32))
    start = draws.below(len(pieces))
    return cycle(pieces[start:] + pieces[:start])


@cache
def _pieces(name: str, number: int) -> list[str]:
    return list(islice(filler(name, Draws(0, "shared filler", name, number)), 1000))


def _code(draws: Draws) -> str:
    return f"{'ABCDEFGHJKLMNPQRSTUVWXYZ'[draws.below(24)]}{draws.below(100):02d}"


def _field(draws: Draws, width: int) -> str:
    return (word(draws, 2, 3) * 2)[:width].ljust(width, "_")


def _short(length: int) -> bool:
    """Whether a text holds only a few passages."""
    return length < 1500
