"""Puts a haystack's questions to a model: one prefill, many answers over its cache.

A question at the prompt's end needs a prompt of its own, whose last rows are that question and
not the text's: a second prefill.

Nothing is generated. The right answer is given token by token, and each of its tokens must be
the most likely one; that holds exactly when greedy decoding would write the answer::

    inside   ... Question? Answer: 4821.   rows of the prompt itself, made by the method
    end      ... Question? Answer: |4821   the prompt's last row, then dense rows over the cache
    after    |Question? Answer: 4821       dense rows over the cache, none sees another question

Only rows that predict an answer's token go through the model's head.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor

from minference_green.auditing.score import Probe, Rival, Score, rival, score
from minference_green.corpus.filler import OwnText
from minference_green.corpus.haystack import haystack, plan
from minference_green.corpus.language import ANSWER_END
from minference_green.corpus.recipe import Recipe
from minference_green.corpus.records import Fact, Haystack, Question
from minference_green.errors import UsageError
from minference_green.methods.apart import Apart
from minference_green.methods.dense import Dense
from minference_green.methods.method import PrefillMethod, SeeingMethod
from minference_green.model.attention import switched
from minference_green.model.decode import check_cache
from minference_green.model.loading import LoadedModel
from minference_green.model.text import Encoder, Tokens

ANY_BYTES = 2**24
"""A length at which every recipe has room."""

FILLED = 0.97
"""Where tokens are not bytes, a prompt is at least this share of the length asked for."""


Continuation = tuple[tuple[int, ...], int]
"""Tokens over a cache, and of how many of the last the logits are wanted."""


@dataclass(frozen=True)
class Ready:
    """A question in tokens: what stands before the answer, and how the answer is judged."""

    question: Question
    before: tuple[int, ...]
    """Tokens of the question up to the answer; empty inside, where they stand in the prompt."""
    probe: Probe


@dataclass(frozen=True)
class Prompt:
    """A haystack in a model's tokens."""

    haystack: Haystack
    ids: Tensor
    """``[1, N]``: the model's opening and the text."""
    rows: Tensor
    """Rows that predict the tokens of inside answers, in the order of ``inside``; the last row
    where there are none."""
    inside: tuple[Ready, ...]
    end: Ready | None
    after: tuple[Ready, ...]
    spans: Callable[[int, int], tuple[int, int]]
    """From bytes ``[start, end)`` of the text to tokens ``[first, last)`` of ``ids``."""

    @property
    def n_tokens(self) -> int:
        """Of all its prefills: the text, and with an end question the text once more before it."""
        once = self.ids.shape[1]
        return once if self.end is None else 2 * once + len(self.end.before)

    @property
    def questions(self) -> tuple[Ready, ...]:
        """All of them, in the order their scores come in."""
        return (*self.inside, *(() if self.end is None else (self.end,)), *self.after)


@dataclass(frozen=True)
class Prefilled:
    """What the prefills of one haystack left."""

    logits: Tensor
    """``[R, vocabulary]`` of the prompt's rows."""
    cache: Any
    end_logits: Tensor | None
    """``[1, vocabulary]`` of the last row behind the end question."""
    end_cache: Any | None


class Respondent(Protocol):
    """What answers the questions: a model, or a stand-in with known answers."""

    def prompt(self, index: int, length: int) -> Prompt:
        """The haystack of this index as a prompt of ``length`` tokens."""

    def prefill(self, prompt: Prompt, method: PrefillMethod) -> Any:
        """Prefill it with a method; all of this is inside the method's energy window."""

    def answers(self, prompt: Prompt, prefilled: Any) -> list[Score]:
        """A score per question, in the order of ``prompt.questions``."""


