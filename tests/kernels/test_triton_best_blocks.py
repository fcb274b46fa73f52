"""Choosing key tiles bit by bit against the sort: the same lists to the bit, ties included."""

import weakref

import pytest
import torch

from minference_green.kernels import best_blocks as module
from minference_green.kernels import cpu, selection
from minference_green.kernels.best_blocks import listed_index
from minference_green.kernels.index import TILE


def assert_index(got, want):
    for name in ("heads", "starts", "blocks"):
        ours, theirs = getattr(got, name), getattr(want, name)
        assert ours.dtype == torch.int32
        assert torch.equal(ours.cpu(), theirs), name
    assert (got.n_q, got.n_k) == (want.n_q, want.n_k)


def assert_lists(device, scores, top_ks, first_row, n_k):
    """Of all query tiles at once, and of one or two at a time."""
    batch, n_heads, n_tiles, _ = scores.shape
    heads = torch.arange(n_heads, dtype=torch.int32)
    sizes = (top_ks, n_k - first_row, n_k)
    want = selection.listed_index(lambda a, b: scores[:, :, a:b], n_tiles, batch, heads, *sizes)
    for slab in (1, 2, n_tiles):
        there = (lambda a, b: scores[:, :, a:b].contiguous().to(device), slab, batch)
        assert_index(listed_index(*there, heads.to(device), *sizes), want)


@pytest.fixture(autouse=True)
def memory_of_rubbish(monkeypatch):
    """What is read without having been written shows."""
    monkeypatch.setattr(module.torch, "empty", lambda shape, **how: torch.full(shape, 12345, **how))


# Queries from the start, from the middle of a key tile, and from a tile's edge.
@pytest.mark.parametrize(
    ("first_row", "n_k"), [(0, 1), (0, 63), (0, 64), (0, 65), (0, 500), (189, 300), (640, 1000)]
)
def test_the_lists_are_those_of_the_sort(device, first_row, n_k):
    """What no query of a tile reaches scores best of all, and is not chosen."""
    tiles, blocks = -(-(n_k - first_row) // TILE), -(-n_k // TILE)
    g = torch.Generator().manual_seed(n_k)
    scores = -torch.rand(2, 3, tiles, blocks, generator=g).pow(8)
    for m in range(tiles):
        scores[:, :, m, (min(first_row + (m + 1) * TILE, n_k) - 1) // TILE + 1 :] = torch.nan
    assert_lists(device, scores, [1, 5, 300], first_row, n_k)


def test_a_row_of_more_key_tiles_than_the_shortest_held_keeps_its_last(device, monkeypatch):
    monkeypatch.setattr(module, "LEAST_HELD", 32)
    monkeypatch.setattr(module, "CHUNK", 16)
    g = torch.Generator().manual_seed(0)
    scores = torch.randn(1, 2, 2, 33, generator=g)
    # Ties on both sides of a chunk's edge.
    scores[0, 1, :, 3:30] = 0.5
    assert_lists(device, scores, [7, 21], 31 * TILE, 33 * TILE)


def test_equal_scores_go_to_the_smaller_position(device):
    scores = torch.zeros(1, 3, 12, 12)
    scores[0, 0, :, ::3] = 1.0
    scores[0, 1, :, 7] = -1.0
    scores[0, 2, :, ::2] = -0.0
    assert_lists(device, scores, [7, 4, 9], 0, 12 * TILE)


def test_every_kind_of_float_is_ordered(device):
    kinds = [0.0, -0.0, 1e-45, -1e-45, 1.0, -1.0, 3e38, -3e38, torch.inf, -torch.inf, 1e-38, 2.0]
    scores = torch.tensor(kinds).expand(1, len(kinds), 1, -1).contiguous()
    counts = list(range(1, len(kinds) + 1))
    assert_lists(device, scores, counts, 11 * TILE, 12 * TILE)


def test_an_index_by_pooled_scores_is_the_same(device):
    """The scores are of means: few-valued numbers keep them exact on every device."""
    g = torch.Generator().manual_seed(1)
    q, k = (torch.randint(-1, 2, (1, 2, 1000, 4), generator=g).float() for _ in "qk")
    means, heads = (cpu.block_means(q), cpu.block_means(k)), torch.tensor([0, 1], dtype=torch.int32)
    sizes = {"scale": 1.0, "n_q": 1000, "n_k": 1000}
    want = selection.block_index(*means, heads, [3, 5], **sizes)
    got = selection.block_index(
        *(x.to(device) for x in means), heads.to(device), [3, 5], **sizes, build=listed_index
    )
    assert_index(got, want)


def test_scores_are_asked_for_from_the_last_and_not_held_beside_the_next(device):
    """The last reach the most keys: memory that grew from slab to slab could not be used again."""
    asked, held = [], []

    def scores(begin, end):
        assert not any(one() is not None for one in held)
        asked.append((begin, end))
        some = torch.zeros(1, 1, end - begin, end, device=device)
        held.append(weakref.ref(some))
        return some

    heads = torch.zeros(1, dtype=torch.int32, device=device)
    listed_index(scores, 2, 1, heads, [1], 5 * TILE, 5 * TILE)
    assert asked == [(4, 5), (2, 4), (0, 2)]


@pytest.mark.parametrize(
    ("scores", "top_ks", "message"),
    [
        (torch.zeros(1, 1, 2, 8, dtype=torch.float64), [1], "float64"),
        (torch.zeros(1, 2, 8), [1], r"\(1, 2, 8\)"),
        (torch.zeros(1, 1, 2, 8), [1, 2], "1 heads, 2 sizes"),
        (
            torch.zeros(1, 2, 2, 8),
            [1, 2],
            r"1 heads and 2 query tiles, got \(1, 2, 2, 8",
        ),
        (torch.zeros(1, 1, 1, 8), [1], r"1 heads and 2 query tiles, got \(1, 1, 1, 8"),
        (torch.zeros(1, 1, 2, 7), [1], "the 8 key tiles that the query tiles reach, got 7"),
        (torch.zeros(1, 1, 8, 2).transpose(2, 3), [1], "contiguous"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_value(scores, top_ks, message):
    heads = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        listed_index(lambda *_: scores, 2, 1, heads, top_ks, 2 * TILE, 8 * TILE)
