"""Radix select against the sort: the same positions to the bit, ties and floats of every kind."""

from collections.abc import Sequence

import pytest
import torch

from minference_green.kernels import selection
from minference_green.kernels.selection import FORCED_COLUMNS, FORCED_OFFSETS
from minference_green.kernels.top import CHUNK, chosen_bands


def random_scores(batch: int, heads: int, n: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.rand(batch, heads, n, generator=g).pow(8)


def assert_chosen(
    device: str,
    columns: torch.Tensor,
    slashes: torch.Tensor,
    verticals: Sequence[int],
    offsets: Sequence[int],
) -> None:
    want = selection.chosen_bands(columns, slashes, verticals, offsets)
    got = chosen_bands(columns.to(device), slashes.to(device), verticals, offsets)
    for ours, sorted_ones in zip(got, want, strict=True):
        assert ours.dtype == torch.int32
        assert torch.equal(ours.cpu(), sorted_ones)


# 1 and 7: fewer than any digit's bins; about CHUNK: a chunk's edge; 9000: five chunks.
@pytest.mark.parametrize("n", [1, 7, 64, 300, CHUNK - 1, CHUNK, CHUNK + 1, 9000])
def test_the_chosen_positions_are_those_of_the_sort(device: str, n: int) -> None:
    columns, slashes = random_scores(2, 3, n), random_scores(2, 3, n, seed=1)
    assert_chosen(device, columns, slashes, [1, 50, 3000], [4000, 7, 120])


def test_columns_and_slashes_do_not_mix(device: str) -> None:
    """One side all high and wide, the other all low and narrow; then exchanged."""
    high, low = random_scores(1, 2, 500) + 10, random_scores(1, 2, 500, seed=1)
    assert_chosen(device, high, low, [400, 300], [120, 5])
    assert_chosen(device, low, high, [5, 120], [300, 400])


def test_equal_scores_go_to_the_smaller_position(device: str) -> None:
    scores = torch.zeros(1, 2, CHUNK + 100)
    scores[0, 0, ::3] = 1.0
    scores[0, 1, -1] = 1.0
    assert_chosen(device, scores, scores.flip(1), [1400, 200], [200, 1400])


def test_ties_are_split_between_chunks(device: str) -> None:
    """The threshold's ties fill three chunks and only some of them are taken."""
    scores = torch.full((1, 1, 2 * CHUNK + 50), 0.5)
    scores[0, 0, 17::1000] = 2.0
    assert_chosen(device, scores, scores.flip(2), [CHUNK + 300], [2 * CHUNK + 7])


def test_scores_that_differ_in_their_last_bit_only_are_told_apart(device: str) -> None:
    """Every digit decides for one of the heads."""
    bits = torch.arange(3000, dtype=torch.int32)
    rows = [0x3F000000 + bits, 0x3F000000 + (bits << 8), 0x3F000000 + (bits << 12), bits << 19]
    shuffled = torch.randperm(3000, generator=torch.Generator().manual_seed(0))
    scores = torch.stack([row[shuffled] for row in rows])[None].view(torch.float32)
    assert_chosen(device, scores, scores.flip(2), [700, 701, 702, 703], [1, 2000, 1500, 999])


def test_every_kind_of_float_is_ordered(device: str) -> None:
    kinds = [0.0, -0.0, 1e-45, -1e-45, 1.0, -1.0, 3e38, -3e38, torch.inf, -torch.inf, 1e-38, 2.0]
    row = torch.tensor([*[torch.inf] * FORCED_OFFSETS, *kinds])
    scores = row.expand(1, len(kinds), -1).contiguous()
    counts = list(range(FORCED_OFFSETS + 1, FORCED_OFFSETS + 1 + len(kinds)))
    assert_chosen(device, scores, scores, counts, counts)


def test_forced_positions_come_first_even_when_they_alone_fill_the_count(device: str) -> None:
    scores = random_scores(1, 1, 500).to(device)
    columns, slashes = chosen_bands(scores, scores, [FORCED_COLUMNS - 5], [FORCED_OFFSETS // 2])
    assert columns[0, 0].tolist() == list(range(FORCED_COLUMNS - 5))
    assert slashes[0, 0].tolist() == list(range(FORCED_OFFSETS // 2))


def test_the_same_bits_every_time(device: str) -> None:
    scores = random_scores(1, 4, 9000).to(device)
    counts = [100, 2000, 5000, 9000]
    first, second = (chosen_bands(scores, scores, counts, counts[::-1]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("scores", "counts", "message"),
    [
        (torch.zeros(1, 1, 8, dtype=torch.float64), [1], "float64"),
        (torch.zeros(1, 8), [1], r"\(1, 8\)"),
        (torch.zeros(1, 2, 8), [1], "2 heads, 1 sizes"),
        (torch.zeros(1, 8, 2).transpose(1, 2), [1, 1], "contiguous"),
        (torch.zeros(1, 2, 9), [1, 1], r"one shape, got \(1, 2, 8\) and \(1, 2, 9\)"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_value(
    scores: torch.Tensor, counts: list[int], message: str
) -> None:
    good = torch.zeros(1, 2, 8)
    with pytest.raises(ValueError, match=message):
        chosen_bands(good, scores, [1, 1], counts)
