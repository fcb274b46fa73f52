"""The hook: what a method is asked, what dense is asked, and that nothing stays behind."""

import copy
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache, StaticCache

from minference_green.errors import UsageError
from minference_green.model.attention import (
    IMPLEMENTATION,
    UnsupportedCallError,
    UnsupportedModelError,
    switched,
)

FAMILIES = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "phi3": ("Phi3Config", {}),
    "phi3 window beyond its length": ("Phi3Config", {"sliding_window": 512}),
    "glm": ("GlmConfig", {"head_dim": 8}),
    "multi-query": ("LlamaConfig", {"num_key_value_heads": 1}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_method_equal_to_dense_gives_the_models_own_logits(family, build, ids, watching):
    name, settings = FAMILIES[family]
    model = build(name, **settings)
    prompt = ids(13, batch=2)
    expected = model(prompt).logits
    method, dense = watching(), watching("dense")
    with switched(model, method, dense=dense) as state:
        logits = model(prompt).logits
    torch.testing.assert_close(logits, expected, rtol=2e-4, atol=2e-4)
    assert dict(state.dense_layers) == {}
    assert [call[0] for call in method.calls] == [0, 1]
    assert dense.calls == []


def test_the_method_sees_key_heads_unexpanded_and_the_models_scale(build, ids, watching):
    model = build("LlamaConfig", head_dim=16)
    method = watching()
    with switched(model, method, dense=method):
        model(ids(5))
    assert method.calls[0] == (0, (1, 4, 5, 16), (1, 2, 5, 16), 16**-0.5)


def test_another_method_changes_the_logits(build, ids, watching):
    model = build("LlamaConfig")
    prompt = ids(29)
    expected = model(prompt).logits
    with switched(model, watching(window=3), dense=watching()):
        logits = model(prompt).logits
    assert (logits - expected).abs().max() > 0.01


@pytest.mark.parametrize("before", ["sdpa", "eager"])
def test_the_model_is_given_back_bit_for_bit(before, build, ids, watching):
    model = build("LlamaConfig")
    model.set_attn_implementation(before)
    prompt = ids(17)
    expected = model(prompt).logits
    with switched(model, watching(window=3), dense=watching()):
        model(prompt)
    assert model.config._attn_implementation == before
    assert torch.equal(model(prompt).logits, expected)


def test_the_model_is_given_back_after_an_exception(build, ids, failing, watching):
    model = build("LlamaConfig")
    prompt = ids(17)
    expected = model(prompt).logits
    with (
        pytest.raises(ArithmeticError, match="on purpose"),
        switched(model, failing, dense=watching()),
    ):
        model(prompt)
    assert torch.equal(model(prompt).logits, expected)


def test_a_switch_inside_a_switch_ends_with_it(build, ids, watching):
    model = build("LlamaConfig")
    outer, inner, dense = watching(), watching(), watching()
    with switched(model, outer, dense=dense):
        with switched(model, inner, dense=dense):
            model(ids(4))
        model(ids(4))
    assert len(inner.calls) == len(outer.calls) == 2
    assert model.config._attn_implementation == "sdpa"


def test_two_models_keep_their_own_methods(build, ids, watching):
    first, second = build("LlamaConfig"), build("Qwen2Config")
    methods = watching(), watching()
    dense = watching()
    with switched(first, methods[0], dense=dense), switched(second, methods[1], dense=dense):
        first(ids(4))
        assert (len(methods[0].calls), len(methods[1].calls)) == (2, 0)
        second(ids(6))
    assert (len(methods[0].calls), len(methods[1].calls)) == (2, 2)


def test_decode_after_a_sparse_prefill_is_dense_over_its_cache(build, ids, watching):
    """Each generated step's logits are those of plain attention over the sparse cache."""
    model = build("LlamaConfig")
    prompt = ids(23)
    method, dense = watching(window=5), watching("dense")
    with switched(model, method, dense=dense):
        cache = DynamicCache(config=model.config)
        first = model(prompt, past_key_values=cache, logits_to_keep=1).logits[:, -1]
        kept = copy.deepcopy(cache)
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=5,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    assert {call[1][2] for call in method.calls} == {23}
    assert {(call[1][2], call[2][2]) for call in dense.calls} == {(1, n) for n in range(24, 28)}
    expected = [first]
    for step in range(4):
        token = out.sequences[:, 23 + step : 24 + step]
        expected.append(model(token, past_key_values=kept).logits[:, -1])
    torch.testing.assert_close(torch.stack(out.logits), torch.stack(expected), rtol=2e-4, atol=2e-4)
    dense_first = model(prompt, logits_to_keep=1).logits[:, -1]
    assert (dense_first - first).abs().max() > 0.01  # the prefill was not dense


def test_generate_with_a_method_equal_to_dense_is_the_models_own(build, ids, watching):
    model = build("Qwen2Config")
    prompt = ids(11, batch=2)
    settings = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 6, "do_sample": False}
    expected = model.generate(prompt, **settings)
    with switched(model, watching(), dense=watching()):
        assert torch.equal(model.generate(prompt, **settings), expected)


