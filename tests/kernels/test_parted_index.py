"""A prompt in parts: each row sees what its own part's index shows, by mask and by count."""

import pytest
import torch
from torch import Tensor

from minference_green.kernels.index import NONE, PIECE, TILE, BandIndex, PartedIndex, causal_pairs


def band(n_k: int, starts: list[int], columns: list[int]) -> BandIndex:
    """Two heads: runs of one tile and the given columns, and everything."""
    pieces = [p for start in starts for p in range(start, start + TILE, PIECE)]
    everything = list(range(0, n_k, PIECE))

    def padded(first: list[int], second: list[int]) -> Tensor:
        width = max(len(first), len(second))
        rows = [x + [NONE] * (width - len(x)) for x in (first, second)]
        return torch.tensor([rows], dtype=torch.int32)

    heads = torch.tensor([3, 1], dtype=torch.int32)
    return BandIndex(heads, padded(pieces, everything), padded(columns, []), n_k)


PARTS = (band(128, [0], []), band(256, [], [5, 70]), band(300, [30], [0, 200]))
N = 300


def test_each_row_sees_what_its_own_part_shows() -> None:
    index = PartedIndex(PARTS)
    assert index.heads.tolist() == [3, 1]
    assert index.n_k == N
    mask = index.mask(N, N)
    for first, past, part in ((0, 128, PARTS[0]), (128, 256, PARTS[1]), (256, 300, PARTS[2])):
        assert torch.equal(mask[:, :, first:past, :past], part.mask(past - first, past))
        assert not mask[:, :, first:past, past:].any()


def test_its_pairs_are_those_of_the_mask() -> None:
    index = PartedIndex(PARTS)
    mask = index.mask(N, N)
    assert torch.equal(index.visible_pairs(N), mask.sum((2, 3)))
    assert index.density(N)[0, 1] == 1
    assert index.density(N)[0, 0].item() == mask[0, 0].sum().item() / causal_pairs(N, N)


def test_some_rows_and_keys_of_its_mask_are_that_part_of_it() -> None:
    index = PartedIndex(PARTS)
    rows = torch.tensor([299, 0, 130, 255, 256, 127])
    for begin, end in ((0, 300), (64, 200), (255, 256), (290, 300)):
        want = index.mask(N, N)[:, :, rows, begin:end]
        assert torch.equal(index.visible(rows, begin, end, N), want)


def test_whole_rows_end_with_the_first_part_that_leaves_something_out() -> None:
    """The first head is whole for 128 rows: its next tile sees two keys left of it."""
    assert PartedIndex(PARTS).whole_rows(N).tolist() == [[128, 300]]
    gap = (band(128, [], []), *PARTS[1:])
    assert PartedIndex(gap).whole_rows(N).tolist() == [[64, 300]]


def test_a_part_of_a_prompt_is_refused() -> None:
    index = PartedIndex(PARTS)
    with pytest.raises(ValueError, match="a whole prompt of 300, got n_q = 299"):
        index.visible_pairs(299)
    with pytest.raises(ValueError, match="a whole prompt of 300, got n_q = 44"):
        index.mask(44, 300)
    with pytest.raises(ValueError, match="built for n_k = 300, got 256"):
        index.mask(256, 256)
