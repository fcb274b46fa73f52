"""Facts and questions among filler, every byte of them known.

The facts are drawn first, then placed by their shares of the length, then the space between
them is filled: another length gives the same sentences in the same order. Facts stand where
they were asked for; sentences that want the same place follow one another.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice

from minference_green.corpus import language
from minference_green.corpus.draws import Draws
from minference_green.corpus.filler import OwnText, filler
from minference_green.corpus.language import ATTRIBUTES, Key
from minference_green.corpus.ledger import Ledger
from minference_green.corpus.recipe import DISTANCES, PLAIN, Item, Recipe, Treatment, items
from minference_green.corpus.records import Fact, Haystack, Mention, Place, Question
from minference_green.errors import UsageError

DEFAULT = Recipe()

LEGEND_SHARE = 0.02
"""A legend stands in this first part of the text; ``LEGEND_USERS`` more sentences refer to it."""
LEGEND_USERS = 4

_DISTRACTORS = 4
_BATCH = 64


@dataclass(frozen=True)
class Plan:
    """A haystack whose filler is not yet written: the form for texts of any length.

    ``values`` are the strings that stand nowhere but where a record says so.
    """

    seed: int
    index: int
    length: int
    filler: str | OwnText
    facts: tuple[Fact, ...]
    questions: tuple[Question, ...]
    values: tuple[str, ...]
    sentences: tuple[tuple[int, bytes], ...]

    @property
    def filler_name(self) -> str:
        """``prose``, ``records``, ``code``, or the user's text by its hash."""
        return self.filler if isinstance(self.filler, str) else self.filler.name

    def pieces(self) -> Iterator[bytes]:
        """The text in pieces of a sentence or line, ``length`` bytes in all."""
        values = [value.encode() for value in self.values]
        draws = Draws(self.seed, "haystack", self.index, "filler")
        pieces = _free_of(values, filler(self.filler, draws))
        in_lines = self.filler in ("records", "code")
        at = 0
        sentence = b"\n"
        for start, following in (*self.sentences, (self.length, b"")):
            if in_lines and at < start and sentence.endswith(b" "):
                yield b"\n"
                at += 1
            yield from _fill(start - at, pieces, values)
            yield following
            sentence, at = following, start + len(following)


def haystack(
    seed: int,
    index: int,
    *,
    length: int,
    filler: str | OwnText = "prose",
    recipe: Recipe = DEFAULT,
) -> Haystack:
    """A text of exactly ``length`` bytes of UTF-8 with its facts and questions.

    ``filler`` is ``prose``, ``records``, ``code`` or the user's own text. The same seed, index
    and recipe give the same facts, questions and answers in the same order at every length and
    in every filler. No BOS stands in the text. Raises ``UsageError`` for an unknown filler and
    for a length below ``shortest``.
    """
    planned = plan(seed, index, length=length, filler=filler, recipe=recipe)
    text = b"".join(planned.pieces())
    return Haystack(seed, index, planned.filler_name, text, planned.facts, planned.questions)


def plan(
    seed: int,
    index: int,
    *,
    length: int,
    filler: str | OwnText = "prose",
    recipe: Recipe = DEFAULT,
) -> Plan:
    """The records of a haystack, and its text as a stream. Raises as ``haystack`` does."""
    drafts, values = _drafts(seed, index, recipe)
    sentences = _in_order(drafts)
    needed = sum(len(sentence.text) for _, sentence in sentences)
    if length < needed:
        asked = recipe.inside + recipe.after + recipe.end
        raise UsageError(
            f"a text of {length} bytes is too short for {asked} questions and "
            f"{recipe.competitors} unasked facts of each kind: seed {seed}, haystack {index} "
            f"takes {needed} bytes; ask for a longer text or fewer of them"
        )
    starts = _starts([sentence for _, sentence in sentences], length)
    spans = _Spans(tuple(zip(starts, sentences, strict=True)), length)
    facts = tuple(spans.fact(number, draft) for number, draft in enumerate(drafts))
    asked_drafts = [(number, draft) for number, draft in enumerate(drafts) if draft.place]
    return Plan(
        seed,
        index,
        length,
        filler,
        facts,
        tuple(spans.question(number, draft) for number, draft in asked_drafts),
        values,
        tuple((start, s.text) for start, (_, s) in zip(starts, sentences, strict=True)),
    )


