"""The oracles themselves, against definitions written out another way and worked examples."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from minference_green.kernels import reference
from minference_green.kernels.index import PIECE, TILE, room_for_pieces


def test_attention_over_the_causal_mask_is_dense_attention() -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, 65, 16, generator=g, dtype=torch.float64) for h in (4, 2, 2))
    mask = reference.causal_mask(65, 65).expand(2, 4, -1, -1)
    out, lse = reference.attention(q, k, v, mask, scale=0.3)
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    torch.testing.assert_close(
        out, scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)
    )
    last = (q[0, 3, -1] @ k[0, 3].T * 0.3).exp().sum().log()
    torch.testing.assert_close(lse[0, 3, -1], last)


def test_attention_by_hand() -> None:
    """Two keys, one hidden from the first row; logits 0 and ln 3 weigh values 1 : 3."""
    q = torch.tensor([[1.0], [1.0]]).view(1, 1, 2, 1)
    k = torch.tensor([[0.0], [math.log(3.0)]]).view(1, 1, 2, 1)
    v = torch.tensor([[8.0], [4.0]]).view(1, 1, 2, 1)
    out, lse = reference.attention(q, k, v, reference.causal_mask(2, 2)[None, None], scale=1.0)
    assert out.flatten().tolist() == pytest.approx([8.0, 5.0])
    assert lse.flatten().tolist() == pytest.approx([0.0, math.log(4.0)])


def test_queries_are_the_last_positions_of_a_causal_mask() -> None:
    want = [[True, True, True, False], [True, True, True, True]]
    assert reference.causal_mask(2, 4).tolist() == want


@pytest.mark.parametrize(("n_q", "n_k"), [(1, 1), (7, 7), (7, 100), (100, 100)])
def test_the_mass_of_the_last_rows_is_one_per_row_by_columns_and_by_slashes(
    n_q: int, n_k: int
) -> None:
    g = torch.Generator().manual_seed(n_k)
    q, k = torch.randn(1, 2, n_q, 8, generator=g), torch.randn(1, 1, n_k, 8, generator=g)
    columns, slashes = reference.last_rows_scores(q, k, scale=0.5)
    rows = min(64, n_q)
    assert columns.sum(-1).flatten().tolist() == pytest.approx([rows, rows])
    assert slashes.sum(-1).flatten().tolist() == pytest.approx([rows, rows])


def test_one_row_spreads_its_mass_over_columns_and_their_distances() -> None:
    """With one row at the end, the slash o is the column n - 1 - o."""
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 1, 5, 8, generator=g), torch.randn(1, 1, 50, 8, generator=g)
    columns, slashes = reference.last_rows_scores(q, k, scale=0.5, rows=1)
    assert torch.equal(slashes, columns.flip(-1))
    want = torch.softmax(q[0, 0, -1].double() @ k[0, 0].double().T * 0.5, -1)
    torch.testing.assert_close(columns[0, 0], want)


def test_equal_queries_and_keys_put_even_mass_on_what_each_row_sees() -> None:
    """Rows 1 and 2 of 3 see 2 and 3 keys: columns 1/2 + 1/3, 1/2 + 1/3, 1/3."""
    ones = torch.ones(1, 1, 3, 4)
    columns, slashes = reference.last_rows_scores(ones, ones, scale=1.0, rows=2)
    assert columns.flatten().tolist() == pytest.approx([5 / 6, 5 / 6, 1 / 3])
    assert slashes.flatten().tolist() == pytest.approx([5 / 6, 5 / 6, 1 / 3])


@pytest.mark.parametrize(("n_q", "n_k"), [(1, 1), (7, 100), (100, 100)])
def test_the_last_rows_are_a_list_of_rows_as_any_other(n_q: int, n_k: int) -> None:
    """Two oracles, written differently, agree where they say the same."""
    g = torch.Generator().manual_seed(n_k)
    q, k = torch.randn(1, 2, n_q, 8, generator=g), torch.randn(1, 1, n_k, 8, generator=g)
    rows = range(n_k - min(64, n_q), n_k)
    got = reference.row_scores(q, k, rows, scale=0.5)
    torch.testing.assert_close(got, reference.last_rows_scores(q, k, scale=0.5))


def test_listed_rows_by_hand() -> None:
    """Even mass: rows 1 and 3 of 4 give their keys 1/2 and 1/4; own keys, then key 0, skipped."""
    ones = torch.ones(1, 1, 4, 2)
    columns, slashes = reference.row_scores(ones, ones, [1, 3], scale=1.0)
    assert columns.flatten().tolist() == pytest.approx([0.75, 0.75, 0.25, 0.25])
    assert slashes.flatten().tolist() == pytest.approx([0.75, 0.75, 0.25, 0.25])
    columns, slashes = reference.row_scores(
        ones, ones, [1, 3], scale=1.0, skip_offsets=1, skip_columns=1
    )
    assert columns.flatten().tolist() == pytest.approx([0.75, 0.25, 0.25, 0])
    assert slashes.flatten().tolist() == pytest.approx([0.75, 0.25, 0.25, 0])


def test_the_largest_scores_win_and_ties_go_to_the_smaller_position() -> None:
    scores = torch.tensor([1.0, 5.0, 3.0, 5.0, 3.0, 0.0])
    assert reference.top_positions(scores, 1, 0) == [1]
    assert reference.top_positions(scores, 3, 0) == [1, 2, 3]
    assert reference.top_positions(scores, 9, 0) == [0, 1, 2, 3, 4, 5]


def test_forced_positions_come_before_any_score() -> None:
    scores = torch.tensor([0.0, 0.0, 9.0, 8.0])
    assert reference.top_positions(scores, 3, 2) == [0, 1, 2]
    assert reference.top_positions(scores, 1, 2) == [0]


def test_bands_are_cut_as_worked_out_by_hand() -> None:
    """Slash 0 lies in the query tile; 1 to 64 need [0, 64); 65 needs [1, 65), so one more."""
    four = [0, 16, 32, 48]
    assert reference.cut_pieces([]) == []
    assert reference.cut_pieces([0]) == []
    assert reference.cut_pieces([1]) == four
    assert reference.cut_pieces([0, 1, 64]) == four
    assert reference.cut_pieces([1, 65]) == [*four, 64]
    assert reference.cut_pieces([300]) == [236, 252, 268, 284]
    assert reference.cut_pieces([300, 316]) == [236, 252, 268, 284, 300]
    assert reference.cut_pieces([300, 317]) == [236, 252, 268, 284, 300, 316]
    # 379 begins at 315, less than a piece behind the end of 300; 380 begins a run of its own.
    assert reference.cut_pieces([300, 379]) == list(range(236, 379, 16))
    assert reference.cut_pieces([300, 380]) == [*range(236, 300, 16), *range(316, 380, 16)]


@given(st.lists(st.integers(0, 2000), unique=True).map(sorted))
def test_pieces_are_disjoint_cover_every_band_and_come_in_runs_of_a_tile(
    offsets: list[int],
) -> None:
    pieces = reference.cut_pieces(offsets)
    covered = {e for p in pieces for e in range(p, p + PIECE)}
    assert len(covered) == PIECE * len(pieces)
    assert pieces == sorted(pieces)
    assert {e for o in offsets for e in range(max(0, o - TILE), o)} <= covered
    begins = [p for p in pieces if p - 1 not in covered]
    assert all(set(range(p, p + TILE)) <= covered for p in begins)
    assert len(pieces) <= room_for_pieces(len(offsets), max(offsets, default=0) + 1)


@given(st.lists(st.integers(TILE, 900), unique=True, max_size=8).map(sorted))
def test_a_run_holds_less_than_a_piece_a_band_beyond_what_bands_need(offsets: list[int]) -> None:
    needed = {e for o in offsets for e in range(o - TILE, o)}
    assert len(reference.cut_pieces(offsets)) * PIECE - len(needed) < PIECE * len(offsets) or (
        not offsets
    )


def test_chosen_slashes_and_columns_are_visible_and_nothing_else() -> None:
    mask = reference.vertical_slash_mask([0, 2], [1], 3, 4)
    want = [
        [0, 1, 0, 0],  # row 1: itself (slash 0), which is also column 1
        [1, 1, 1, 0],  # row 2: slash 2 is column 0, column 1, itself
        [0, 1, 0, 1],  # row 3: slash 2 is column 1, itself
    ]
    assert mask.int().tolist() == want


def test_an_a_shape_is_its_sinks_and_its_window() -> None:
    want = [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 0, 1, 1, 0],
        [1, 0, 0, 1, 1],
    ]
    assert reference.a_shape_mask(1, 2, 5, 5).int().tolist() == want
    assert reference.a_shape_mask(1, 2, 2, 5).int().tolist() == want[3:]


def test_a_block_mean_leaves_out_what_is_not_a_token() -> None:
    x = torch.arange(TILE + 2.0).view(1, 1, -1, 1)
    means = reference.block_means(x)
    assert means.flatten().tolist() == [(TILE - 1) / 2, TILE + 0.5]


def test_block_lists_by_hand() -> None:
    """Four aligned blocks whose scores are known: block 0 and the diagonal join the best one."""
    level = torch.tensor([1.0, 4.0, 3.0, 2.0]).repeat_interleave(TILE).view(1, 1, -1, 1)
    q = torch.ones_like(level)
    assert reference.block_lists(q, level, scale=1.0, top_k=1) == [
        [[[0], [0, 1], [0, 1, 2], [0, 1, 3]]]
    ]


def test_an_unaligned_query_tile_keeps_both_blocks_it_reaches() -> None:
    q, k = torch.ones(1, 1, 70, 1), torch.ones(1, 1, 230, 1)
    # Rows 160 to 223 lie in blocks 2 and 3, rows 224 to 229 in block 3; ties choose block 0.
    assert reference.block_lists(q, k, scale=1.0, top_k=1) == [[[[0, 2, 3], [0, 3]]]]
