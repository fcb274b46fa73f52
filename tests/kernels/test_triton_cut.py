"""Cutting bands into pieces on the device, against the oracle's list."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minference_green.kernels import reference
from minference_green.kernels.cut import BLOCK, cut_pieces
from minference_green.kernels.index import NONE


def cut(rows, n_k, padded):
    pieces = cut_pieces(padded([rows]), n_k)
    return [[piece for piece in row if piece != NONE] for row in pieces[0].tolist()], pieces


def test_each_row_is_cut_by_itself_and_stays_ascending(padded):
    rows = [[0, 1, 2], [], [5, 64, 65, 500], list(range(300)), [0], [999_999], [63, 127, 128, 191]]
    listed, pieces = cut(rows, 1_000_000, padded)
    assert listed == [reference.cut_pieces(row) for row in rows]
    assert pieces.shape == (1, len(rows), 5 * 300)
    assert pieces.dtype == torch.int32
    assert (pieces[..., 1:] >= pieces[..., :-1]).all()


@pytest.mark.parametrize("step", [1, 79, 80])
def test_a_run_goes_on_from_one_block_of_slashes_to_the_next(step, padded):
    """79 apart, slashes need the most pieces they can; 80 apart, each is a run."""
    row = list(range(3, 3 + step * (2 * BLOCK + 5), step))
    n_k = row[-1] + 1
    listed, pieces = cut([row, row[:5]], n_k, padded)
    assert listed == [reference.cut_pieces(row), reference.cut_pieces(row[:5])]
    assert pieces.shape[2] == -(-n_k // 16)


def test_no_slash_at_all_gives_no_piece(padded):
    assert cut_pieces(padded([[[], []]]), 100).shape == (1, 2, 0)


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(st.sets(st.integers(0, 700), max_size=60), min_size=1, max_size=3))
def test_any_offsets_are_cut_like_the_oracle(rows, padded):
    ascending = [sorted(row) for row in rows]
    assert cut(ascending, 701, padded)[0] == [reference.cut_pieces(row) for row in ascending]


@pytest.mark.parametrize(
    "offsets", [torch.zeros(1, 1, 3), torch.zeros(3, dtype=torch.int32)], ids=["float", "one row"]
)
def test_offsets_of_another_kind_are_refused(offsets):
    with pytest.raises(ValueError, match=r"offsets must be contiguous int32 \[B, H, S\], got"):
        cut_pieces(offsets, 100)
