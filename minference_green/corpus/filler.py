"""The text between facts: three made-up kinds, and the user's own.

Made-up text holds, now and then, a value of every kind, a capital name and another script, so
that no fact is marked out by its characters alone; it never states a value as ``language``
does. A piece ends at a sentence or a line, and no value of ``kinds`` holds such an end: a value
that stands in no piece stands nowhere.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from types import MappingProxyType

from minference_green.corpus.draws import Draws
from minference_green.corpus.kinds import CODAS, KINDS, ONSETS, VOWELS, name, value
from minference_green.errors import UsageError

FUNCTION_WORDS = (
    *("the", "of", "and", "to", "in", "a", "is", "that", "it", "for", "was", "on", "with", "as"),
    *("by", "at", "from", "or", "an", "be", "this", "which", "not", "are", "but", "had", "they"),
    *("her", "his", "we", "all", "were", "when", "there", "can", "more", "if", "no", "will"),
    *("one", "would", "so", "out", "up", "into", "some", "than", "only", "before", "after"),
)
SEAM = "\n\n* * *\n\n"
"""Stands where a user's text has run out and begins again."""

LONGEST_LINE = 2000
"""Characters after which a user's line without a sentence end is wrapped."""

_SYLLABLES = tuple(onset + vowel + coda for onset in ONSETS for vowel in VOWELS for coda in CODAS)
_SENTENCE = re.compile(r".*?(?:[.!?][\"')\]]*[ \t]+|[。！？]|\n+|$)", re.DOTALL)


@dataclass(frozen=True)
class OwnText:
    """The user's own text as filler: cut at sentence and line ends, begun anywhere, repeated.

    Raises ``UsageError`` for a text of nothing but space.
    """

    text: str

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise UsageError(
                f"the filler text holds no words ({len(self.text)} characters): give another file"
            )

    @cached_property
    def name(self) -> str:
        """``text`` and the first 12 digits of its SHA-256."""
        return f"text {sha256(self.text.encode()).hexdigest()[:12]}"

    @cached_property
    def pieces(self) -> tuple[str, ...]:
        """The text cut after sentences and lines, once for all haystacks."""
        return tuple(_pieces(self.text))


def filler(kind: str | OwnText, draws: Draws) -> Iterator[str]:
    """Pieces of text without end, each with its separator: ``prose``, ``records``, ``code``.

    A user's text begins at a drawn piece and goes round, ``SEAM`` between its end and its
    beginning. Raises ``UsageError`` for another name.
    """
    if isinstance(kind, OwnText):
        return _around(kind.pieces, draws)
    if kind not in _FILLERS:
        raise UsageError(f"unknown filler {kind!r}: choose {', '.join(_FILLERS)}, or a text file")
    return _FILLERS[kind](draws)


def _words(draws: Draws, n: int) -> list[str]:
    """``n`` pseudo-words of one to three syllables, a draw for each syllable."""
    pick = draws.pick
    return ["".join([pick(_SYLLABLES) for _ in range(1 + draws.below(3))]) for _ in range(n)]


def _vocabulary(draws: Draws) -> tuple[list[str], list[str]]:
    """Words as often as prose uses them, and those of them that may end a sentence."""
    words = _words(draws, draws.between(300, 2000))
    content = [word for rank, word in enumerate(words) for _ in range(1 + 300 // (rank + 3))]
    content += [f"{word}," for word in words[: len(words) // 8]]
    content += [name(draws) for _ in range(60)]
    content += [value(kind, draws) for kind in KINDS for _ in range(6)]
    return content + list(FUNCTION_WORDS) * (7 * len(content) // (10 * len(FUNCTION_WORDS))), words


def _prose(draws: Draws) -> Iterator[str]:
    words, last_words = _vocabulary(draws)
    below, n = draws.below, len(words)
    while True:
        for left in range(draws.between(2, 7), -1, -1):
            sentence = " ".join([words[below(n)] for _ in range(4 + below(16))])
            end = ". " if left else ".\n\n"
            yield f"{sentence[0].upper()}{sentence[1:]} {draws.pick(last_words)}{end}"


def _records(draws: Draws) -> Iterator[str]:
    """Sections of records; names of fields and their values belong to one section only."""
    while True:
        heading, *fields = _words(draws, draws.between(4, 8))
        columns = [
            [f"{field}: {value(kind, draws)}\n" for _ in range(draws.between(8, 24))]
            for field in fields
            for kind in [draws.pick(KINDS)]
        ]
        yield f"# {heading.capitalize()}\n\n"
        first = draws.between(100, 90_000)
        for number in range(first, first + draws.between(15, 60)):
            lines = [column[draws.below(len(column))] for column in columns]
            yield f"{heading} {number}\n{''.join(lines)}\n"


_LINES = (
    "    {0} = {4}({1}, {2})\n",
    "    {0} = {1} + {2} * {3}\n",
    "    {0} = {5}\n",
    "    if {0} < {1}:\n        {2} = {3}\n",
    "    for {0} in {4}({1}):\n        {2} += {0}\n",
    "    {0}[{1}] = {4}({2})\n",
    "    {4}({0}, {5})\n",
    "    # {1} {2} {3}\n",
    "    {0} = {1}.{2}({5})\n",
    "    while {0} > {1}:\n        {0} -= {2}\n",
)


def _code(draws: Draws) -> Iterator[str]:
    """Small functions; the names of variables belong to one function only."""
    functions = [value("identifier", draws) for _ in range(300)]
    literals = [str(draws.below(1000)) for _ in range(200)]
    for kind in KINDS:
        texts = [value(kind, draws).strip('"') for _ in range(8)]
        literals += texts if kind == "integer" else [f'"{text}"' for text in texts]
    pick = draws.pick
    while True:
        names = _words(draws, 4)
        yield f"def {pick(functions)}({names[0]}, {names[1]}):\n"
        for _ in range(draws.between(2, 8)):
            used = [pick(names), pick(names), pick(names), pick(names)]
            yield pick(_LINES).format(*used, pick(functions), pick(literals))
        yield f"    return {pick(names)}\n\n\n"


def _around(pieces: Sequence[str], draws: Draws) -> Iterator[str]:
    first = draws.below(len(pieces))
    yield from pieces[first:]
    while True:
        yield SEAM
        yield from pieces


def _pieces(text: str) -> Iterator[str]:
    """The text cut after sentences and lines; what has no end within a line's limit is wrapped."""
    for match in _SENTENCE.finditer(text):
        start, end = match.span()
        # By positions: to cut the front off again and again would copy a long line each time.
        while end - start > LONGEST_LINE:
            space = text.rfind(" ", start + 1, start + LONGEST_LINE)
            at, after = (space, space + 1) if space > 0 else (start + LONGEST_LINE,) * 2
            yield text[start:at] + "\n"
            start = after
        if piece := text[start:end]:
            yield piece if piece[-1] in " \t\n。！？" else piece + "\n"


_FILLERS: Mapping[str, Callable[[Draws], Iterator[str]]] = MappingProxyType(
    {"prose": _prose, "records": _records, "code": _code}
)

FILLERS: tuple[str, ...] = tuple(_FILLERS)
