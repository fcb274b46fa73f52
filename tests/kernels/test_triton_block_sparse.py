"""Block-list attention against the oracle over the mask that the index itself states."""

import dataclasses
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minference_green.kernels.block_sparse import block_attention
from minference_green.kernels.index import TILE

ON_GPU = torch.cuda.is_available()
SIZES = (1, 7, 63, 64, 65, 111, 300, 1000)


def run(prompt, index):
    out = torch.full_like(prompt.q, float("nan"))
    return block_attention(
        prompt.q, prompt.k, prompt.v, index, scale=prompt.scale, out=out, return_lse=True
    )


def some_lists(rng, n_q, n_k, keep):
    """Per query tile: its diagonal tiles, and others with probability ``keep``."""
    lists = []
    for first in range(n_k - n_q, n_k, TILE):
        last = min(first + TILE, n_k) - 1
        lists.append(
            [n for n in range(last // TILE + 1)
             if (n + 1) * TILE - 1 >= first or rng.random() < keep]
        )  # fmt: skip
    return lists


@pytest.mark.parametrize("keep", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("n", SIZES)
def test_awkward_lengths_from_diagonal_to_dense_match_the_oracle(
    n, keep, dtype, make_prompt, block_index, assert_attends
):
    prompt = make_prompt(n, dtype=dtype, columns=[0], offsets=[n // 2])
    rng = random.Random(n)
    index = block_index([[some_lists(rng, n, n, keep) for _ in range(2)]], n, n)
    assert_attends(prompt, index, *run(prompt, index))


@pytest.mark.parametrize(("n_q", "n_k"), [(1, 100), (64, 256), (70, 300), (129, 333), (65, 66)])
def test_queries_at_any_offset_of_the_keys_match_the_oracle(
    n_q, n_k, dtype, make_prompt, block_index, assert_attends
):
    """An offset that is no multiple of the tile has two tiles that need the causal mask."""
    prompt = make_prompt(n_q, n_k, dtype=dtype)
    rng = random.Random(n_q)
    index = block_index([[some_lists(rng, n_q, n_k, 0.5) for _ in range(2)]], n_q, n_k)
    assert_attends(prompt, index, *run(prompt, index))


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_every_head_dimension_matches_the_oracle(
    head_dim, dtype, make_prompt, block_index, assert_attends
):
    prompt = make_prompt(200, dtype=dtype, head_dim=head_dim)
    rng = random.Random(1)
    index = block_index([[some_lists(rng, 200, 200, 0.5) for _ in range(2)]], 200, 200)
    assert_attends(prompt, index, *run(prompt, index))


def test_groups_batches_and_a_subset_of_heads_read_their_own_index(
    dtype, make_prompt, block_index, assert_attends
):
    prompt = make_prompt(230, dtype=dtype, batch=2, heads=6, kv_heads=2)
    rng = random.Random(2)
    lists = [[some_lists(rng, 230, 230, 0.4) for _ in range(3)] for _ in range(2)]
    index = block_index(lists, 230, 230, heads=[5, 0, 2])
    out, lse = run(prompt, index)
    assert_attends(prompt, index, out, lse)
    assert out[:, [1, 3, 4]].isnan().all()


def test_a_listed_tile_in_the_future_is_not_seen(
    dtype, make_prompt, block_index, assert_attends
):  # fmt: skip
    prompt = make_prompt(256, dtype=dtype)
    index = block_index([[[[0, 1, 2, 3]] * 4, [[0, 1, 3], [1, 2, 3], [2, 3], [3]]]], 256, 256)
    assert_attends(prompt, index, *run(prompt, index))


def test_infinities_and_nan_outside_what_a_tile_sees_never_reach_its_rows(
    dtype, make_prompt, block_index
):
    prompt = make_prompt(70, 300, dtype=dtype)
    # Rows 230..293 see tile 3 and the head of tile 4; only rows 294..299 see keys from 294 on.
    index = block_index([[[[0, 3, 4], [0, 4]]] * 2], 70, 300)
    clean, _ = run(prompt, index)
    for poison in (float("nan"), float("inf")):
        k, v = prompt.k.clone(), prompt.v.clone()
        for x in (k, v):
            x[:, :, 64:192] = poison
            x[:, :, 294:] = poison
        out, _ = run(dataclasses.replace(prompt, k=k, v=v), index)
        assert torch.equal(out[:, :, :64], clean[:, :, :64])
        assert not torch.isfinite(out[:, :, 64:]).any()


@settings(max_examples=500 if ON_GPU else 12, deadline=None)
@given(seed=st.integers(0, 2**32), n_k=st.integers(1, 900 if ON_GPU else 400))
def test_any_index_matches_the_oracle(
    seed, n_k, make_prompt, block_index, assert_attends
):  # fmt: skip
    rng = random.Random(seed)
    n_q = rng.choice([n_k, rng.randint(1, n_k)])
    dtype = rng.choice([torch.bfloat16, torch.float16]) if ON_GPU else torch.float32
    kv_heads, group = rng.choice([(1, 1), (1, 3), (2, 2)])
    heads = kv_heads * group
    prompt = make_prompt(
        n_q, n_k, dtype=dtype, heads=heads, kv_heads=kv_heads, seed=seed % 1000,
        head_dim=rng.choice([64, 128]), offsets=[rng.randrange(n_k)],
    )  # fmt: skip
    keep = rng.random()
    index = block_index([[some_lists(rng, n_q, n_k, keep) for _ in range(heads)]], n_q, n_k)
    assert_attends(prompt, index, *run(prompt, index))


@pytest.mark.parametrize(("change", "message"), [
    (lambda p, i: {"index": dataclasses.replace(i, n_q=69)}, "index was built for n_q = 69"),
    (lambda p, i: {"index": dataclasses.replace(i, n_k=71)}, "index was built for n_k = 71"),
    (lambda p, i: {"index": dataclasses.replace(i, starts=i.starts[..., :-1].contiguous())},
     r"starts must have shape \(1, 2, 3\), got \(1, 2, 2\)"),
    (lambda p, i: {"index": dataclasses.replace(i, blocks=i.blocks.long())},
     "blocks must be contiguous int32 .* got torch.int64"),
    (lambda p, i: {"scale": -1.0}, "scale must be positive, got -1.0"),
])  # fmt: skip
def test_an_argument_that_does_not_fit_is_named_with_its_value(
    change, message, make_prompt, block_index
):
    prompt = make_prompt(70, dtype=torch.bfloat16 if ON_GPU else torch.float32)
    index = block_index([[[[0], [0, 1]]] * 2], 70, 70)
    arguments = {"q": prompt.q, "k": prompt.k, "v": prompt.v, "index": index, "scale": prompt.scale}
    with pytest.raises(ValueError, match=message):
        block_attention(**{**arguments, **change(prompt, index)})
