"""Cutting bands into tiles on the device, against the oracle's list."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minference_green.kernels import reference
from minference_green.kernels.cut import cut_tiles
from minference_green.kernels.index import NONE


def cut(rows, padded):
    starts = cut_tiles(padded([rows]))
    return [[start for start in row if start != NONE] for row in starts[0].tolist()], starts


def test_each_row_is_cut_by_itself_and_stays_ascending(padded):
    rows = [[0, 1, 2], [], [5, 64, 65, 500], list(range(300)), [0], [999_999], [63, 127, 128, 191]]
    tiles, starts = cut(rows, padded)
    assert tiles == [reference.cut_tiles(row) for row in rows]
    assert starts.shape == (1, len(rows), 300)
    assert starts.dtype == torch.int32
    assert (starts[..., 1:] >= starts[..., :-1]).all()


def test_no_slash_at_all_gives_no_tile(padded):
    assert cut_tiles(padded([[[], []]])).shape == (1, 2, 0)


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(st.sets(st.integers(0, 700), max_size=60), min_size=1, max_size=3))
def test_any_offsets_are_cut_like_the_oracle(rows, padded):
    ascending = [sorted(row) for row in rows]
    assert cut(ascending, padded)[0] == [reference.cut_tiles(row) for row in ascending]


@pytest.mark.parametrize(
    "offsets", [torch.zeros(1, 1, 3), torch.zeros(3, dtype=torch.int32)], ids=["float", "one row"]
)
def test_offsets_of_another_kind_are_refused(offsets):
    with pytest.raises(ValueError, match=r"offsets must be contiguous int32 \[B, H, S\], got"):
        cut_tiles(offsets)
