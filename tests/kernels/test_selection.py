"""From scores to an index: the same choice as the oracle's, whatever the ties."""

import itertools

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minference_green.kernels import cpu, reference, selection
from minference_green.kernels.index import NONE, TILE, BandIndex
from minference_green.kernels.selection import (
    a_shape_index,
    band_index,
    block_index,
    join_bands,
    listed_index,
    to_device,
    top_positions,
)

# One token; less than a tile; around a tile's edge; odd; several tiles and a rest.
LENGTHS = [1, 7, 63, 64, 65, 111, 300, 1000]


def chosen(row: Tensor) -> list[int]:
    """The positions of one padded row, which must be ascending with all padding at the end."""
    listed = row.tolist()
    assert listed == sorted(listed)
    return [p for p in listed if p != NONE]


def heads_of(n: int) -> Tensor:
    return torch.arange(n, dtype=torch.int32)


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("levels", [1, 3, 10**9])
def test_each_head_keeps_its_own_number_of_largest_scores(n: int, levels: int) -> None:
    """One level: all tie. Three: most do. Many: none does."""
    g = torch.Generator().manual_seed(n)
    scores = (torch.rand(2, 4, n, generator=g) * levels).floor()
    counts = [0, 1, 40, 2 * n]
    got = top_positions(scores, counts, forced=5)
    assert got.dtype == torch.int32
    assert got.shape == (2, 4, n)
    for b in range(2):
        for h, count in enumerate(counts):
            assert chosen(got[b, h]) == reference.top_positions(scores[b, h], count, 5)


@given(
    st.lists(st.sampled_from([0.0, -0.0, 1e-45, -1.0, 1.0, 1.5, float("inf")]), min_size=1),
    st.integers(1, 12),
    st.integers(0, 3),
)
@example([-0.0, 0.0], 1, 0)
def test_signed_zeros_tie_and_negative_scores_are_in_order(
    values: list[float], count: int, forced: int
) -> None:
    scores = torch.tensor([[values]])
    want = reference.top_positions(scores[0, 0], count, forced)
    assert chosen(top_positions(scores, [count], forced)[0, 0]) == want


def test_forced_positions_win_over_negative_and_infinite_scores() -> None:
    scores = torch.tensor([[[-5.0, -1.0, float("inf"), 3.0]]])
    assert chosen(top_positions(scores, [3], forced=2)[0, 0]) == [0, 1, 2]


def test_scores_of_another_dtype_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must be float32 .* got torch\.float64"):
        top_positions(torch.zeros(1, 1, 4, dtype=torch.float64), [1], 0)


def test_a_size_per_head_is_needed() -> None:
    with pytest.raises(ValueError, match="2 heads, 1 sizes"):
        top_positions(torch.zeros(1, 2, 4), [1], 0)
    with pytest.raises(ValueError, match="2 heads, 3 sizes"):
        a_shape_index(heads_of(2), [1, 2, 3], [1, 1, 1], batch=1, n_k=4)
    means = torch.zeros(1, 2, 1, 4)
    with pytest.raises(ValueError, match="2 heads, 0 sizes"):
        block_index(means, means, heads_of(2), [], scale=1.0, n_q=4, n_k=4)


@pytest.mark.parametrize("n", LENGTHS)
def test_a_band_index_holds_the_best_columns_and_the_bands_of_the_best_slashes(n: int) -> None:
    """Sizes below the least ones are raised to them; slashes below 100 leave no other choice."""
    g = torch.Generator().manual_seed(n)
    columns, slashes = torch.rand(2, 2, 3, n, generator=g)
    verticals, offsets = [1, 35, 200], [0, 77, 150]
    index = band_index(columns, slashes, heads_of(3), verticals, offsets, cut_pieces=cpu.cut_pieces)
    assert index.n_k == n
    for b in range(2):
        for h in range(3):
            i_v = reference.top_positions(columns[b, h], max(verticals[h], 30), 30)
            i_s = reference.top_positions(slashes[b, h], max(offsets[h], 50), 100)
            assert chosen(index.columns[b, h]) == i_v
            assert chosen(index.pieces[b, h]) == reference.cut_pieces(i_s)


