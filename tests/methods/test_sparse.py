"""The engine of head patterns: which pairs each head computes, and what it tells of its work."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from minference_green.errors import UsageError
from minference_green.kernels import cpu, reference
from minference_green.kernels.index import TILE, BandIndex, BlockIndex
from minference_green.methods import sparse
from minference_green.methods.backend import Kernels, kernels_for
from minference_green.methods.method import ProfiledMethod
from minference_green.methods.patterns import (
    AShape,
    BlockSparse,
    HeadPattern,
    Patterns,
    Probed,
    VerticalSlash,
)
from minference_green.methods.sparse import SparsePrefill, uniform

Inputs = tuple[Tensor, Tensor, Tensor]
SCALE = 0.125
HEADS = 6


def inputs(n: int, batch: int = 1) -> Inputs:
    """Integers: sums of scores tie often, and block means are exact."""
    g = torch.Generator().manual_seed(n)
    q = torch.randint(-2, 3, (batch, HEADS, n, 64), generator=g).float()
    k, v = (torch.randint(-2, 3, (batch, 2, n, 64), generator=g).float() for _ in range(2))
    return q, k, v


def visible(qkv: Inputs, head: int, pattern: HeadPattern) -> Tensor:
    """The pairs one head computes, from the oracles alone: bool ``[n, n]`` of the first prompt."""
    q, k, _ = (x[:1] for x in qkv)
    n = q.shape[2]
    group = slice(head // 3, head // 3 + 1)
    q, k = q[:, head : head + 1], k[:, group]
    one = torch.zeros(1, dtype=torch.int32)
    if isinstance(pattern, BlockSparse | Probed):
        if isinstance(pattern, BlockSparse):
            lists = reference.block_lists(q, k, scale=SCALE, top_k=pattern.top_k)[0][0]
        else:
            top_k, rows = pattern.top_k, pattern.rows
            lists = reference.probed_lists(q, k, scale=SCALE, top_k=top_k, rows=rows)[0][0]
        tile = torch.arange(n) // TILE
        listed = torch.zeros(len(lists), len(lists), dtype=torch.bool)
        for m, row in enumerate(lists):
            listed[m, row] = True
        return listed[tile][:, tile] & reference.causal_mask(n, n)
    if isinstance(pattern, VerticalSlash):
        columns, slashes = reference.last_rows_scores(q, k, scale=SCALE)
        offsets = reference.top_positions(slashes[0, 0], max(pattern.slash_size, 50), 100)
        kept = reference.top_positions(columns[0, 0], max(pattern.vertical_size, 30), 30)
    else:
        offsets = [*range(1, min(pattern.n_local, n + 1))]
        kept = [*range(min(pattern.n_init, n))]
    tiles = reference.cut_pieces(offsets)
    as_tensor = [torch.tensor([[x]], dtype=torch.int32).reshape(1, 1, -1) for x in (tiles, kept)]
    return BandIndex(one, *as_tensor, n_k=n).mask(n, n)[0, 0]


MIXED: tuple[HeadPattern, ...] = (
    VerticalSlash(40, 110),
    AShape(10, 70),
    BlockSparse(2),
    VerticalSlash(0, 0),
    BlockSparse(1),
    AShape(0, 1),
)

PROBED: tuple[HeadPattern, ...] = (
    Probed(2, 4),
    AShape(10, 70),
    Probed(1, 8),
    BlockSparse(2),
    Probed(3, 4),
    VerticalSlash(0, 0),
)


@pytest.mark.parametrize("patterns", [MIXED, PROBED], ids=["minference's", "probed"])
def test_every_head_computes_its_own_pattern(patterns: tuple[HeadPattern, ...]) -> None:
    """Random inputs, since a tie between oracle and fp32 sums could fall either way."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, 500, 64, generator=g) for h in (HEADS, 2, 2))
    method = SparsePrefill("mixed", (patterns,), {})
    out = method.attend(q, k, v, scale=SCALE, layer=0)
    profile = method.profile(q, k, v, scale=SCALE, layer=0)
    assert torch.equal(profile.out, out)
    for head, pattern in enumerate(patterns):
        mask = visible((q, k, v), head, pattern)
        kv = head // 3
        want, lse = reference.attention(
            q[:, [head]], k[:, [kv]], v[:, [kv]], mask[None, None], scale=SCALE
        )
        torch.testing.assert_close(profile.lse[:, [head]].double(), lse, rtol=0, atol=1e-5)
        torch.testing.assert_close(out[:, [head]].double(), want, rtol=0, atol=1e-5)
        assert profile.density[head].item() == mask.sum().item() / (500 * 501 / 2)
        (index,) = (i for i in profile.indices if head in i.heads.tolist())
        assert torch.equal(index.mask(500, 500)[0, index.heads.tolist().index(head)], mask)


@pytest.mark.parametrize("n", [1, 7, 64, 65, 300])
@pytest.mark.parametrize(
    "pattern",
    [VerticalSlash(300, 300), AShape(0, 300), AShape(300, 1), BlockSparse(5), Probed(5, 1)],
)
def test_a_budget_that_covers_the_prompt_is_dense_attention(n: int, pattern: HeadPattern) -> None:
    q, k, v = inputs(n, batch=2)
    method = uniform("everything", pattern)
    profile = method.profile(q, k, v, scale=SCALE, layer=3)
    dense = scaled_dot_product_attention(q, k, v, is_causal=True, scale=SCALE, enable_gqa=True)
    torch.testing.assert_close(profile.out, dense)
    assert torch.equal(profile.density, torch.ones(HEADS, dtype=torch.float64))


