"""The two index types: what their masks mean and how their pairs are counted."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minference_green.kernels.index import NONE, PIECE, TILE, BandIndex, BlockIndex, causal_pairs

# One row; less than a tile; a tile less, exactly, and more by one; an odd width; several
# tiles; queries that begin inside a key tile, at a tile, and late in a longer sequence.
LENGTHS = [
    (1, 1), (7, 7), (63, 63), (64, 64), (65, 65), (111, 111), (300, 300),
    (1, 300), (37, 100), (64, 128), (111, 300), (300, 364),
]  # fmt: skip


def rows(*lists: list[int]) -> Tensor:
    """One batch of padded int32 rows."""
    width = max(len(x) for x in lists) + 1
    return torch.tensor([[x + [NONE] * (width - len(x)) for x in lists]], dtype=torch.int32)


def random_band(n_k: int, seed: int) -> BandIndex:
    """Three heads: scattered runs and columns, runs alone with gaps of one, nothing at all."""
    g = torch.Generator().manual_seed(seed)
    runs = [r * 90 + 13 for r in range(n_k // 90 + 1) if torch.rand(1, generator=g) < 0.6]
    scattered = [p for r in runs for p in range(r, r + TILE, PIECE)]
    close = [p for r in range(0, n_k, TILE + 1) for p in range(r, r + TILE, PIECE)]
    columns = torch.randperm(n_k, generator=g)[: n_k // 5].sort().values.tolist()
    return BandIndex(
        heads=torch.arange(3, dtype=torch.int32),
        pieces=rows(scattered, close, []),
        columns=rows(columns, [], []),
        n_k=n_k,
    )


def random_block(n_q: int, n_k: int, seed: int) -> BlockIndex:
    """Two heads: random lists without any promise, and a head whose lists are all empty."""
    g = torch.Generator().manual_seed(seed)
    n_tiles, n_blocks = -(-n_q // TILE), -(-n_k // TILE)
    lists = [
        [n for n in range(n_blocks) if torch.rand(1, generator=g) < 0.5] for _ in range(n_tiles)
    ]
    starts = torch.tensor([0, *map(len, lists)]).cumsum(0)
    # What lies past the last list is no block, whatever it holds.
    blocks = torch.tensor([n for row in lists for n in row] + [0, 1])
    return BlockIndex(
        heads=torch.arange(2, dtype=torch.int32),
        starts=torch.stack([starts, starts * 0])[None].int(),
        blocks=torch.stack([blocks, blocks])[None].int(),
        n_q=n_q,
        n_k=n_k,
    )


@pytest.mark.parametrize(("n_q", "n_k"), LENGTHS)
def test_a_band_mask_is_its_definition_pair_by_pair(n_q: int, n_k: int) -> None:
    index = random_band(n_k, seed=n_q)
    mask = index.mask(n_q, n_k)
    for head in range(3):
        starts = [p for p in index.pieces[0, head].tolist() if p != NONE]
        columns = set(index.columns[0, head].tolist())
        for r in range(n_q):
            i = n_k - n_q + r
            r0 = n_k - n_q + r // TILE * TILE
            want = [
                j <= i
                and (j >= r0 or any(p <= r0 - 1 - j < p + PIECE for p in starts) or j in columns)
                for j in range(n_k)
            ]
            assert mask[0, head, r].tolist() == want


@pytest.mark.parametrize(("n_q", "n_k"), LENGTHS)
def test_a_block_mask_is_its_definition_pair_by_pair(n_q: int, n_k: int) -> None:
    index = random_block(n_q, n_k, seed=n_q)
    mask = index.mask(n_q, n_k)
    for head in range(2):
        starts, blocks = index.starts[0, head].tolist(), index.blocks[0, head].tolist()
        for r in range(n_q):
            i, m = n_k - n_q + r, r // TILE
            listed = blocks[starts[m] : starts[m + 1]]
            want = [j <= i and j // TILE in listed for j in range(n_k)]
            assert mask[0, head, r].tolist() == want


@pytest.mark.parametrize(("n_q", "n_k"), LENGTHS)
def test_visible_pairs_count_the_mask(n_q: int, n_k: int) -> None:
    for index in (random_band(n_k, seed=n_k), random_block(n_q, n_k, seed=n_k)):
        counted = index.mask(n_q, n_k).sum((-1, -2))
        assert torch.equal(index.visible_pairs(n_q), counted)
        assert torch.equal(index.density(n_q), counted.double() / causal_pairs(n_q, n_k))


@pytest.mark.parametrize(("n_q", "n_k"), LENGTHS)
def test_some_rows_and_keys_of_a_mask_are_that_part_of_it(n_q: int, n_k: int) -> None:
    some = torch.arange(n_k - n_q, n_k, 5).flip(0)  # any order
    for index in (random_band(n_k, seed=n_k), random_block(n_q, n_k, seed=n_k)):
        mask = index.mask(n_q, n_k)
        for begin, end in ((0, n_k), (n_k // 3, n_k // 2 + 1), (n_k - 1, n_k)):
            part = index.visible(some, begin, end, n_q)
            assert torch.equal(part, mask[:, :, some - (n_k - n_q), begin:end])


@pytest.mark.parametrize(("n_q", "n_k"), LENGTHS)
def test_whole_rows_see_all_their_keys_and_the_tile_after_them_does_not(n_q: int, n_k: int) -> None:
    near = torch.arange(0, n_k, PIECE, dtype=torch.int32)[None, None, : 2 * TILE // PIECE]
    first = torch.zeros(1, 1, 1, dtype=torch.int32)
    band = BandIndex(torch.zeros(1, dtype=torch.int32), near, first, n_k)
    found = set[int]()
    for index in (band, random_band(n_k, seed=n_k), random_block(n_q, n_k, seed=n_k)):
        sees_all = index.mask(n_q, n_k).sum(-1) == torch.arange(n_k - n_q, n_k) + 1
        for head, rows_told in enumerate(index.whole_rows(n_q)[0].tolist()):
            found.add(rows_told)
            assert sees_all[0, head, :rows_told].all()
            assert rows_told == n_q or not sees_all[0, head, rows_told : rows_told + TILE].all()
    if n_q == n_k > 3 * TILE:
        assert found & set(range(1, n_q))


@pytest.mark.parametrize(("n_q", "n_k"), LENGTHS)
def test_causal_pairs_count_the_lower_triangle(n_q: int, n_k: int) -> None:
    assert causal_pairs(n_q, n_k) == torch.ones(n_q, n_k).tril(n_k - n_q).sum()


def test_a_band_index_without_bands_or_columns_sees_its_own_tile_only() -> None:
    empty = torch.empty(1, 1, 0, dtype=torch.int32)
    index = BandIndex(torch.zeros(1, dtype=torch.int32), empty, empty, n_k=130)
    own = torch.arange(130) // TILE
    want = (own[:, None] == own[None, :]).tril()
    assert torch.equal(index.mask(130, 130)[0, 0], want)
    assert index.visible_pairs(130).item() == want.sum()


def test_every_piece_or_every_column_listed_is_dense() -> None:
    none = torch.empty(1, 1, 0, dtype=torch.int32)
    pieces = torch.arange(0, 300, PIECE, dtype=torch.int32)[None, None]
    columns = torch.arange(300, dtype=torch.int32)[None, None]
    for listed in ((pieces, none), (none, columns), (pieces, columns)):
        index = BandIndex(torch.zeros(1, dtype=torch.int32), *listed, n_k=300)
        assert index.density(300).item() == 1.0


class Largest(TorchDispatchMode):
    """Notes the largest tensor any operation returns."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x._base is None and x.untyped_storage().nbytes():
                self.nbytes = max(self.nbytes, x.untyped_storage().nbytes())
        return out