def shortest(seed: int, index: int, recipe: Recipe = DEFAULT) -> int:
    """The fewest bytes this haystack can have: its sentences without any filler."""
    drafts, _ = _drafts(seed, index, recipe)
    return sum(len(sentence.text) for draft in drafts for sentence in draft.sentences)


@dataclass(frozen=True)
class _Sentence:
    """A sentence, and the share of the text where its value is to begin.

    ``back`` bytes before that share; a sentence without a value (an alias) ends there.
    """

    share: float
    before: str
    value: str = ""
    after: str = ""
    back: int = 0
    is_answer: bool = False

    @property
    def text(self) -> bytes:
        return f"{self.before}{self.value}{self.after}".encode()

    @property
    def value_offset(self) -> int:
        return len(self.before.encode())

    @property
    def bytes_from_value(self) -> int:
        return len(self.text) - self.value_offset


@dataclass(frozen=True)
class _Draft:
    """A fact with all its sentences in the order of the text, not yet placed."""

    kind: str
    key: Key
    value: str
    treatment: Treatment
    sentences: tuple[_Sentence, ...]
    tie: float
    place: Place | None = None
    distractors: tuple[str, ...] = ()

    @property
    def prompt(self) -> str:
        return language.question(self.key)


def _stated(share: float, kind: str, before: str, value: str, back: int = 0) -> _Sentence:
    row = "\n" if kind == "cell" else ""  # a table row begins a line
    return _Sentence(share, row + before, value, language.ending(kind), back)


def _between(draws: Draws, low: float, high: float) -> float:
    return low + (high - low) * draws.uniform()


def _drafts(seed: int, index: int, recipe: Recipe) -> tuple[list[_Draft], tuple[str, ...]]:
    """All facts, the asked ones first, and every value that has its place or stands nowhere."""
    ledger = Ledger()
    of_haystack = Draws(seed, "haystack", index)
    kinds = Draws(seed, "kinds").shuffled(recipe.kinds)
    distances = cycle(of_haystack.child("distances").shuffled(DISTANCES))
    asked: list[_Draft] = []
    unasked: list[_Draft] = []
    for number, item in enumerate(items(recipe, kinds, index)):
        draws = of_haystack.child("fact", number)
        share, treatment = item.slot.share, item.treatment
        limit = share + (1 - share) * next(distances) if item.place == "inside" else 1.0
        draft = _asked(item, limit, recipe.token_bytes, ledger, draws)
        asked.append(draft)
        if treatment.neighbour != "none":
            unasked.append(_neighbour(draft, limit, ledger, draws))
    for kind in kinds:
        for number in range(recipe.competitors):
            draws = of_haystack.child("competitor", kind, number)
            unasked.append(_unasked(kind, draws.uniform(), ledger, draws))
    drafts = asked + unasked
    for number, draft in enumerate(asked):
        draws = of_haystack.child("distractors", number)
        drafts[number] = replace(draft, distractors=_distractors(draft, drafts, ledger, draws))
    return drafts, ledger.values


def _asked(item: Item, limit: float, token_bytes: int, ledger: Ledger, draws: Draws) -> _Draft:
    """A fact in its treatment; all that an answer needs stands at or before share ``limit``."""
    kind, treatment, share = item.kind, item.treatment, item.slot.share
    key = ledger.key(lambda: language.key(kind, draws))
    value = ledger.value(kind, draws)
    back = item.slot.tokens_back * token_bytes
    if back:
        back += len(value.encode())  # the whole value stands before the window
    first = _stated(share, kind, language.statement(kind, key), value, back)
    sentences = [first]
    match treatment.regime:
        case "single":
            before, behind, key = _aliases(key, treatment, share, limit, ledger, draws)
            sentences = [*before, first, *behind]
        case "repeated":
            for number in range(1, treatment.mentions):
                form = language.paraphrase if number % 2 else language.statement
                at = _between(draws, share, limit)
                sentences.append(_stated(at, kind, form(kind, key), value))
        case "updated":
            old = ledger.value(kind, draws)
            at = _between(draws, 0.0, share)
            new = language.update(kind, key)
            sentences = [
                _stated(at, kind, language.statement(kind, key), old),
                _stated(share, kind, new, value, back),
            ]
        case "conflicting":
            at, other = _between(draws, share, limit), ledger.value(kind, draws)
            sentences.append(_stated(at, kind, language.statement(kind, key), other))
        case "legend":
            sentences, key = _legend(kind, key, value, share, ledger, draws)
    if item.place == "inside":
        prompt = language.question(key)
        sentences.append(_Sentence(limit, prompt, value, language.ANSWER_END, is_answer=True))
    ordered = tuple(sorted(sentences, key=_share_and_back))
    return _Draft(kind, key, value, treatment, ordered, draws.uniform(), item.place)