@pytest.mark.parametrize(("n_q", "n_k"), [(1, 1), (65, 65), (300, 300), (111, 300), (700, 1000)])
def test_a_band_index_sees_every_chosen_slash_and_column_and_every_diagonal(
    n_q: int, n_k: int
) -> None:
    g = torch.Generator().manual_seed(n_k)
    columns, slashes = torch.rand(2, 1, 2, n_k, generator=g)
    index = band_index(
        columns, slashes, heads_of(2), [40, 60], [120, 60], cut_pieces=cpu.cut_pieces
    )
    mask = index.mask(n_q, n_k)
    for h, (v, s) in enumerate([(40, 120), (60, 60)]):
        i_v = reference.top_positions(columns[0, h], v, 30)
        i_s = reference.top_positions(slashes[0, h], s, 100)
        exact = reference.vertical_slash_mask(i_s, i_v, n_q, n_k)
        assert not (exact & ~mask[0, h]).any()
        assert mask[0, h].diagonal(n_k - n_q).all()


@pytest.mark.parametrize(("n_q", "n_k"), [(1, 1), (65, 65), (300, 300), (111, 300)])
def test_an_a_shape_index_sees_its_sinks_and_its_window(n_q: int, n_k: int) -> None:
    n_inits, n_locals = [0, 1, 70, 5000], [1, 64, 65, 5000]
    index = a_shape_index(heads_of(4), n_inits, n_locals, batch=2, n_k=n_k)
    mask = index.mask(n_q, n_k)
    assert torch.equal(mask[0], mask[1])
    for h, (n_init, n_local) in enumerate(zip(n_inits, n_locals, strict=True)):
        exact = reference.a_shape_mask(n_init, n_local, n_q, n_k)
        assert not (exact & ~mask[0, h]).any()
        assert chosen(index.columns[0, h]) == list(range(min(n_init, n_k)))
        # No wider than the window rounded up to whole tiles.
        reach = reference.a_shape_mask(n_init, n_local + 2 * TILE, n_q, n_k)
        assert not (mask[0, h] & ~reach).any()


def test_a_window_without_the_diagonal_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1, the diagonal, got 0"):
        a_shape_index(heads_of(1), [4], [0], batch=1, n_k=8)


def test_joined_bands_are_those_of_both() -> None:
    one = a_shape_index(heads_of(2), [3, 4], [70, 1], batch=2, n_k=300)
    two = a_shape_index(heads_of(1) + 7, [0], [200], batch=2, n_k=300)
    joined = join_bands(one, two)
    assert joined.heads.tolist() == [0, 1, 7]
    assert torch.equal(
        joined.mask(300, 300), torch.cat([one.mask(300, 300), two.mask(300, 300)], 1)
    )
    with pytest.raises(ValueError, match="300 and 299"):
        join_bands(one, a_shape_index(heads_of(1), [0], [1], batch=2, n_k=299))


def grid_inputs(n_q: int, n_k: int, heads: int, seed: int) -> tuple[Tensor, Tensor]:
    """Few-valued integers: every mean and score is exact in fp32, and many tie."""
    g = torch.Generator().manual_seed(seed)
    q = torch.randint(-1, 2, (2, heads, n_q, 2), generator=g).float()
    k = torch.randint(-1, 2, (2, heads, n_k, 2), generator=g).float()
    return q, k


@pytest.mark.parametrize(
    ("n_q", "n_k"),
    [(1, 1), (63, 63), (64, 64), (65, 65), (1000, 1000), (1, 300), (111, 300), (640, 1000)],
)
def test_block_lists_are_the_oracles(n_q: int, n_k: int) -> None:
    q, k = grid_inputs(n_q, n_k, 3, seed=n_q)
    top_ks = [1, 4, 50]
    q_means, k_means = cpu.block_means(q), cpu.block_means(k)
    index = block_index(q_means, k_means, heads_of(3), top_ks, scale=0.5, n_q=n_q, n_k=n_k)
    for h, top_k in enumerate(top_ks):
        want = reference.block_lists(q, k, scale=0.5, top_k=top_k)
        for b in range(2):
            starts = index.starts[b, h].tolist()
            got = [index.blocks[b, h, x:y].tolist() for x, y in itertools.pairwise(starts)]
            assert got == want[b][h]
            assert (index.blocks[b, h, starts[-1] :] == NONE).all()
    assert index.mask(n_q, n_k).diagonal(n_k - n_q, dim1=-2, dim2=-1).all()