def test_each_layer_has_its_own_patterns() -> None:
    q, k, v = inputs(300)
    layers: Patterns = ((AShape(0, 1),) * HEADS, (AShape(0, 300),) * HEADS)
    method = SparsePrefill("two layers", layers, {})
    densities = [
        method.profile(q, k, v, scale=SCALE, layer=layer).density[0].item() for layer in (0, 1)
    ]
    assert densities[0] < 0.3
    assert densities[1] == 1.0


class Counted:
    """The CPU kernels, noting each launch and the heads it serves."""

    def __init__(self) -> None:
        self.launches: list[tuple[str, list[int]]] = []

    def kernels(self) -> Kernels:
        def band(q: Tensor, k: Tensor, v: Tensor, index: BandIndex, **options: object) -> object:
            self.launches.append(("band", index.heads.tolist()))
            return cpu.band_attention(q, k, v, index, **options)

        def block(q: Tensor, k: Tensor, v: Tensor, index: BlockIndex, **options: object) -> object:
            self.launches.append(("block", index.heads.tolist()))
            return cpu.block_attention(q, k, v, index, **options)

        return replace(kernels_for(torch.device("cpu")), band_attention=band, block_attention=block)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counted]:
    counted = Counted()
    monkeypatch.setattr(sparse, "kernels_for", lambda _: counted.kernels())
    return counted


def test_a_layer_is_one_launch_per_index_kind(counted: Counted) -> None:
    q, k, v = inputs(200)
    SparsePrefill("mixed", (MIXED,), {}).attend(q, k, v, scale=SCALE, layer=0)
    assert counted.launches == [("band", [0, 3, 1, 5]), ("block", [2, 4])]
    counted.launches.clear()
    uniform("a-shape", AShape()).attend(q, k, v, scale=SCALE, layer=0)
    assert counted.launches == [("band", [0, 1, 2, 3, 4, 5])]
    counted.launches.clear()
    SparsePrefill("probed", (PROBED,), {}).attend(q, k, v, scale=SCALE, layer=0)
    # Probed heads share a launch if as many rows probe for them.
    assert counted.launches == [("band", [5, 1]), ("block", [3]), ("block", [0, 4]), ("block", [2])]


def test_it_is_a_profiled_method_that_shows_its_parameters() -> None:
    method = uniform("vertical-slash", VerticalSlash(30, 800))
    assert isinstance(method, ProfiledMethod)
    assert method.parameters == {"vertical_size": 30, "slash_size": 800}


def test_the_seconds_of_each_step_are_told() -> None:
    q, k, v = inputs(300)
    profile = uniform("vertical-slash", VerticalSlash()).profile(q, k, v, scale=SCALE, layer=0)
    steps = (profile.estimate_seconds, profile.index_seconds, profile.attend_seconds)
    assert all(0 < seconds < 60 for seconds in steps)


def test_the_result_keeps_dtype_shape_and_layout() -> None:
    q, k, v = (x.bfloat16().transpose(1, 2).contiguous().transpose(1, 2) for x in inputs(100))
    out = uniform("a-shape", AShape(4, 20)).attend(q, k, v, scale=SCALE, layer=0)
    assert (out.dtype, out.shape, out.stride()) == (q.dtype, q.shape, q.stride())


def test_patterns_of_another_model_are_refused_with_both_shapes() -> None:
    q, k, v = inputs(64)
    method = SparsePrefill("minference", ((AShape(),) * 4,) * 2, {})
    with pytest.raises(UsageError, match=r"2 layers and for 4 heads of layer 1, where .* has 6"):
        method.attend(q, k, v, scale=SCALE, layer=1)
    with pytest.raises(UsageError, match="2 layers and for none heads of layer 2"):
        method.attend(q, k, v, scale=SCALE, layer=2)


def test_a_continuation_is_refused() -> None:
    q, k, v = inputs(64)
    with pytest.raises(UsageError, match="whole prompts, got 1 queries for 64 keys"):
        uniform("a-shape", AShape()).attend(q[:, :, -1:], k, v, scale=SCALE, layer=0)


def test_what_a_kernel_refuses_is_the_users_to_resolve() -> None:
    q, k, v = inputs(64)
    with pytest.raises(UsageError, match=r"a-shape cannot run on this model: .*one floating dtype"):
        uniform("a-shape", AShape()).attend(q, k.half(), v, scale=SCALE, layer=0)


def test_keys_too_many_to_prepare_at_once_are_probed_a_kv_head_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    q, k, v = inputs(300)
    method = uniform("method", Probed(top_k=2, rows=4))
    whole = method.profile(q, k, v, scale=SCALE, layer=0)
    monkeypatch.setattr(sparse, "_KEYS", 2 * 300 * 64 - 1)
    parts = method.profile(q, k, v, scale=SCALE, layer=0)
    assert [index.heads.tolist() for index in whole.indices] == [[0, 1, 2, 3, 4, 5]]
    assert [index.heads.tolist() for index in parts.indices] == [[0, 1, 2], [3, 4, 5]]
    assert torch.equal(parts.out, whole.out)


def test_only_the_keys_of_probed_heads_are_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[range] = []

    def noted(k: Tensor, kv_heads: range) -> Callable[..., Tensor]:
        asked.append(kv_heads)
        return cpu.tile_shares

    kernels = replace(kernels_for(torch.device("cpu")), shares_of=noted)
    monkeypatch.setattr(sparse, "kernels_for", lambda _: kernels)
    window = AShape(10, 20)
    patterns = ((window, window, window, Probed(2, 4), window, Probed(2, 8)),)
    SparsePrefill("method", patterns, {}).attend(*inputs(100), scale=SCALE, layer=0)
    assert asked == [range(1, 2), range(1, 2)]
