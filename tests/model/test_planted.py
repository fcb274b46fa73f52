"""What the shapes say: sizes as published, heads in the published shares, nothing impossible."""

from collections import Counter

import pytest
import torch
from transformers import AutoModelForCausalLM

from minference_green.methods.patterns import AShape, BlockSparse, VerticalSlash
from minference_green.model.planted import SHAPES


def parameters(name):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(SHAPES[name]().config)
    return sum(p.numel() for p in model.parameters())


def test_llama_has_the_published_parameters_and_biases():
    biases = 32 * (4096 + 1024 + 1024 + 4096)
    assert parameters("llama-3-8b") == 8_030_261_248 + biases


def test_qwen_has_the_published_parameters():
    assert parameters("qwen2.5-7b") == 7_615_616_512


def test_llama_is_made_for_a_million_tokens():
    assert SHAPES["llama-3-8b"]().config.max_position_embeddings == 1_048_576


@pytest.mark.parametrize("name", ["llama-3-8b", "qwen2.5-7b"])
def test_budgets_have_the_shares_of_the_published_pattern_file(name):
    patterns = [p for layer in SHAPES[name]().patterns for p in layer]
    counts = Counter((p.vertical_size, p.slash_size) for p in patterns)
    shares = {budget: number / len(patterns) for budget, number in counts.items()}
    published = {(1000, 6096): 0.46, (30, 800): 0.27, (100, 800): 0.15, (3500, 100): 0.09}
    published[500, 700] = 0.03
    assert shares == pytest.approx(published, abs=0.005)


def test_tiny_has_every_kind_of_head():
    heads = [head for layer in SHAPES["tiny"]().heads for head in layer]
    assert {type(head.pattern) for head in heads} == {VerticalSlash, AShape, BlockSparse}
    assert {head.columns for head in heads} == {None, "common", "rare"}


@pytest.mark.parametrize("name", SHAPES)
def test_a_head_has_nothing_its_budget_must_miss(name):
    """30 columns and 100 slashes are forced, so smaller budgets leave none to choose."""
    shape = SHAPES[name]()
    config = shape.config
    assert [len(layer) for layer in shape.heads] == (
        [config.num_attention_heads] * config.num_hidden_layers
    )
    for head in (head for layer in shape.heads for head in layer):
        if isinstance(head.pattern, VerticalSlash):
            assert head.columns is None or head.pattern.vertical_size > 30
            assert head.offsets == (0,) or head.pattern.slash_size > 100
        if isinstance(head.pattern, AShape):
            assert (head.offsets, head.columns) == ((0,), None)
        assert head.by_topic == isinstance(head.pattern, BlockSparse)


@pytest.mark.parametrize("name", SHAPES)
def test_slashes_lie_at_many_distances(name):
    offsets = [
        head.offsets[1] for layer in SHAPES[name]().heads for head in layer if head.offsets[1:]
    ]
    assert len(set(offsets)) > 0.9 * len(offsets)
    assert max(offsets) > 8 * min(offsets)
