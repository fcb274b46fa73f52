"""Which rows an index is chosen from, and that an index from rows all over serves all rows."""

import itertools

import pytest
import torch
from torch import Tensor

from minference_green.errors import UsageError
from minference_green.kernels import reference
from minference_green.kernels.index import TILE, PartedIndex
from minference_green.methods.estimator import LAST_ROWS, Estimator
from minference_green.methods.patterns import AShape, BlockSparse, VerticalSlash
from minference_green.methods.sparse import SparsePrefill

SPREAD = Estimator(rows=64, last=8, skip_forced=True)


@pytest.mark.parametrize("n", [1, 7, 63, 64, 65, 111, 1000, 131072])
def test_the_rows_ascend_within_the_prompt_and_end_with_the_last(n: int) -> None:
    for estimator in (LAST_ROWS, SPREAD, Estimator(rows=13, last=13), Estimator(rows=2, last=1)):
        rows = estimator.rows_of(0, n)
        assert len(rows) == min(n, estimator.rows)
        assert all(a < b for a, b in itertools.pairwise(rows))
        last = min(n, estimator.last)
        assert rows[-last:] == list(range(n - last, n))
        assert rows[0] >= 0


def test_every_share_of_a_long_prompt_has_its_row() -> None:
    rows = SPREAD.rows_of(0, 100_008)[:-8]
    assert [row * 56 // 100_000 for row in rows] == list(range(56))


def test_minferences_rows_are_the_last_64() -> None:
    assert LAST_ROWS.rows_of(0, 1000) == list(range(936, 1000))
    assert LAST_ROWS.skips == {"skip_offsets": 0, "skip_columns": 0}


@pytest.mark.parametrize("n", [1, 64, 65, 300, 1000])
@pytest.mark.parametrize("segments", [1, 2, 3, 7])
def test_parts_are_whole_tiles_that_follow_each_other(n: int, segments: int) -> None:
    parts = Estimator(segments=segments).parts(n)
    assert len(parts) == min(segments, -(-n // TILE))
    assert [end for _, end in parts] == [*(begin for begin, _ in parts[1:]), n]
    assert parts[0][0] == 0
    assert all(begin % TILE == 0 < end - begin for begin, end in parts)
    sizes = [-(-(end - begin) // TILE) for begin, end in parts]
    assert max(sizes) - min(sizes) <= 1


def test_the_rows_of_a_part_lie_in_it_like_those_of_a_prompt() -> None:
    shifted = [row - 4096 for row in SPREAD.rows_of(4096, 5096)]
    assert shifted == SPREAD.rows_of(0, 1000)


def test_sums_over_possible_rows_are_averages_over_at_least_eight() -> None:
    """Row r adds to columns up to r - 100 and to offsets up to r - 30; raw sums are kept."""
    rows = list(range(200, 1000, 80))
    columns, slashes = torch.ones(1, 1, 1000), torch.ones(1, 1, 1000)
    tile = Estimator(rows=10, last=1, normalise="tile", skip_forced=True)
    by_column, by_slash = (x[0, 0] for x in tile.weigh(columns, slashes, rows))
    for scores, skipped in ((by_column, 100), (by_slash, 30)):
        for position in (0, 100, 101, 180, 181, 999):
            able = sum(row - position >= skipped for row in rows)
            assert scores[position].item() == pytest.approx(1 / max(able, 8))
    raw = Estimator(rows=10, last=1, skip_forced=True)
    assert raw.weigh(columns, slashes, rows) == (columns, slashes)


@pytest.mark.parametrize(("change", "match"), [
    ({"segments": 0}, "segments must be at least 1, got 0"),
    ({"rows": 65}, "rows must be between 1 and 64, got 65"),
    ({"last": 65}, "last must be between 1 and rows = 64, got 65"),
    ({"normalise": "mean"}, "normalise must be one of raw, tile, got 'mean'"),
])  # fmt: skip
def test_an_estimator_that_cannot_be_is_refused(change: dict[str, int], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        Estimator(**change)


def a_question_in_the_middle(n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys 200 to 211 are wanted by rows 400 to 700 and by no later one."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, n, 64, generator=g) for h in (2, 1, 1))
    direction = torch.nn.functional.normalize(torch.randn(64, generator=g), dim=0) * 8
    k[:, :, 200:212] = direction
    q[:, :, 400:700] += direction
    return q, k, v


@pytest.mark.parametrize("normalise", ["raw", "tile"])
def test_what_rows_in_the_middle_look_for_is_kept_at_the_same_budget(normalise: str) -> None:
    """And at no more density."""
    n, middle = 1400, slice(400, 700)
    q, k, v = a_question_in_the_middle(n)
    want, _ = reference.attention(
        q, k, v, reference.causal_mask(n, n).expand(1, 2, n, n), scale=0.125
    )
    budget = VerticalSlash(60, 120)
    spread = Estimator(rows=64, last=8, normalise=normalise, skip_forced=True)
    errors, densities = [], []
    for estimator in (LAST_ROWS, spread):
        method = SparsePrefill("tried", budget, {}, estimator)
        profile = method.profile(q, k, v, scale=0.125, layer=0)
        error = (profile.out - want)[:, :, middle].norm() / want[:, :, middle].norm()
        errors.append(float(error))
        densities.append(float(profile.density.mean()))
    assert errors[1] < errors[0] / 3
    assert densities[1] <= densities[0]


def test_a_layer_is_chosen_by_the_oracles_scores_of_the_listed_rows() -> None:
    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, h, 700, 64, generator=g) for h in (2, 1, 1))
    method = SparsePrefill("spread", VerticalSlash(50, 130), {}, SPREAD)
    (index,) = method.profile(q, k, v, scale=0.125, layer=0).indices
    columns, slashes = reference.row_scores(
        q, k, SPREAD.rows_of(0, 700), scale=0.125, skip_offsets=100, skip_columns=30
    )
    for head in range(2):
        kept = reference.top_positions(columns[0, head], 50, 30)
        offsets = reference.top_positions(slashes[0, head], 130, 100)
        assert index.columns[0, head].tolist() == kept
        tiles = index.pieces[0, head]
        assert tiles[tiles < 700].tolist() == reference.cut_pieces(offsets)


@pytest.mark.parametrize("segments", [2, 3])
def test_each_part_of_a_prompt_is_served_by_its_own_rows(segments: int) -> None:
    """A part is computed as a prompt that ends with it would compute its last rows."""
    n = 700
    g = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(2, h, n, 64, generator=g) for h in (4, 2, 2))
    budget = VerticalSlash(50, 110)
    estimator = Estimator(rows=64, last=8, segments=segments, skip_forced=True)
    mixed = ((budget, AShape(3, 70), budget, BlockSparse(1)),)
    profile = SparsePrefill("parts", mixed, {}, estimator).profile(q, k, v, scale=0.125, layer=0)
    mask = torch.zeros(2, 4, n, n, dtype=torch.bool)
    for index in profile.indices:
        mask[:, index.heads.long()] = index.mask(n, n)
    want, lse = reference.attention(q, k, v, mask, scale=0.125)
    torch.testing.assert_close(profile.out.double(), want, rtol=0, atol=1e-5)
    assert profile.lse is not None
    torch.testing.assert_close(profile.lse.double(), lse, rtol=0, atol=1e-5)
    shares = mask.sum((2, 3)).double().mean(0) / (n * (n + 1) / 2)
    torch.testing.assert_close(profile.density, shares)

    parted = profile.indices[0]
    assert isinstance(parted, PartedIndex)
    assert parted.heads.tolist() == [0, 2]
    for begin, end, part in parted.served():
        rows = estimator.rows_of(begin, end)
        columns, slashes = reference.row_scores(
            q[:, :, begin:end], k[:, :, :end], rows, scale=0.125, skip_offsets=100, skip_columns=30
        )
        for b, (slot, head) in itertools.product(range(2), enumerate([0, 2])):
            kept = reference.top_positions(columns[b, head], 50, 30)
            assert part.columns[b, slot].tolist() == kept
            tiles = part.pieces[b, slot]
            offsets = reference.top_positions(slashes[b, head], 110, 100)
            assert tiles[tiles < n].tolist() == reference.cut_pieces(offsets)


def test_parts_keep_what_each_looks_for_in_a_budget_too_small_for_all() -> None:
    """Four topics, each asked for by its own quarter: 40 columns hold one and the sinks."""
    n, width = 1536, 10
    g = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, 1, n, 64, generator=g) for _ in range(3))
    topics = torch.linalg.qr(torch.randn(64, 4, generator=g)).Q.T * 12
    at = [300, 420, 800, 1160]
    for part, (topic, begin) in enumerate(zip(topics, at, strict=True)):
        k[:, :, begin : begin + width] = topic
        rows = slice(max(part * n // 4, begin + 110), (part + 1) * n // 4)
        q[:, :, rows] += topic
    asking = torch.cat([torch.arange(530, 768), torch.arange(910, 1152), torch.arange(1270, n)])
    want, _ = reference.attention(
        q, k, v, reference.causal_mask(n, n).expand(1, 1, n, n), scale=0.125
    )
    errors, densities = {}, {}
    for segments in (1, 4):
        estimator = Estimator(rows=64, last=8, segments=segments, skip_forced=True)
        method = SparsePrefill("parts", VerticalSlash(40, 100), {}, estimator)
        profile = method.profile(q, k, v, scale=0.125, layer=0)
        error = (profile.out - want)[:, :, asking].norm() / want[:, :, asking].norm()
        errors[segments], densities[segments] = float(error), float(profile.density[0])
    assert errors[4] < errors[1] / 3
    assert densities[4] < densities[1] * 1.05