def test_a_question_over_a_cache_goes_to_dense(build, ids, watching):
    model = build("LlamaConfig")
    prompt, question = ids(9), ids(4, seed=5)
    cache = DynamicCache(config=model.config)
    model(prompt, past_key_values=cache)
    expected = model(question, past_key_values=copy.deepcopy(cache)).logits
    method, dense = watching(), watching("dense")
    with switched(model, method, dense=dense):
        logits = model(question, past_key_values=cache).logits
    assert method.calls == []
    assert dense.calls[0][1:3] == ((1, 4, 4, 8), (1, 2, 13, 8))
    torch.testing.assert_close(logits, expected, rtol=2e-4, atol=2e-4)


def test_a_prompt_of_one_token_goes_to_dense(build, ids, watching):
    model = build("LlamaConfig")
    method, dense = watching(), watching("dense")
    with switched(model, method, dense=dense):
        model(ids(1))
    assert (len(method.calls), len(dense.calls)) == (0, 2)


@pytest.mark.parametrize("length", [5, 8, 9, 30])  # below, at and beyond the window of 8
def test_layers_with_a_window_keep_their_own_path_and_say_so(length, build, ids, watching):
    model = build("Qwen2Config", use_sliding_window=True, sliding_window=8, max_window_layers=1)
    prompt, question = ids(length), ids(3, seed=5)
    cache = DynamicCache(config=model.config)
    expected = model(prompt, past_key_values=cache).logits
    expected_answer = model(question, past_key_values=cache).logits
    method, dense = watching(), watching("dense")
    with switched(model, method, dense=dense) as state:
        cache = DynamicCache(config=model.config)
        logits = model(prompt, past_key_values=cache).logits
        answer = model(question, past_key_values=cache).logits
    assert dict(state.dense_layers) == {1: "sliding window of 8 tokens"}
    assert [call[0] for call in method.calls] == [0]
    torch.testing.assert_close(logits, expected, rtol=2e-4, atol=2e-4)
    torch.testing.assert_close(answer, expected_answer, rtol=2e-4, atol=2e-4)


MLA = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 8,
    "first_k_dense_replace": 1,
}


@pytest.mark.parametrize(
    ("config", "settings", "reason"),
    [
        ("Gemma2Config", {"head_dim": 8}, r"soft-capped at 50\.0"),
        ("MistralConfig", {"sliding_window": 64}, "sliding window of 64 tokens"),
        ("DeepseekV3Config", MLA, r"latent \(MLA, kv_lora_rank 8\)"),
        ("GptOssConfig", {"head_dim": 8, "num_local_experts": 2}, "learned sink logits"),
        ("BertConfig", {}, "bidirectional"),
        ("BloomConfig", {"n_head": 4, "n_layer": 2}, "no layer that uses transformers' attention"),
        ("FalconConfig", {"alibi": False}, "does not use transformers' attention interface"),
    ],
)
def test_a_model_no_layer_of_which_can_be_served_is_refused(
    config, settings, reason, build, ids, watching
):
    model = build(config, **settings)
    with (
        pytest.raises(UnsupportedModelError, match=reason),
        switched(model, watching(), dense=watching()),
    ):
        pass
    assert model.config._attn_implementation != IMPLEMENTATION