def test_counting_the_pairs_of_a_million_tokens_stays_in_memory() -> None:
    """Both counts are known in closed form, and no step holds more than 160 MiB for one head."""
    n, window, sinks, top = 2**20, 64 * 60, 128, 100
    head = torch.zeros(1, dtype=torch.int32)
    band = BandIndex(
        head,
        torch.arange(0, window, PIECE, dtype=torch.int32)[None, None],
        torch.arange(sinks, dtype=torch.int32)[None, None],
        n_k=n,
    )
    r0 = torch.arange(0, n, TILE)
    banded = TILE * r0.clamp(max=window) + TILE * (r0 - window).clamp(0, sinks)
    own = TILE * (TILE + 1) // 2
    lengths = torch.arange(n // TILE).clamp(max=top - 1) + 1
    starts = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()[None, None]
    tile = torch.arange(n // TILE).repeat_interleave(lengths)
    entry = torch.arange(len(tile)) - starts[0, 0, :-1].long().repeat_interleave(lengths)
    # The list of a tile: its own block and those just before it.
    near = (tile - lengths.repeat_interleave(lengths) + 1 + entry).int()[None, None]
    blocks = BlockIndex(head, starts, near, n_q=n, n_k=n)
    with Largest() as largest:
        assert band.visible_pairs(n).item() == (banded + own).sum()
        assert blocks.visible_pairs(n).item() == ((lengths - 1) * TILE * TILE + own).sum()
    assert largest.nbytes <= 160 * 2**20


def test_an_index_refuses_lengths_it_was_not_built_for() -> None:
    band, block = random_band(300, seed=0), random_block(111, 300, seed=0)
    for index in (band, block):
        with pytest.raises(ValueError, match="built for n_k = 300, got 299"):
            index.mask(100, 299)
        with pytest.raises(ValueError, match="between 1 and n_k = 300, got 0"):
            index.mask(0, 300)
        with pytest.raises(ValueError, match="between 1 and n_k = 300, got 301"):
            index.mask(301, 300)
    with pytest.raises(ValueError, match="between 1 and n_k = 300, got 301"):
        band.visible_pairs(301)
    with pytest.raises(ValueError, match="built for n_q = 111, got 112"):
        block.mask(112, 300)
    for refused in (block.visible_pairs, block.whole_rows):
        with pytest.raises(ValueError, match="built for n_q = 111, got 112"):
            refused(112)
    with pytest.raises(ValueError, match="built for n_q = 111, got 112"):
        block.visible(torch.arange(3), 0, 300, 112)