@dataclass(frozen=True)
class ModelRespondent:
    """Asks a loaded model."""

    model: LoadedModel
    encoder: Encoder
    seed: int
    filler: str | OwnText
    recipe: Recipe

    def prompt(self, index: int, length: int) -> Prompt:
        """See :class:`Respondent`. Raises ``UsageError`` if the model is not made for it."""
        self.model.check_length(length)
        check_cache(self.model.model)
        try:
            found, text = self._fitted(index, length)
        except UsageError as error:
            raise UsageError(f"--context {length}: {error}") from error
        return lay_out(found, text, self.encoder, self.model.model.device)

    def fullest(self, haystacks: int) -> int:
        """Of the first ``haystacks`` the one that needs most bytes: where it fits, all do."""

        def needed(index: int) -> int:
            made = plan(self.seed, index, length=ANY_BYTES, recipe=self.recipe)
            ends = (q.prompt for q in made.questions if q.place == "end")
            return sum(len(text) for _, text in made.sentences) + len(next(ends, "").encode())

        return max(range(haystacks), key=needed)

    @torch.inference_mode()
    def prefill(self, prompt: Prompt, method: PrefillMethod) -> Prefilled:
        """See :class:`Respondent`."""
        end_logits = end_cache = None
        with switched(self.model.model, method, dense=Dense()):
            logits, cache = self._prefill(prompt.ids, prompt.rows)
            if prompt.end is not None:
                question = torch.tensor([prompt.end.before], device=prompt.ids.device)
                end_logits, end_cache = self._prefill(torch.cat([prompt.ids, question], 1), 1)
        return Prefilled(logits, cache, end_logits, end_cache)

    @torch.inference_mode()
    def answers(self, prompt: Prompt, prefilled: Prefilled) -> list[Score]:
        """See :class:`Respondent`; dense attention over the caches, which are used up."""
        probes = [r.probe for r in prompt.inside]
        scores = score(prefilled.logits[: sum(len(p.answer) for p in probes)], probes)
        if prompt.end is not None:
            assert prefilled.end_logits is not None
            # The prompt's last row predicts the first token, the cache the others.
            rows = [prefilled.end_logits]
            if rest := prompt.end.probe.answer[:-1]:
                rows.append(self._go_on(prefilled.end_cache, [(rest, len(rest))]))
            scores += score(torch.cat(rows), [prompt.end.probe])
        asked = [
            ((*ready.before, *ready.probe.answer[:-1]), len(ready.probe.answer))
            for ready in prompt.after
        ]
        if asked:
            found = [self._go_on(prefilled.cache, some) for some in self._at_once(asked)]
            scores += score(torch.cat(found), [ready.probe for ready in prompt.after])
        return scores

    def _prefill(self, ids: Tensor, keep: int | Tensor) -> tuple[Tensor, Any]:
        out = self.model.model(input_ids=ids, use_cache=True, logits_to_keep=keep)
        return out.logits[0], out.past_key_values

    def _at_once(self, asked: Sequence[Continuation]) -> list[Sequence[Continuation]]:
        """What can go through the model in one pass: all on a CPU, else one by one.

        One by one also where a layer has a window: there the model makes a mask of its own, in
        which questions would see each other.
        """
        with switched(self.model.model, Dense(), dense=Dense()) as state:
            alone = state.dense_layers or self.model.model.device.type != "cpu"
        return [[one] for one in asked] if alone else [asked]

    def _go_on(self, cache: Any, asked: Sequence[Continuation]) -> Tensor:
        """Logits of the last rows of each continuation of the cache, which is left as it was."""
        lengths = tuple(len(tokens) for tokens, _ in asked)
        n_held, device = cache.get_seq_length(), self.model.model.device
        ends = accumulate(lengths)
        keep = [row for end, (_, n) in zip(ends, asked, strict=True) for row in range(end - n, end)]
        ids = [token for tokens, _ in asked for token in tokens]
        positions = [n_held + i for n in lengths for i in range(n)]
        # A window's layer has dropped what a crop would need; its few tensors are put back.
        windows = [(layer, dict(vars(layer))) for layer in cache.layers if layer.is_sliding]
        dense = Apart(lengths) if len(asked) > 1 else Dense()
        with switched(self.model.model, dense, dense=dense):
            out = self.model.model(
                input_ids=torch.tensor([ids], device=device),
                position_ids=torch.tensor([positions], device=device),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=torch.tensor(keep, device=device),
            )
        for layer in cache.layers:
            if not layer.is_sliding:
                layer.crop(-len(ids))
        for layer, before in windows:
            vars(layer).update(before)
        logits: Tensor = out.logits[0]
        return logits

    def _fitted(self, index: int, length: int) -> tuple[Haystack, Tokens]:
        """The haystack whose longest prompt has ``length`` tokens, or not quite if no bytes."""
        # The questions are the same at every length.
        questions = plan(self.seed, index, length=ANY_BYTES, recipe=self.recipe).questions
        end = next((q for q in questions if q.place == "end"), None)
        rest = 0 if end is None else len(_tokens(end.prompt, end.answer, self.encoder)[0])
        wanted = length - len(self.encoder.opening) - rest
        if self.encoder.bytes_per_token:
            return self._made(index, wanted)
        n_bytes = 4 * wanted
        for _ in range(8):
            found, text = self._made(index, n_bytes)
            if FILLED * wanted <= len(text.ids) <= wanted:
                return found, text
            n_bytes = int(n_bytes * (1 + FILLED) / 2 * wanted / len(text.ids))
        raise UsageError(
            f"cannot make a text of {wanted} tokens for {self.model.spec}: the last of 8 tries "
            f"had {len(text.ids)} from {n_bytes} bytes; use another --filler or length"
        )

    def _made(self, index: int, n_bytes: int) -> tuple[Haystack, Tokens]:
        found = haystack(self.seed, index, length=n_bytes, filler=self.filler, recipe=self.recipe)
        return found, self.encoder.encode(found.text.decode())


