"""Probing on the CPU path: what rows attend to by key tile, and the index chosen from it."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from minference_green.kernels import cpu, reference, selection
from minference_green.kernels.index import NONE, BlockIndex
from minference_green.kernels.selection import probed_index, to_device

LENGTHS = [(1, 1), (7, 7), (63, 63), (64, 64), (65, 65), (111, 300), (300, 300), (1000, 1000)]


def inputs(n_q: int, n_k: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two prompts, four query heads of two KV heads."""
    g = torch.Generator().manual_seed(n_k + seed)
    return torch.randn(2, 4, n_q, 64, generator=g), torch.randn(2, 2, n_k, 64, generator=g)


def heads_of(*heads: int) -> Tensor:
    return torch.tensor(heads, dtype=torch.int32)


def probed(q: Tensor, k: Tensor, *, top_ks: list[int], rows: int) -> BlockIndex:
    heads = heads_of(3, 0)
    return probed_index(q, k, heads, top_ks, rows, scale=0.3, tile_shares=cpu.tile_shares)


def exact_shares(q: Tensor, k: Tensor, rows: int, begin: int, end: int, summed: bool) -> Tensor:
    """Query tile by query tile, each probing row once, by the float64 oracle."""
    n_q, n_k = q.shape[2], k.shape[2]
    reach = (min(n_k - n_q + end * 64, n_k) - 1) // 64 + 1
    shares = torch.full((2, 4, end - begin, reach), 0.0 if summed else -torch.inf).double()
    for m in range(begin, end):
        first = n_k - n_q + m * 64
        lanes = [part * 63 // (rows - 1) for part in range(rows)] if rows > 1 else [63]
        probes = sorted({min(first + lane, n_k - 1) for lane in lanes})
        masses = reference.tile_masses(q, k, probes, scale=0.3, largest=not summed)
        log = masses - masses.logsumexp(-1, keepdim=True)
        shares[:, :, m - begin, : log.shape[-1]] = log.exp().sum(2) if summed else log.amax(2)
    return shares[:, [3, 0]]


@pytest.mark.parametrize("held", [1, 5000, 2**21])
@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize(("n_q", "n_k"), LENGTHS)
def test_shares_by_key_tile_are_the_oracles(
    n_q: int, n_k: int, summed: bool, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all query tiles and of those in the middle, also where few logits are held at once."""
    monkeypatch.setattr(cpu, "_LOGITS", held)
    q, k = inputs(n_q, n_k)
    tiles = -(-n_q // 64)
    for rows, begin, end in ((1, 0, tiles), (5, tiles // 3, tiles // 3 + 1), (64, 0, tiles)):
        got = cpu.tile_shares(q, k, heads_of(3, 0), rows, begin, end, scale=0.3, summed=summed)
        want = exact_shares(q, k, rows, begin, end, summed)
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 3, 4, 64])
@pytest.mark.parametrize(("n_q", "n_k"), LENGTHS)
def test_probed_lists_are_the_oracles(n_q: int, n_k: int, rows: int) -> None:
    q, k = inputs(n_q, n_k)
    top_ks = [1, 5]
    index = probed(q, k, top_ks=top_ks, rows=rows)
    for n, (head, top_k) in enumerate(zip((3, 0), top_ks, strict=True)):
        want = reference.probed_lists(q, k, scale=0.3, top_k=top_k, rows=rows)
        for b in range(2):
            starts = index.starts[b, n].tolist()
            got = [index.blocks[b, n, x:y].tolist() for x, y in itertools.pairwise(starts)]
            assert got == want[b][head]
            assert (index.blocks[b, n, starts[-1] :] == NONE).all()
    assert index.mask(n_q, n_k).diagonal(n_k - n_q, dim1=-2, dim2=-1).all()


def test_a_key_that_one_probing_row_wants_is_kept_though_the_mean_of_the_tile_does_not() -> None:
    """Row 21 of the last query tile looks at key 200 of 1024 alone; the others look nearby."""
    q, k = torch.zeros(1, 1, 1024, 64), torch.zeros(1, 1, 1024, 64)
    k[..., 200, 0], q[..., 960 + 21, 0] = 8.0, 8.0
    heads = heads_of(0)
    index = probed_index(q, k, heads, [1], 4, scale=1.0, tile_shares=cpu.tile_shares)
    assert index.mask(1024, 1024)[0, 0, 960 + 21, 200]
    assert not index.mask(1024, 1024)[0, 0, 896:960, 200].any()


def test_a_flat_row_with_large_logits_does_not_outbid_a_sharp_one() -> None:
    """Every logit of row 63 is 50, of no use to it; row 0 has one key, at a logit of 20."""
    q, k = torch.zeros(1, 1, 512, 64), torch.zeros(1, 1, 512, 64)
    k[..., 0] = 1.0
    k[..., 100, 1] = 1.0
    q[..., 448 + 63, 0], q[..., 448, 1] = 50.0, 20.0
    index = probed_index(q, k, heads_of(0), [1], 2, scale=1.0, tile_shares=cpu.tile_shares)
    assert index.blocks[0, 0, index.starts[0, 0, 7] : index.starts[0, 0, 8]].tolist() == [0, 1, 7]


def test_probed_lists_do_not_depend_on_the_slab(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = inputs(1000, 1000)

    def build() -> tuple[Tensor, Tensor]:
        index = probed(q, k, top_ks=[3, 5], rows=4)
        return index.starts, index.blocks

    whole = build()
    # One query tile at a time, and three of them: 2 prompts, 2 heads, 16 key tiles, 4 + 1 rows.
    for size in (1, 4 * 3 * 2 * 2 * 16 * 5):
        monkeypatch.setattr(selection, "_PROBED_BYTES", size)
        assert all(torch.equal(x, y) for x, y in zip(build(), whole, strict=True))


def test_choosing_by_probes_never_asks_the_device_for_a_value_and_stays_in_memory() -> None:
    """On the meta device a host sync would raise; 131072 tokens of 32 heads score in slabs."""
    asked: list[int] = []

    def no_values(
        q: Tensor, k: Tensor, heads: Tensor, rows: int, begin: int, end: int, *, scale: float
    ) -> Tensor:
        shape = (1, len(heads), end - begin, end)
        asked.append(4 * (rows + 1) * shape[1] * shape[2] * shape[3])
        return torch.zeros(shape, device="meta")

    q = torch.zeros(1, 32, 2**17, 128, device="meta")
    heads = to_device(range(32), q.device)
    index = probed_index(q, q[:, :8], heads, [8] * 32, 4, scale=1.0, tile_shares=no_values)
    assert index.starts.shape == (1, 32, 2**11 + 1)
    assert max(asked) <= 288 * 2**20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 0}, "rows must be between 1 and 64, got 0"),
        ({"rows": 65}, "rows must be between 1 and 64, got 65"),
        ({"top_ks": [1]}, "needs one size per head: 2 heads, 1 sizes"),
    ],
)
def test_a_setting_that_cannot_probe_is_named_with_its_value(change: Any, message: str) -> None:
    q, k = inputs(65, 65)
    with pytest.raises(ValueError, match=message):
        probed(q, k, **{"top_ks": [1, 1], "rows": 4, **change})


@pytest.mark.parametrize(
    ("rows", "begin", "end", "message"),
    [
        (0, 0, 2, "rows must be between 1 and 64, got 0"),
        (65, 0, 2, "rows must be between 1 and 64, got 65"),
        (4, 0, 3, "query tiles must be some of 0 to 2, got 0 to 3"),
        (4, 1, 1, "query tiles must be some of 0 to 2, got 1 to 1"),
        (4, -1, 1, "query tiles must be some of 0 to 2, got -1 to 1"),
    ],
)
def test_query_tiles_that_cannot_probe_are_refused(
    rows: int, begin: int, end: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        cpu.tile_shares(*inputs(65, 70), heads_of(0), rows, begin, end, scale=1.0)


@pytest.mark.parametrize("kv_heads", [range(0), range(1, 3), range(0, 2, 2)])
def test_shares_of_kv_heads_that_are_not_there_are_refused(kv_heads: range) -> None:
    _, k = inputs(65, 65)
    assert cpu.shares_of(k, range(1, 2)) is cpu.tile_shares
    with pytest.raises(ValueError, match="KV heads must be some of 0 to 2, next to each other"):
        cpu.shares_of(k, kv_heads)
