"""Audits with known answers: a stand-in for a model, and files made from what it says."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from minference_green.auditing.ask import Prompt, lay_out
from minference_green.auditing.audit import InProcess, audit
from minference_green.auditing.loop import Progress, ask_everything
from minference_green.auditing.plan import AuditRequest
from minference_green.auditing.score import Score
from minference_green.corpus.haystack import DEFAULT, haystack
from minference_green.corpus.kinds import KINDS
from minference_green.corpus.recipe import Recipe
from minference_green.corpus.records import Fact
from minference_green.ledger import NOISE_FLOOR, Audit, load_audit
from minference_green.model.text import Bytes

Wrong = Callable[[str, int, Fact, str], bool]
"""Whether an arm errs, from its name, the haystack's number, the fact and the question's place."""


class Quiet:
    """Progress nobody watches."""

    def begin(self, done: int, of: int) -> None: ...
    def say(self, message: str) -> None: ...
    def advance(self) -> None: ...


class Named:
    """An arm that is only a name."""

    parameters: Mapping[str, Any] = {}

    def __init__(self, name: str) -> None:
        self.name = name

    def attend(self, q, k, v, *, scale, layer):
        raise AssertionError("a stand-in runs no model")


class StandIn:
    """Answers as ``wrong`` says, from real haystacks."""

    def __init__(self, wrong: Wrong, recipe: Recipe = DEFAULT) -> None:
        self.wrong, self.recipe = wrong, recipe

    def prompt(self, index: int, length: int) -> Prompt:
        found = haystack(0, index, length=length - 200, recipe=self.recipe)
        encoder = Bytes((256,))
        text = encoder.encode(found.text.decode())
        return lay_out(found, text, encoder, torch.device("cpu"))

    def prefill(self, prompt, method):
        return method.name

    def answers(self, prompt: Prompt, prefilled: str) -> list[Score]:
        facts = {f.id: f for f in prompt.haystack.facts}
        scores = []
        for ready in prompt.questions:
            place, fact = ready.question.place, facts[ready.question.fact]
            wrong = self.wrong(prefilled, prompt.haystack.index, fact, place)
            conflicting = fact.regime == "conflicting"
            scores.append(
                Score(
                    first_right=not wrong,
                    rest_right=True,
                    logprob=-5.0 if wrong else -0.5,
                    first_logprob=-4.5 if wrong else -0.25,
                    margin=-2.0 if wrong else 3.0,
                    fresh_margin=5.0,
                    preference=(-1.0 if prefilled == "a-shape" else 1.0) if conflicting else None,
                )
            )
        return scores


@pytest.fixture(scope="session")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Audit]:
    """An audit of a stand-in that errs as told, written and read as any other."""

    def make(wrong: Wrong, *, haystacks: int = 24, arms=("dense", "a-shape"), **request) -> Audit:
        length = 12 * 1024
        respondent = StandIn(wrong)
        names = (*arms, NOISE_FLOOR)

        def serve(conversation) -> None:
            parent = InProcess(conversation)
            parent.ask("hello", device={"kind": "cpu"})
            parent.ask(
                "loaded",
                model="a stand-in",
                revision="1",
                weights="trained",
                parameters=1000,
                rest="stock",
                methods=[{"name": n, "parameters": {}} for n in names],
            )
            ask_everything(
                parent,
                respondent,
                {n: Named(n) for n in names},
                length=length,
                haystacks=dict.fromkeys(names, haystacks) | {NOISE_FLOOR: 1},
                so_far=Progress(frozenset(), frozenset()),
                seconds=dict.fromkeys(names, 1.0),
                prompts_in_memory=4,
                device=torch.device("cpu"),
            )

        asked = AuditRequest(
            methods=arms, context_lengths=(length,), haystacks=haystacks, meter="none", **request
        )
        return load_audit(audit(asked, tmp_path_factory.mktemp("audits"), Quiet(), serve))

    return make


@pytest.fixture(scope="session")
def kinds() -> tuple[str, ...]:
    """Every kind of information."""
    return KINDS


@pytest.fixture(scope="session")
def stand_in() -> type[StandIn]:
    """The stand-in itself."""
    return StandIn


@pytest.fixture(scope="session")
def named() -> type[Named]:
    """An arm that is only a name."""
    return Named


@pytest.fixture(scope="session")
def quiet() -> Quiet:
    """Progress nobody watches."""
    return Quiet()