def _share_and_back(sentence: _Sentence) -> tuple[float, int]:
    return sentence.share, -sentence.back


def _aliases(
    key: Key, treatment: Treatment, share: float, limit: float, ledger: Ledger, draws: Draws
) -> tuple[list[_Sentence], list[_Sentence], Key]:
    """The aliases before the fact, those behind it, and the key asked for."""
    before: list[_Sentence] = []
    behind: list[_Sentence] = []
    for hop in range(1, treatment.hops):
        other = _alias_key(key, ledger, draws)
        sentence = language.alias(key, other.entity)
        if treatment.alias_first == (hop == 1):
            before.append(_Sentence(_between(draws, 0.0, share), sentence))
        else:
            behind.append(_Sentence(_between(draws, share, limit), sentence))
        key = other
    return before, behind, key


def _alias_key(key: Key, ledger: Ledger, draws: Draws) -> Key:
    return ledger.key(lambda: Key(key.attribute, language.entity(draws)))


def _legend(
    kind: str, asked: Key, value: str, share: float, ledger: Ledger, draws: Draws
) -> tuple[list[_Sentence], Key]:
    """A code's value in the header, sentences that refer to the code, and the key asked for."""

    def code() -> Key:
        letter = "BCDFGHJKLMNPRSTVWZ"[draws.below(18)]
        return Key(asked.attribute, f"{letter}{draws.below(100):02d}")

    header = ledger.key(code)
    at = min(share, _between(draws, 0.0, LEGEND_SHARE))
    sentences = [
        _stated(at, kind, language.statement(kind, header), value),
        _Sentence(share, language.alias(header, asked.entity)),
    ]
    for _ in range(LEGEND_USERS):
        user = _alias_key(header, ledger, draws)
        sentences.append(_Sentence(_between(draws, at, 1.0), language.alias(header, user.entity)))
    return sentences, asked


def _neighbour(draft: _Draft, limit: float, ledger: Ledger, draws: Draws) -> _Draft:
    """The fact that stands beside an asked one, anywhere before its question."""
    kind, key, value = draft.kind, draft.key, draft.value
    match draft.treatment.neighbour:
        case "same entity":
            others = [other for other in ATTRIBUTES[kind] if other != key.attribute]
            key = ledger.key(lambda: Key(draws.pick(others), draft.key.entity))
            value = ledger.value(kind, draws)
        case "near key":
            key = ledger.key(lambda: language.near_duplicate(draft.key, draws))
            value = ledger.value(kind, draws)
        case "same value":
            key = ledger.key(lambda: language.key(kind, draws))
    before = language.statement(kind, key)
    sentence = _stated(_between(draws, 0.0, limit), kind, before, value)
    return _Draft(kind, key, value, PLAIN, (sentence,), draws.uniform())


def _unasked(kind: str, share: float, ledger: Ledger, draws: Draws) -> _Draft:
    """A fact that nobody asks for; every third in other words."""
    key = ledger.key(lambda: language.key(kind, draws))
    value = ledger.value(kind, draws)
    form = language.statement if draws.below(3) else language.paraphrase
    sentence = _stated(share, kind, form(kind, key), value)
    return _Draft(kind, key, value, PLAIN, (sentence,), draws.uniform())


def _distractors(
    draft: _Draft, drafts: Sequence[_Draft], ledger: Ledger, draws: Draws
) -> tuple[str, ...]:
    """Values of other facts of the kind, then new ones that stand nowhere."""
    own = {sentence.value for sentence in draft.sentences}
    others = {other.value for other in drafts if other.kind == draft.kind} - own
    standing = draws.shuffled(sorted(others))[:_DISTRACTORS]
    return (*standing, *(ledger.value(draft.kind, draws) for _ in range(_DISTRACTORS)))


