"""The asking loop: haystacks in groups, every arm on the same ones, each answer on disk at once.

A group's prefills follow one another without a pause, so that a meter can tell their energy;
its questions are asked afterwards, over the caches that wait in memory::

    arm A   |prefill prefill prefill|  questions...     arm B   |prefill prefill ...
            one energy window          another
"""

import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from minference_green.auditing.ask import Prompt, Respondent, show
from minference_green.auditing.score import Score
from minference_green.channel import Message
from minference_green.ledger import Answered, Asked, AskedQuestion
from minference_green.methods.backend import synchronize
from minference_green.methods.method import PrefillMethod
from minference_green.results import Skip
from minference_green.torch_device import free_memory

WINDOW_SECONDS = 1.0
"""A group's prefills last as long, by repetition if need be: a counter moves every 100 ms."""

GROUP_SECONDS = 5.0
"""A group's prefills take about as long, if memory lasts: the model of a CPU's energy looks for
50 ms before and after each window, which an arm then pays once for several prompts."""

MOST_IN_GROUP = 16


class Parent(Protocol):
    """The process that owns meters and file, or the same in this one."""

    def ask(self, type_: str, **fields: Any) -> Message:
        """Tell it something and wait for its answer."""


@dataclass(frozen=True)
class Progress:
    """What of an audit is on file already."""

    asked: frozenset[tuple[int, int]]
    """Context length and haystack."""
    answered: frozenset[tuple[int, int, str]]
    """Context length, haystack and arm."""

    def has(self, length: int, method: str, haystacks: int) -> bool:
        """Whether an arm has answered its first ``haystacks`` haystacks at a length."""
        return all((length, i, method) in self.answered for i in range(haystacks))


def ask_everything(
    parent: Parent,
    respondent: Respondent,
    arms: Mapping[str, PrefillMethod],
    *,
    length: int,
    haystacks: Mapping[str, int],
    so_far: Progress,
    seconds: Mapping[str, float],
    prompts_in_memory: int,
    device: torch.device,
) -> None:
    """Put every question of every haystack to every arm at one length.

    ``haystacks`` are how many each arm is asked about, ``seconds`` what one prefill takes it,
    ``prompts_in_memory`` how many caches fit. An arm that runs out of memory, or whose answers
    have no finite probability, is skipped from there on, and the others go on.
    """
    fastest = min(seconds.values(), default=1.0)
    size = min(prompts_in_memory, MOST_IN_GROUP, math.ceil(GROUP_SECONDS / fastest))
    lost: set[str] = set()
    for number, first in enumerate(range(0, max(haystacks.values()), max(1, size))):
        group = range(first, first + max(1, size))
        prompts: dict[int, Prompt] = {}
        # Each arm comes first equally often, so that a warming device favours none.
        shift = number % max(1, len(arms))
        for name in (*list(arms)[shift:], *list(arms)[:shift]):
            left = (i for i in group if i < haystacks[name])
            todo = [i for i in left if (length, i, name) not in so_far.answered]
            if not todo or name in lost:
                continue
            for index in todo:
                if index not in prompts:
                    prompts[index] = respondent.prompt(index, length)
                    _tell_asked(parent, prompts[index], index, length, so_far)
            chosen = {index: prompts[index] for index in todo}
            whole = len(chosen) * seconds.get(name, WINDOW_SECONDS)
            rounds = max(1, math.ceil(WINDOW_SECONDS / whole)) if whole > 0 else 1
            try:
                broken = _ask_group(
                    parent, respondent, arms[name], name, length, chosen, rounds, device
                )
            except torch.OutOfMemoryError as error:
                broken = out_of_memory(error)
            if broken is not None:
                skip(parent, length, name, broken)
                lost.add(name)
                free_memory(device)


def out_of_memory(error: torch.OutOfMemoryError) -> str:
    """Why an arm is skipped, in one line."""
    return f"out of memory: {str(error).strip().splitlines()[0]}"