def lay_out(
    found: Haystack,
    text: Tokens,
    encoder: Encoder,
    device: torch.device,
) -> Prompt:
    """Opening and text as token ids, and every question ready to be asked.

    Of several end questions the first is asked: a prompt has one end.
    """
    facts = {fact.id: fact for fact in found.facts}
    shift = len(encoder.opening)

    def spans(start: int, end: int) -> tuple[int, int]:
        first, last = text.of(start, end)
        return first + shift, last + shift

    inside: list[Ready] = []
    rows: list[int] = []
    for question in (q for q in found.questions if q.place == "inside"):
        assert question.answer_start is not None
        end = question.answer_start + len(question.answer.encode())
        first, last = text.of(question.answer_start, end)
        answer = tuple(text.ids[first:last])
        inside.append(Ready(question, (), _probe(question, facts[question.fact], answer, encoder)))
        rows += range(first + shift - 1, last + shift - 1)
    ends = (q for q in found.questions if q.place == "end")
    at_end = next((_ready(q, facts[q.fact], encoder) for q in ends), None)
    ids = [*encoder.opening, *text.ids]
    return Prompt(
        haystack=found,
        ids=torch.tensor([ids], device=device),
        rows=torch.tensor(rows or [len(ids) - 1], device=device),
        inside=tuple(inside),
        end=at_end,
        after=tuple(
            _ready(q, facts[q.fact], encoder) for q in found.questions if q.place == "after"
        ),
        spans=spans,
    )


def show(method: PrefillMethod, prompt: Prompt) -> None:
    """Let a method that wants to know the prompt look at it, before it is prefilled."""
    if isinstance(method, SeeingMethod):
        method.see(prompt.haystack, prompt.spans)


def _ready(question: Question, fact: Fact, encoder: Encoder) -> Ready:
    before, answer = _tokens(question.prompt, question.answer, encoder)
    return Ready(question, before, _probe(question, fact, answer, encoder))


def _tokens(prompt: str, value: str, encoder: Encoder) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Tokens of a question up to its answer, and of the answer.

    A token that holds the space before the answer and its beginning belongs to the answer.
    """
    tokens = encoder.encode(prompt + value + ANSWER_END)
    start = len(prompt.encode())
    first, last = tokens.of(start, start + len(value.encode()))
    return tuple(tokens.ids[:first]), tuple(tokens.ids[first:last])


def _probe(question: Question, fact: Fact, answer: tuple[int, ...], encoder: Encoder) -> Probe:
    """The answer's tokens beside its distractors': those in the text first, four that are not."""

    def against(value: str) -> Rival | None:
        return rival(answer, _tokens(question.prompt, value, encoder)[1])

    in_text = len(question.distractors) - FRESH_DISTRACTORS
    present = [r for value in question.distractors[:in_text] if (r := against(value))]
    fresh = [r for value in question.distractors[in_text:] if (r := against(value))]
    other = None
    if fact.regime == "conflicting":
        other = against(next(m.value for m in fact.mentions if m.value != fact.value))
    return Probe(answer, tuple(present), tuple(fresh), other)


FRESH_DISTRACTORS = 4
"""Of a question's distractors the last four stand nowhere in the text."""