def test_block_lists_do_not_depend_on_the_slab(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slabs of one query tile, of three, and of all give the same rows."""
    q, k = grid_inputs(1000, 1000, 2, seed=1)
    means = cpu.block_means(q), cpu.block_means(k)

    def build() -> tuple[Tensor, Tensor]:
        index = block_index(*means, heads_of(2), [3, 5], scale=1.0, n_q=1000, n_k=1000)
        return index.starts, index.blocks

    whole = build()
    for slab in (1, 3 * 2 * 2 * 16):
        monkeypatch.setattr(selection, "_SLAB", slab)
        assert all(torch.equal(x, y) for x, y in zip(build(), whole, strict=True))


def test_means_that_do_not_fit_the_lengths_are_refused() -> None:
    means = torch.zeros(1, 1, 2, 4)
    with pytest.raises(ValueError, match="2 query and 2 key tiles do not fit n_q = 65, n_k = 129"):
        block_index(means, means, heads_of(1), [1], scale=1.0, n_q=65, n_k=129)


@pytest.mark.parametrize("shape", [(2, 2, 3, 3), (1, 1, 3, 3), (1, 2, 2, 3), (1, 2, 1, 3)])
def test_scores_of_other_heads_or_query_tiles_are_refused(shape: tuple[int, ...]) -> None:
    message = rf"1 prompts, 2 heads and 3 query tiles, got \({shape[0]}, {shape[1]}, {shape[2]}, 3"
    with pytest.raises(ValueError, match=message):
        listed_index(lambda *_: torch.zeros(shape), 3, 1, heads_of(2), [1, 1], 192, 192)


def test_the_room_behind_all_lists_is_none_and_lists_follow_each_other() -> None:
    """Three query tiles see one, two and three key tiles, where there is room for three each."""
    index = listed_index(
        lambda begin, end: torch.zeros(1, 1, end - begin, 3), 2, 1, heads_of(1), [1], 192, 192
    )
    assert index.starts.tolist() == [[[0, 1, 3, 5]]]
    assert index.blocks.tolist() == [[[0, 0, 1, 0, 2, NONE, NONE, NONE, NONE]]]


def test_nothing_between_scores_and_index_asks_for_a_value() -> None:
    """On the meta device there are no values: a host sync would raise."""
    scores = torch.zeros(1, 2, 1000, device="meta")
    heads = to_device([0, 1], scores.device)
    band = band_index(scores, scores, heads, [40, 300], [60, 200], cut_pieces=lambda x, n_k: x)
    both = join_bands(band, a_shape_index(heads, [4, 8], [64, 999], batch=1, n_k=1000))
    assert both.pieces.shape == (1, 4, 200)
    means = torch.zeros(1, 2, 16, 8, device="meta")
    block = block_index(means, means, heads, [3, 5], scale=1.0, n_q=1000, n_k=1000)
    assert block.starts.shape == (1, 2, 17)


class Largest(TorchDispatchMode):
    """Notes the largest tensor any operation returns."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [x.numel() * x.element_size() for x in tree_leaves(out) if isinstance(x, Tensor)]
        self.nbytes = max(self.nbytes, *sizes, 0)
        return out


def test_scoring_a_million_tokens_of_blocks_stays_in_memory() -> None:
    """All 16384 x 16384 scores of 32 heads would be 34 GB; a step holds 512 MB at most."""
    means = torch.zeros(1, 32, 2**14, 128, device="meta")
    heads = to_device(range(32), means.device)
    with Largest() as largest:
        index = block_index(means, means, heads, [100] * 32, scale=1.0, n_q=2**20, n_k=2**20)
    assert index.blocks.numel() * 4 <= 240 * 2**20
    assert largest.nbytes <= 512 * 2**20


def test_an_index_of_one_token_sees_it() -> None:
    scores = torch.ones(1, 1, 1)
    index = band_index(scores, scores, heads_of(1), [1000], [6096], cut_pieces=cpu.cut_pieces)
    assert isinstance(index, BandIndex)
    assert index.mask(1, 1).item() is True
