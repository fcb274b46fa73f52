"""Models whose cache drops what it has seen: asked over it, or refused before anything runs."""

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3NextConfig, Qwen3NextForCausalLM

from minference_green.auditing.arms import EqualDensity
from minference_green.auditing.ask import ModelRespondent
from minference_green.auditing.score import score
from minference_green.auditing.worker import _prepare
from minference_green.corpus.recipe import Recipe
from minference_green.methods.dense import Dense
from minference_green.methods.patterns import AShape
from minference_green.methods.sparse import uniform
from minference_green.model.attention import UnsupportedModelError
from minference_green.model.loading import LoadedModel
from minference_green.model.text import Bytes

RECIPE = Recipe(inside=0, after=3, end=1, competitors=0)
SIZES = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048,
}  # fmt: skip


def respondent(network: torch.nn.Module) -> ModelRespondent:
    model = LoadedModel(
        model=network.double().eval().requires_grad_(False), spec="tiny", revision="1",
        weights="trained", parameters=1, max_context=2048, vocabulary=320, bos=256, patterns=None,
        allow_longer=False, directory=None,
    )  # fmt: skip
    return ModelRespondent(model, Bytes((256,)), 0, "prose", RECIPE)


@pytest.mark.parametrize("window", [40, 1500], ids=["passed by the prompt", "never passed"])
def test_a_window_shorter_than_the_prompt_changes_no_answer(window: int) -> None:
    torch.manual_seed(0)
    config = Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=window,
        layer_types=["full_attention", "sliding_attention"],
    )  # fmt: skip
    asked = respondent(Qwen2ForCausalLM(config))
    prompt = asked.prompt(0, 1300)
    found = asked.answers(prompt, asked.prefill(prompt, Dense()))
    assert len(found) == 4
    for ready, ours in zip(prompt.questions, found, strict=True):
        tokens = [*prompt.ids[0].tolist(), *ready.before, *ready.probe.answer[:-1]]
        with torch.inference_mode():
            logits = asked.model.model(input_ids=torch.tensor([tokens]), use_cache=False).logits
        (expected,) = score(logits[0, -len(ready.probe.answer) :], [ready.probe])
        assert ours.logprob == pytest.approx(expected.logprob, abs=1e-4)


def test_a_yardstick_takes_the_density_of_the_same_layer_where_others_have_windows() -> None:
    torch.manual_seed(0)
    config = Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=40,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    asked = respondent(Qwen2ForCausalLM(config))
    told = []

    class Parent:
        def ask(self, type_, **fields):
            told.extend([fields["record"]] if type_ == "record" else [])
            return {}

    arms = {
        "a-shape": uniform("a-shape", AShape(8, 64)),
        "random": EqualDensity("random", "a-shape", 0),
    }
    task = {"computed": [], "backends": {}, "plan": {"dtype": "float32"}}
    ready = _prepare(Parent(), task, asked, arms, 1300, asked.model)
    assert list(ready.arms) == ["a-shape", "random"]
    window, random = (record["density_by_layer"] for record in told)
    assert window[0] == random[0] == []
    assert len(window[1]) == 4
    assert random[1] == pytest.approx(window[1], rel=0.2)


def test_a_recurrent_state_is_refused_before_anything_is_prefilled() -> None:
    config = Qwen3NextConfig(
        **SIZES, layer_types=["linear_attention", "full_attention"], head_dim=8, num_experts=2,
        num_experts_per_tok=1, moe_intermediate_size=16, shared_expert_intermediate_size=16,
        linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8,
        linear_value_head_dim=8,
    )  # fmt: skip
    asked = respondent(Qwen3NextForCausalLM(config))
    with pytest.raises(UnsupportedModelError, match="a question cannot be taken back"):
        asked.prompt(0, 1300)