def skip(parent: Parent, length: int, name: str, reason: str) -> None:
    """Mark an arm that cannot run; the others go on."""
    record = Skip(block=0, context_length=length, method=name, reason=reason)
    parent.ask("record", record=record.model_dump(mode="json"))


def _ask_group(
    parent: Parent,
    respondent: Respondent,
    method: PrefillMethod,
    name: str,
    length: int,
    prompts: Mapping[int, Prompt],
    rounds: int,
    device: torch.device,
) -> str | None:
    """Prefill ``prompts`` ``rounds`` times in one energy window, then ask over the last caches.

    Returns why the arm cannot go on, if so: a log-probability that is no number.
    """
    n_tokens = rounds * sum(p.n_tokens for p in prompts.values())
    cell = {"context_length": length, "method": name}
    parent.ask("cell", step="prefilling with", **cell)
    states: dict[int, Any] = {}
    synchronize(device)
    parent.ask("ready")
    start = time.monotonic()
    for _ in range(rounds):
        for index, prompt in prompts.items():
            states.pop(index, None)  # its memory is for the next one
            show(method, prompt)
            states[index] = respondent.prefill(prompt, method)
    synchronize(device)
    parent.ask(
        "spent", what="prefill", start=start, end=time.monotonic(),
        prompts=rounds * len(prompts), tokens=n_tokens, **cell,
    )  # fmt: skip
    parent.ask("cell", step="asking over the cache of", **cell)
    parent.ask("ready")
    start = time.monotonic()
    for index, prompt in prompts.items():
        scores = respondent.answers(prompt, states.pop(index))
        wrong = sum(not math.isfinite(s.logprob) for s in scores)
        if wrong:
            return (
                f"{wrong} of {len(scores)} answers to haystack {index} have no finite probability"
            )
        record = _answered(length, index, name, scores)
        parent.ask("record", record=record.model_dump(mode="json"))
    synchronize(device)
    parent.ask(
        "spent", what="questions", start=start, end=time.monotonic(), prompts=len(prompts),
        tokens=0, **cell,
    )  # fmt: skip
    return None


def _tell_asked(parent: Parent, prompt: Prompt, index: int, length: int, so_far: Progress) -> None:
    if (length, index) in so_far.asked:
        return
    record = asked(prompt, index, length)
    parent.ask("record", record=record.model_dump(mode="json"))


def asked(prompt: Prompt, index: int, length: int) -> Asked:
    """What a haystack asks, as a record."""
    facts = {fact.id: fact for fact in prompt.haystack.facts}
    return Asked(
        context_length=length,
        haystack=index,
        tokens=prompt.ids.shape[1],
        text_sha256=hashlib.sha256(prompt.haystack.text).hexdigest(),
        questions=tuple(
            AskedQuestion(
                question=ready.question.id,
                fact=ready.question.fact,
                kind=(fact := facts[ready.question.fact]).kind,
                place=ready.question.place,
                depth=fact.depth,
                regime=fact.regime,
                neighbour=fact.neighbour,
                hops=fact.hops,
                mentions=len(fact.mentions),
                answer_bytes=len(ready.question.answer.encode()),
                answer_tokens=len(ready.probe.answer),
            )
            for ready in prompt.questions
        ),
    )


def _answered(length: int, index: int, name: str, scores: Sequence[Score]) -> Answered:
    return Answered(
        context_length=length,
        haystack=index,
        method=name,
        first_right=tuple(s.first_right for s in scores),
        rest_right=tuple(s.rest_right for s in scores),
        logprob=tuple(_short(s.logprob) for s in scores),
        first_logprob=tuple(_short(s.first_logprob) for s in scores),
        margin=tuple(None if s.margin is None else _short(s.margin) for s in scores),
        fresh_margin=tuple(
            None if s.fresh_margin is None else _short(s.fresh_margin) for s in scores
        ),
        preference=tuple(None if s.preference is None else _short(s.preference) for s in scores),
    )


def _short(nats: float) -> float:
    """Six digits: more are rounding, and an audit holds tens of thousands."""
    return float(f"{nats:.6g}")
