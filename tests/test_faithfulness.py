"""What sparse attention lost, against brute force in float64."""

import math

import pytest
import torch
from torch import Tensor

from minference_green import faithfulness
from minference_green.faithfulness import (
    RecallError,
    causal_lse,
    class_mass,
    divergences,
    kept_mass,
    relative_rms,
    sampled_rows,
)
from minference_green.kernels import cpu
from minference_green.kernels.index import NONE, PIECE, TILE, BandIndex, BlockIndex
from minference_green.kernels.reference import attention, causal_mask, expand_kv

# One token, less and more than a tile, an odd number of tiles.
LENGTHS = [1, 7, 65, 300]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks even at a few hundred tokens."""
    monkeypatch.setattr(faithfulness, "_CHUNK", 5000)


def inputs(n: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Two prompts, four query heads over two KV heads; scores wide enough to be peaked."""
    g = torch.Generator().manual_seed(n)
    q = torch.randn(2, 4, n, 16, generator=g) * 3
    k, v = torch.randn(2, 2, 2, n, 16, generator=g)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def two_indices(n: int) -> list[BandIndex | BlockIndex]:
    """Heads 3, 0 see a band and two columns, heads 1, 2 every other key tile; nobody sees all."""
    pieces = [p for run in (0, 70) for p in range(run, run + TILE, PIECE)]
    near = torch.tensor([*pieces, NONE], dtype=torch.int32).expand(2, 2, -1)
    columns = torch.tensor([0, 5, NONE], dtype=torch.int32).expand(2, 2, -1)
    band = BandIndex(torch.tensor([3, 0], dtype=torch.int32), near, columns, n)
    lists = [[t for t in range(m + 1) if (m - t) % 2 == 0] for m in range(-(-n // TILE))]
    starts = torch.tensor([0, *map(len, lists)]).cumsum(0).int().expand(2, 2, -1)
    blocks = torch.tensor([t for row in lists for t in row]).int().expand(2, 2, -1)
    return [band, BlockIndex(torch.tensor([1, 2], dtype=torch.int32), starts, blocks, n, n)]


@pytest.mark.parametrize("n", [1, 7, 255, 256, 257, 300, 1000, 131072])
def test_sampled_rows_are_ascending_with_one_in_every_stretch(n: int) -> None:
    rows = sampled_rows(n, 256)
    count = min(n, 256)
    stretch = torch.arange(count + 1) * n // count
    assert len(rows) == count
    assert (rows >= stretch[:-1]).all()
    assert (rows < stretch[1:]).all()


def test_sampled_rows_meet_every_lane_of_a_tile_alike() -> None:
    lanes = torch.bincount(sampled_rows(131072, 2048) % TILE, minlength=TILE)
    assert lanes.min() >= 2048 // TILE // 2


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_log_sum_exp_of_sampled_rows_is_that_of_full_attention(n: int, dtype: torch.dtype) -> None:
    q, k, v = inputs(n, dtype)
    rows = sampled_rows(n, 23)
    _, want = attention(q, k, v, causal_mask(n, n).expand(2, 4, -1, -1), scale=0.2)
    found = causal_lse(q[:, :, rows], k, rows, scale=0.2)
    torch.testing.assert_close(found.double(), want[:, :, rows], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n", LENGTHS)
def test_recall_from_a_kernels_log_sum_exp_is_the_mass_its_pairs_hold(n: int) -> None:
    q, k, v = inputs(n)
    rows = sampled_rows(n, 23)
    dense = causal_lse(q[:, :, rows], k, rows, scale=0.2)
    scores = q.double() @ expand_kv(k, 4).double().transpose(-1, -2) * 0.2
    mass = torch.softmax(scores.masked_fill(~causal_mask(n, n), -torch.inf), -1)
    for index, run in zip(two_indices(n), (cpu.band_attention, cpu.block_attention), strict=True):
        out = torch.empty_like(q)
        _, lse = run(q, k, v, index, scale=0.2, out=out, return_lse=True)
        heads = index.heads.long()
        want = (mass[:, heads] * index.mask(n, n)).sum(-1)[:, :, rows]
        found = kept_mass(lse[:, :, rows], dense[:, heads])
        torch.testing.assert_close(found.double(), want, rtol=1e-4, atol=1e-5)
        assert n < 300 or want.min() < 0.5


def test_a_key_counted_twice_is_a_defect() -> None:
    lse = torch.tensor([1.0, 2.0, 3.0])
    assert torch.equal(kept_mass(lse, lse), torch.ones(3))
    with pytest.raises(RecallError, match=r"kept 1\.105 of its attention"):
        kept_mass(lse + torch.tensor([0.0, 0.1, -1.0]), lse)
    with pytest.raises(RecallError, match="kept nan"):
        kept_mass(lse * torch.nan, lse)


def test_a_row_that_sees_nothing_kept_nothing() -> None:
    assert kept_mass(torch.tensor([-math.inf]), torch.tensor([1.0])).item() == 0


@pytest.mark.parametrize("n", LENGTHS)
def test_mass_by_class_is_the_sum_over_the_keys_of_the_class(n: int) -> None:
    q, k, _ = inputs(n)
    rows, classes = sampled_rows(n, 23), torch.arange(n) % 3
    found = class_mass(q[:, :, rows], k, rows, classes, two_indices(n), scale=0.2, n_classes=4)
    scores = q.double() @ expand_kv(k, 4).double().transpose(-1, -2) * 0.2
    mass = torch.softmax(scores.masked_fill(~causal_mask(n, n), -torch.inf), -1)[:, :, rows]
    seen = torch.zeros(2, 4, n, n, dtype=torch.bool)
    for index in two_indices(n):
        seen[:, index.heads.long()] = index.mask(n, n)
    for number in range(4):
        of_class = mass * (classes == number)
        close = {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(found.dense[..., number].double(), of_class.sum(-1), **close)
        want = (of_class * seen[:, :, rows]).sum(-1)
        torch.testing.assert_close(found.kept[..., number].double(), want, **close)
    assert not found.dense[..., 3].any()


def test_mass_by_class_of_every_pair_is_the_dense_mass() -> None:
    n = 65
    q, k, _ = inputs(n)
    rows, classes = torch.tensor([0, 7, 64]), torch.arange(n) % 3
    found = class_mass(q[:, :, rows], k, rows, classes, None, scale=0.2, n_classes=3)
    assert torch.equal(found.kept, found.dense)
    some = class_mass(q[:, :, rows], k, rows, classes, two_indices(n), scale=0.2, n_classes=3)
    assert torch.equal(found.dense, some.dense)
    assert not torch.equal(found.kept, some.kept)


def test_mass_by_class_refuses_what_does_not_fit() -> None:
    q, k, _ = inputs(65)
    rows, classes, indices = torch.tensor([64]), torch.zeros(65), two_indices(65)
    with pytest.raises(ValueError, match=r"each of 4 query heads once, got \[3, 0\]"):
        class_mass(q[:, :, rows], k, rows, classes, indices[:1], scale=1.0, n_classes=1)
    with pytest.raises(ValueError, match=r"once, got \[\]"):
        class_mass(q[:, :, rows], k, rows, classes, [], scale=1.0, n_classes=1)
    with pytest.raises(ValueError, match=r"each of 65 keys, got \[64\]"):
        class_mass(q[:, :, rows], k, rows, classes[1:], indices, scale=1.0, n_classes=1)
    with pytest.raises(ValueError, match="classes must be 0 to 0, got 1 to 1"):
        class_mass(q[:, :, rows], k, rows, classes + 1, indices, scale=1.0, n_classes=1)


@pytest.mark.parametrize(("m", "vocabulary"), [(1, 1), (7, 97), (13, 4096)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_divergences_are_those_of_the_whole_distributions(
    m: int, vocabulary: int, with_bias: bool
) -> None:
    g = torch.Generator().manual_seed(m)
    first = torch.randn(m, 24, generator=g)
    second = first + 0.3 * torch.randn(m, 24, generator=g)
    weight, bias = torch.randn(vocabulary, 24, generator=g), torch.randn(vocabulary, generator=g)
    following = torch.randint(vocabulary, (m,), generator=g)
    following[-1] = -1
    given = bias if with_bias else None
    found = divergences(first, second, weight, following, bias=given)
    p, q = (
        torch.log_softmax(x.double() @ weight.double().T + (bias if with_bias else 0), -1)
        for x in (first, second)
    )
    middle = torch.log((p.exp() + q.exp()) / 2)
    js = ((p.exp() * (p - middle)).sum(-1) + (q.exp() * (q - middle)).sum(-1)) / 2
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(found.kl, (p.exp() * (p - q)).sum(-1), **close)
    torch.testing.assert_close(found.js, js, **close)
    assert torch.equal(found.same_top, p.argmax(-1) == q.argmax(-1))
    at = torch.arange(m - 1)
    change = (p - q)[at, following[:-1]]
    torch.testing.assert_close(found.nll_change[:-1], change, **close)
    assert found.nll_change[-1].isnan()


def test_equal_hidden_states_diverge_by_nothing() -> None:
    hidden, weight = torch.randn(5, 8).bfloat16(), torch.randn(3000, 8).bfloat16()
    found = divergences(hidden, hidden.clone(), weight, torch.arange(5))
    assert not found.kl.any()
    assert found.js.max() < 1e-6
    assert found.same_top.all()
    assert not found.nll_change.any()


def test_the_first_of_equally_likely_tokens_is_the_most_likely() -> None:
    weight = torch.ones(2000, 1)  # more than one tile of the vocabulary
    found = divergences(torch.ones(9, 1), 2 * torch.ones(9, 1), weight, torch.zeros(9).long())
    assert found.same_top.all()


def test_relative_error_is_a_ratio_of_norms() -> None:
    reference = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    found = relative_rms(reference * 1.1, reference, -1)
    torch.testing.assert_close(found, torch.tensor([0.1, 0.1]))
    assert relative_rms(torch.zeros(2, 2), reference, (0, 1)) == 1