def test_a_model_composed_of_several_is_refused(watching):
    from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    small = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    config = LlavaConfig(
        text_config=LlamaConfig(vocab_size=40, num_hidden_layers=1, **small),
        vision_config={
            "model_type": "clip_vision_model",
            "image_size": 4,
            "patch_size": 2,
            "num_hidden_layers": 1,
            **small,
        },
    )
    model = LlavaForConditionalGeneration(config).eval()
    with (
        pytest.raises(UnsupportedModelError, match=r"several models \(.*text_config"),
        switched(model, watching(), dense=watching()),
    ):
        pass


def test_a_model_in_training_mode_is_refused(build, watching):
    model = build("LlamaConfig").train()
    with (
        pytest.raises(UnsupportedModelError, match=r"training mode \(call model.eval\(\)\)"),
        switched(model, watching(), dense=watching()),
    ):
        pass


CALLS = {
    "padding": (
        lambda prompt: {"attention_mask": torch.tensor([[0] * 3 + [1] * 6, [1] * 9])},
        r"marks padding \(real tokens per prompt: \[6, 9\]\)",
    ),
    "packed sequences": (
        lambda prompt: {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])},
        "that is not plain causal",
    ),
    "a mask of the caller's": (
        lambda prompt: {"attention_mask": torch.ones(1, 1, 9, 9).tril() > 0},
        r"an attention mask \(1, 1, 9, 9\) that is not plain causal",
    ),
    "an argument that would be ignored": (
        lambda prompt: {"s_aux": torch.zeros(4)},
        r"passes s_aux=\(4,\) float32, which the prefill methods would ignore",
    ),
    "attention weights": (
        lambda prompt: {"output_attentions": True},
        "passes output_attentions=True",
    ),
    "bidirectional attention": (lambda prompt: {"is_causal": False}, "is_causal=False"),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_call_the_methods_cannot_honour_is_refused(call, build, ids, watching):
    arguments, reason = CALLS[call]
    model = build("LlamaConfig")
    prompt = ids(9, batch=2)
    with (
        pytest.raises(UnsupportedCallError, match=reason),
        switched(model, watching(), dense=watching()),
    ):
        model(prompt, use_cache=False, **arguments(prompt))


def test_a_mask_of_ones_is_no_padding(build, ids, watching):
    model = build("LlamaConfig")
    prompt = ids(9, batch=2)
    method = watching()
    with switched(model, method, dense=watching()):
        model(prompt, attention_mask=torch.ones_like(prompt))
    assert len(method.calls) == 2


def test_a_static_cache_is_refused_with_its_size(build, ids, watching):
    model = build("LlamaConfig")
    cache = StaticCache(config=model.config, max_cache_len=32)
    with (
        pytest.raises(UnsupportedCallError, match="holds 32 positions for a sequence of 9 tokens"),
        switched(model, watching(), dense=watching()),
    ):
        model(ids(9), past_key_values=cache)


def test_dropout_is_refused(build, ids, watching):
    model = build("LlamaConfig", attention_dropout=0.25)
    with (
        pytest.raises(UnsupportedCallError, match=r"attention dropout 0\.25"),
        switched(model, watching(), dense=watching()),
    ):
        model.train()
        model(ids(9))


def test_a_prompt_beyond_a_window_that_covered_the_models_length_is_refused(build, ids, watching):
    model = build("Phi3Config", max_position_embeddings=16, sliding_window=16)
    method = watching()
    with switched(model, method, dense=watching()):
        model(ids(16))
        with pytest.raises(UnsupportedCallError, match="longer than the layer's window"):
            model(ids(17))
    assert {call[1][2] for call in method.calls} == {16}


def test_a_method_that_returns_another_shape_is_named(build, ids, watching):
    model = build("LlamaConfig")
    method = SimpleNamespace(
        name="careless", parameters={}, attend=lambda q, k, v, **_: q.transpose(1, 2)
    )
    with (
        pytest.raises(UsageError, match=r"'careless' returned \(1, 9, 4, 8\) float32"),
        switched(model, method, dense=watching()),
    ):
        model(ids(9))
