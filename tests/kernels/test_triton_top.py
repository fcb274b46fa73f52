"""Radix select against the sort: the same positions to the bit, ties and floats of every kind."""

import pytest
import torch

from minference_green.kernels import selection
from minference_green.kernels.top import CHUNK, top_positions


def random_scores(batch: int, heads: int, n: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.rand(batch, heads, n, generator=g).pow(8)


# 1 and 7: less than a digit's bins; 4095 to 4097: a chunk's edge; 9000: three chunks.
@pytest.mark.parametrize("n", [1, 7, 64, 300, CHUNK - 1, CHUNK, CHUNK + 1, 9000])
def test_the_chosen_positions_are_those_of_the_sort(device: str, n: int) -> None:
    scores = random_scores(2, 3, n)
    counts, forced = [1, 50, 3000], 30
    want = selection.top_positions(scores, counts, forced)
    got = top_positions(scores.to(device), counts, forced)
    assert got.dtype == torch.int32
    assert torch.equal(got.cpu(), want)


def test_equal_scores_go_to_the_smaller_position(device: str) -> None:
    scores = torch.zeros(1, 2, CHUNK + 100)
    scores[0, 0, ::3] = 1.0
    scores[0, 1, -1] = 1.0
    want = selection.top_positions(scores, [1400, 200], 10)
    assert torch.equal(top_positions(scores.to(device), [1400, 200], 10).cpu(), want)


def test_every_kind_of_float_is_ordered(device: str) -> None:
    kinds = [0.0, -0.0, 1e-45, -1e-45, 1.0, -1.0, 3e38, -3e38, torch.inf, -torch.inf, 1e-38, 2.0]
    scores = torch.tensor(kinds).expand(1, len(kinds), -1).contiguous()
    counts = list(range(1, len(kinds) + 1))
    want = selection.top_positions(scores, counts, 0)
    assert torch.equal(top_positions(scores.to(device), counts, 0).cpu(), want)


def test_forced_positions_come_first_even_when_they_alone_fill_the_count(device: str) -> None:
    scores = random_scores(1, 1, 500)
    got = top_positions(scores.to(device), [50], 100)
    assert got[0, 0].tolist() == list(range(50))


def test_the_same_bits_every_time(device: str) -> None:
    scores = random_scores(1, 4, 9000).to(device)
    counts = [100, 2000, 5000, 9000]
    first = top_positions(scores, counts, 100)
    assert all(
        torch.equal(top_positions(scores, [100, 2000, 5000, 9000], 100), first) for _ in "ab"
    )


@pytest.mark.parametrize(
    ("scores", "counts", "message"),
    [
        (torch.zeros(1, 1, 8, dtype=torch.float64), [1], "float64"),
        (torch.zeros(1, 8), [1], r"\(1, 8\)"),
        (torch.zeros(1, 2, 8), [1], "2 heads, 1 sizes"),
        (torch.zeros(1, 8, 2).transpose(1, 2), [1, 1], "contiguous"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_value(
    scores: torch.Tensor, counts: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        top_positions(scores, counts, 0)
