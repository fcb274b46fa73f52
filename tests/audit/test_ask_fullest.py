"""What does not fit is told before an audit has a file, whichever haystack it is."""

import pytest
import torch

from minference_green.auditing.ask import ModelRespondent
from minference_green.auditing.worker import serve
from minference_green.corpus.recipe import Recipe
from minference_green.errors import UsageError
from minference_green.ledger import AuditPlan
from minference_green.model.loading import LoadedModel, load
from minference_green.model.text import Bytes

RECIPE = Recipe(inside=7, after=7, end=1, competitors=1)
HAYSTACKS = 9
SEED = 1


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return load("embedded", device=torch.device("cpu"), dtype=torch.float32)


class Silence:
    """A parent that must not be told anything."""

    def ask(self, type_, **fields):
        raise AssertionError(f"told {type_} of an audit that cannot be")


def longest_refused(respondent: ModelRespondent, index: int) -> int:
    """The longest prompt that does not hold a haystack, by halves."""
    low, high = 1000, 8000
    while high - low > 1:
        length = (low + high) // 2
        try:
            respondent.prompt(index, length)
            high = length
        except UsageError:
            low = length
    return low


def test_the_fullest_haystack_is_the_one_that_needs_the_longest_prompt(model: LoadedModel) -> None:
    respondent = ModelRespondent(model, Bytes((256,)), SEED, "prose", RECIPE)
    needed = [longest_refused(respondent, i) for i in range(HAYSTACKS)]
    assert needed[respondent.fullest(HAYSTACKS)] == max(needed) > needed[0]


@pytest.mark.parametrize("options", [{}, {"oracle-keys": {"density": "0.1"}}])
def test_a_yardstick_that_cannot_be_so_long_is_told_before_anything_is_recorded(
    model: LoadedModel, options: dict[str, dict[str, str]]
) -> None:
    plan = AuditPlan(
        context_lengths=(4096, 20_000), haystacks=1, noise_haystacks=1, inside=7, after=7,
        end=1, competitors=1, kinds=RECIPE.kinds, filler="prose", seed=0, dtype="float32",
        margin_points=2.0, quick=False,
    )  # fmt: skip
    task = {
        "plan": plan.model_dump(mode="json"),
        "methods": ["dense", "a-shape", "oracle-keys"],
        "options": options,
    }
    with pytest.raises(UsageError, match="up to 16384 tokens, got 20000; use the method oracle"):
        serve(Silence(), task, torch.device("cpu"), model)


def test_a_later_haystack_that_does_not_fit_is_told_before_anything_is_recorded(
    model: LoadedModel,
) -> None:
    respondent = ModelRespondent(model, Bytes((256,)), SEED, "prose", RECIPE)
    length = longest_refused(respondent, respondent.fullest(HAYSTACKS))
    respondent.prompt(0, length)  # the first does fit
    plan = AuditPlan(
        context_lengths=(length,), haystacks=HAYSTACKS, noise_haystacks=1, inside=7, after=7,
        end=1, competitors=1, kinds=RECIPE.kinds, filler="prose", seed=SEED, dtype="float32",
        margin_points=2.0, quick=False,
    )  # fmt: skip
    task = {"plan": plan.model_dump(mode="json"), "methods": ["dense"], "options": {}}

    with pytest.raises(UsageError, match="too short for 15 questions"):
        serve(Silence(), task, torch.device("cpu"), model)
