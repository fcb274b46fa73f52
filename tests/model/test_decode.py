"""Decode in memory that stays in place: the tokens of stock generation, step by step."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicSlidingWindowLayer

from minference_green.kernels.reference import attention, causal_mask
from minference_green.methods.dense import Dense
from minference_green.model.attention import UnsupportedModelError, switched
from minference_green.model.decode import Decoder, RoomyLayer

LENGTH, TOKENS = 23, 11  # neither fills a tile

FAMILIES = {
    "llama, grouped": ("LlamaConfig", {}),
    "every head its own keys": ("LlamaConfig", {"num_key_value_heads": 4}),
    "multi-query": ("LlamaConfig", {"num_key_value_heads": 1}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "window beyond its length": ("Phi3Config", {"sliding_window": 512}),
    "window passed while decoding": (
        "Qwen2Config",
        {
            "use_sliding_window": True,
            "sliding_window": 27,
            "layer_types": ["full_attention", "sliding_attention"],
        },
    ),
    "window passed while prefilling": (
        "Qwen2Config",
        {
            "use_sliding_window": True,
            "sliding_window": 7,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
}


def decoder_for(model: PreTrainedModel, prompt: Tensor, tokens: int = TOKENS) -> Decoder:
    batch, length = prompt.shape
    return Decoder(model, batch=batch, length=length, tokens=tokens)


def prefill(decoder: Decoder, prompt: Tensor) -> Tensor:
    out = decoder.model(input_ids=prompt, past_key_values=decoder.emptied(), logits_to_keep=1)
    decoder.begin(out.logits)
    return out.logits


def generated(decoder: Decoder) -> Tensor:
    return decoder.tokens[..., 0].T.clone()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_stock_generation(family, batch, build, ids) -> None:
    name, settings = FAMILIES[family]
    model = build(name, **settings)
    prompt = ids(LENGTH, batch=batch)
    stock = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=TOKENS, do_sample=False
    )
    decoder = decoder_for(model, prompt)
    with switched(model, Dense(), dense=Dense()):
        prefill(decoder, prompt)
        decoder.generate()
    assert torch.equal(generated(decoder), stock[:, LENGTH:])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_step_after_the_window_or_not_sees_what_a_stock_cache_shows(
    family, build, ids
) -> None:
    """Logits, which tokens of a small vocabulary could hide, agree at every step."""
    name, settings = FAMILIES[family]
    model = build(name, **settings)
    prompt = ids(LENGTH, batch=2)
    decoder, stock = decoder_for(model, prompt), DynamicCache(config=model.config)
    with switched(model, Dense(), dense=Dense()):
        prefill(decoder, prompt)
        model(prompt, past_key_values=stock)
        for token in ids(TOKENS - 1, batch=2, seed=8).split(1, dim=1):
            got = model(token, past_key_values=decoder.cache).logits
            want = model(token, past_key_values=stock).logits
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_generating_again_begins_at_the_prompts_end(build, ids) -> None:
    model, prompt = build("LlamaConfig"), ids(LENGTH, batch=2)
    decoder = decoder_for(model, prompt)
    prefill(decoder, prompt)
    decoder.generate()
    first = generated(decoder)
    decoder.tokens[1:] = 0
    decoder.generate()
    assert torch.equal(generated(decoder), first)


def test_another_prompt_leaves_nothing_behind_and_moves_nothing(build, ids) -> None:
    """Addresses are what a captured step knows; they are the same for every request."""
    model, prompts = build("LlamaConfig"), [ids(LENGTH, seed=seed) for seed in (3, 4, 3)]
    decoder = decoder_for(model, prompts[0])
    found, places = [], []
    for prompt in prompts:
        prefill(decoder, prompt)
        decoder.generate()
        found.append(generated(decoder))
        keys = [layer.keys for layer in decoder.cache.layers]
        values = [layer.values for layer in decoder.cache.layers]
        places.append([x.data_ptr() for x in (*keys, *values, decoder.tokens)])
        assert {x.shape[2] for x in (*keys, *values)} == {LENGTH + TOKENS - 1}
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])
    assert places[0] == places[1] == places[2]
    assert len(set(places[0])) == 5


def test_a_prefill_into_it_is_that_into_a_stock_cache_bit_for_bit(build, ids) -> None:
    model, prompt = build("LlamaConfig"), ids(111, batch=2)
    decoder, stock = decoder_for(model, prompt), DynamicCache(config=model.config)
    with switched(model, Dense(), dense=Dense()):
        logits = prefill(decoder, prompt)
        expected = model(prompt, past_key_values=stock, logits_to_keep=1).logits
    assert torch.equal(logits, expected)
    for got, want in zip(decoder.cache.layers, stock.layers, strict=True):
        assert torch.equal(got.keys, want.keys)
        assert torch.equal(got.values, want.values)


def test_a_method_sees_the_whole_prompt_and_dense_exact_lengths(build, ids, watching) -> None:
    model, prompt = build("LlamaConfig"), ids(LENGTH)
    decoder = decoder_for(model, prompt, 4)
    method, dense = watching(window=5), watching("dense")
    with switched(model, method, dense=dense):
        for _ in range(2):
            prefill(decoder, prompt)
            decoder.generate()
    assert [(q[2], k[2]) for _, q, k, _ in method.calls] == 4 * [(LENGTH, LENGTH)]
    steps = [(1, LENGTH + 1), (1, LENGTH + 2), (1, LENGTH + 3)]
    assert [(q[2], k[2]) for layer, q, k, _ in dense.calls if layer == 0] == 2 * steps


@pytest.mark.parametrize("new", [1, 3])
def test_a_window_hides_what_a_stock_layer_drops(new) -> None:
    """Past the window and from before it, step by step; the numbers tell which keys are seen."""
    roomy, stock = RoomyLayer(40, window=7), DynamicSlidingWindowLayer(7)
    for begin in range(0, 40 - new, new):
        states = torch.arange(begin, begin + new).float().view(1, 1, new, 1)
        assert roomy.get_mask_sizes(new) == stock.get_mask_sizes(new)
        assert roomy.get_seq_length() == stock.get_seq_length() == begin
        for got, want in zip(
            roomy.update(states, -states), stock.update(states, -states), strict=True
        ):
            assert torch.equal(got, want)


def test_states_that_do_not_fit_are_refused_with_the_room_there_is() -> None:
    layer = RoomyLayer(5)
    layer.update(torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 4, 8))
    with pytest.raises(ValueError, match="room for 5 positions holds 4, 2 more do not fit"):
        layer.update(torch.zeros(1, 2, 2, 8), torch.zeros(1, 2, 2, 8))
    assert layer.get_seq_length() == 4


def test_a_model_that_keeps_more_than_keys_and_values_is_refused(build, ids) -> None:
    model = build("Lfm2Config", layer_types=["conv", "full_attention"])
    with pytest.raises(UnsupportedModelError, match=r"Lfm2ForCausalLM keeps a .* without --decode"):
        decoder_for(model, ids(LENGTH))


def test_nothing_is_captured_on_a_cpu(build, ids, watching) -> None:
    model, prompt = build("LlamaConfig"), ids(LENGTH)
    decoder = decoder_for(model, prompt, 3)
    dense = watching("dense")
    with switched(model, watching(), dense=dense):
        prefill(decoder, prompt)
        assert decoder.capture() is None
        assert dense.calls == []
        decoder.generate()
    assert len(dense.calls) == 2 * 2


@pytest.fixture
def on_gpu(build, ids) -> Callable[[int], tuple[PreTrainedModel, Tensor, Decoder]]:
    def make(batch: int) -> tuple[PreTrainedModel, Tensor, Decoder]:
        model = build("LlamaConfig", hidden_size=256, head_dim=64).to("cuda", torch.bfloat16)
        prompt = ids(LENGTH, batch=batch).to("cuda")
        return model, prompt, decoder_for(model, prompt)

    return make


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("batch", [1, 3])
def test_replayed_graphs_give_the_tokens_of_eager_steps(batch, on_gpu, ids) -> None:
    """For the prompt they were captured with and for another."""
    model, prompt, decoder = on_gpu(batch)
    other = ids(LENGTH, batch=batch, seed=9).to("cuda")
    with switched(model, Dense(), dense=Dense()):
        eager = []
        for each in (prompt, other):
            prefill(decoder, each)
            decoder.generate()
            eager.append(generated(decoder))
        assert not torch.equal(*eager)
        assert decoder.capture() is None
    calls: list[int] = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    with switched(model, Dense(), dense=Dense()):
        for each, expected in zip((prompt, other, prompt), (*eager, eager[0]), strict=True):
            prefill(decoder, each)
            for _ in range(2):
                decoder.tokens[1:] = 0
                decoder.generate()
                assert torch.equal(generated(decoder), expected)
    handle.remove()
    assert len(calls) == 3  # the prefills: no step ran the model's code


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize(("dtype", "most_eps"), [(torch.bfloat16, 2), (torch.float32, 32)], ids=str)
@pytest.mark.parametrize("n_k", [2, 111, 4097])
def test_one_query_over_a_roomy_cache_is_attention(n_k, dtype, most_eps) -> None:
    """In float32 too, which the kernel that splits the keys does not take.

    There the rounding of logits, which reach 10, decides; in bfloat16 that of the output.
    """
    draw = torch.Generator("cuda").manual_seed(0)
    q = torch.randn(2, 8, 1, 64, generator=draw, device="cuda").to(dtype)
    k, v = (
        torch.randn(2, 2, n_k + 63, 64, generator=draw, device="cuda").to(dtype)[:, :, :n_k]
        for _ in range(2)
    )
    got = Dense().attend(q, k, v, scale=0.3, layer=0)
    seen = causal_mask(1, n_k).expand(2, 8, -1, -1)
    want = attention(q.cpu(), k.cpu(), v.cpu(), seen, scale=0.3)[0]
    error = (got.cpu().double() - want).norm() / want.norm()
    assert error < most_eps * torch.finfo(dtype).eps


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_model_that_waits_for_the_gpu_is_not_captured_and_goes_on_eagerly(on_gpu) -> None:
    model, prompt, decoder = on_gpu(1)
    waits = model.model.layers[0].register_forward_hook(
        lambda module, args, out: None if float(out.sum()) < float("inf") else out
    )
    with switched(model, Dense(), dense=Dense()):
        prefill(decoder, prompt)
        decoder.generate()
        expected = generated(decoder)
        assert "synchronizing" in decoder.capture()
        decoder.tokens[1:] = 0
        decoder.generate()
        assert torch.equal(generated(decoder), expected)
        waits.remove()
        assert decoder.capture() is None
        decoder.tokens[1:] = 0
        decoder.generate()
        assert torch.equal(generated(decoder), expected)