def _in_order(drafts: Iterable[_Draft]) -> list[tuple[int, _Sentence]]:
    """Each sentence with the number of its fact, in the order in which they stand."""
    numbered = [
        ((sentence.share, -sentence.back, draft.tie, step), number, sentence)
        for number, draft in enumerate(drafts)
        for step, sentence in enumerate(draft.sentences)
    ]
    return [(number, sentence) for _, number, sentence in sorted(numbered, key=lambda n: n[0])]


def _starts(sentences: Sequence[_Sentence], length: int) -> list[int]:
    """Where each begins: at its share, moved by its neighbours and the end of the text.

    What asks for bytes ``back`` keeps them behind it, as far as the text has room before it.
    """
    starts = [int(s.share * length) - s.back - s.value_offset for s in sentences]
    _push_on(starts, sentences)
    following = length
    for number in range(len(sentences) - 1, -1, -1):
        sentence = sentences[number]
        if sentence.back:
            following = min(following, length - sentence.back + sentence.bytes_from_value)
        starts[number] = min(starts[number], following - len(sentence.text))
        following = starts[number]
    _push_on(starts, sentences)
    return starts


def _push_on(starts: list[int], sentences: Sequence[_Sentence]) -> None:
    end = 0
    for number, sentence in enumerate(sentences):
        starts[number] = max(starts[number], end)
        end = starts[number] + len(sentence.text)


@dataclass(frozen=True)
class _Spans:
    """Sentences in their places, read as records."""

    placed: tuple[tuple[int, tuple[int, _Sentence]], ...]
    length: int

    def _of(self, number: int) -> list[tuple[int, _Sentence]]:
        return [
            (start + sentence.value_offset, sentence)
            for start, (fact, sentence) in self.placed
            if fact == number and sentence.value
        ]

    def fact(self, number: int, draft: _Draft) -> Fact:
        mentions = tuple(
            Mention(start, start + len(sentence.value.encode()), sentence.value)
            for start, sentence in self._of(number)
            if not sentence.is_answer
        )
        treatment = draft.treatment
        decisive = mentions[-1 if treatment.regime == "updated" else 0]
        return Fact(
            id=number,
            kind=draft.kind,
            key=str(draft.key),
            value=draft.value,
            mentions=mentions,
            regime=treatment.regime,
            neighbour=treatment.neighbour,
            depth=decisive.start / self.length,
            hops=treatment.hops,
        )

    def question(self, number: int, draft: _Draft) -> Question:
        assert draft.place
        answers = [start for start, sentence in self._of(number) if sentence.is_answer]
        return Question(
            id=number,
            fact=number,
            place=draft.place,
            prompt=draft.prompt,
            answer=draft.value,
            distractors=draft.distractors,
            answer_start=answers[0] if answers else None,
        )


def _free_of(values: Sequence[bytes], pieces: Iterator[str]) -> Iterator[bytes]:
    """The pieces that hold none of the values; looked for in many pieces at once, for speed."""
    while True:
        batch = [piece.encode() for piece in islice(pieces, _BATCH)]
        joined = b"".join(batch)
        for value in [value for value in values if value in joined]:
            batch = [piece for piece in batch if value not in piece]
        yield from batch


def _fill(size: int, pieces: Iterator[bytes], values: Sequence[bytes]) -> Iterator[bytes]:
    """Pieces of ``size`` bytes in all, the last cut short."""
    while size:
        piece = next(pieces)
        if len(piece) > size:
            piece = _cut(piece, size)
            if any(value in piece for value in values):
                continue  # a number cut short may be another number
        yield piece
        size -= len(piece)


def _cut(piece: bytes, size: int) -> bytes:
    """The first ``size`` bytes of a longer piece, whole characters, ended as the piece ends."""
    ending = piece[len(piece.rstrip()) :]
    if piece.rstrip().endswith(b"."):
        ending = b"." + ending
    if size <= len(ending):
        return ending[len(ending) - size :]
    body = piece[: size - len(ending)].decode(errors="ignore").encode()
    return body + b" " * (size - len(ending) - len(body)) + ending
