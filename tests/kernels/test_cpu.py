"""The CPU path: exactly the pairs of an index, as accurate as dense, in bounded memory."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minference_green.kernels import cpu, reference
from minference_green.kernels.index import NONE, TILE, BandIndex, BlockIndex
from minference_green.kernels.selection import a_shape_index, band_index, block_index

# One token; less than a tile; around a tile's edge; odd; several tiles and a rest; queries that
# are the last of a longer sequence, beginning inside a key tile or at one.
LENGTHS = [
    (1, 1), (7, 7), (63, 63), (64, 64), (65, 65), (111, 111), (300, 300), (1000, 1000),
    (1, 300), (111, 300), (64, 300), (300, 364), (640, 1000),
]  # fmt: skip

Inputs = tuple[Tensor, Tensor, Tensor]


def inputs(
    n_q: int, n_k: int, dtype: torch.dtype = torch.float64, *, dim: int = 64, sharp: float = 1.0
) -> Inputs:
    """Two prompts, six query heads over two KV heads; ``sharp`` scales the logits."""
    g = torch.Generator().manual_seed(n_q + n_k)
    q = torch.randn(2, 6, n_q, dim, generator=g) * sharp
    k, v = (torch.randn(2, 2, n_k, dim, generator=g) for _ in range(2))
    return q.to(dtype), k.to(dtype), v.to(dtype)


def structured(n: int, dtype: torch.dtype) -> Inputs:
    """A sink, two strong columns and a strong diagonal over noise."""
    q, k, v = inputs(n, n, torch.float32)
    strong = torch.ones(64)
    q += strong
    for j in (0, n // 3, n // 2):
        k[:, :, j] += strong / 2
    offset = n // 4
    q[:, :, offset:] += reference.expand_kv(k, 6)[:, :, : n - offset]
    return q.to(dtype), k.to(dtype), v.to(dtype)


def a_band(n_k: int, heads: Sequence[int] = (4, 0, 3)) -> BandIndex:
    """Of three heads: many columns and scattered slashes, few of both, and only the own tile."""
    g = torch.Generator().manual_seed(n_k)
    columns = torch.randperm(n_k, generator=g)[: n_k // 4].sort().values.tolist()
    offsets = torch.randperm(n_k, generator=g)[: n_k // 60 + 1].sort().values.tolist()
    tiles = [reference.cut_pieces(offsets), reference.cut_pieces([n_k // 2]), []]
    return BandIndex(
        heads=torch.tensor(heads, dtype=torch.int32),
        pieces=padded(tiles),
        columns=padded([columns, columns[:2], []]),
        n_k=n_k,
    )


def a_block(n_q: int, n_k: int, heads: Sequence[int] = (4, 0, 3)) -> BlockIndex:
    """Random lists that differ by prompt, head and query tile, with the diagonal always there."""
    g = torch.Generator().manual_seed(n_k)
    means = (torch.randn(2, len(heads), -(-n // TILE), 8, generator=g) for n in (n_q, n_k))
    heads = torch.tensor(heads, dtype=torch.int32)
    return block_index(*means, heads, [1, 2, 4], scale=1.0, n_q=n_q, n_k=n_k)


def padded(lists: Sequence[Sequence[int]]) -> Tensor:
    """The same rows for two prompts, padded with ``NONE``."""
    width = max(map(len, lists))
    rows = [[*x, *[NONE] * (width - len(x))] for x in lists]
    return torch.tensor([rows, rows], dtype=torch.int32)


def attend(
    qkv: Inputs, index: BandIndex | BlockIndex, scale: float = 0.125
) -> tuple[Tensor, Tensor]:
    """Output of the listed heads and its log-sum-exp; the other heads must stay as they were."""
    run = cpu.band_attention if isinstance(index, BandIndex) else cpu.block_attention
    out = torch.full_like(qkv[0], torch.nan)
    got, lse = run(*qkv, index, scale=scale, out=out, return_lse=True)
    assert got is out
    listed = index.heads.long()
    others = [h for h in range(out.shape[1]) if h not in listed]
    assert out[:, others].isnan().all()
    return out[:, listed], lse


def exact(
    qkv: Inputs, index: BandIndex | BlockIndex, scale: float = 0.125
) -> tuple[Tensor, Tensor]:
    q, k, v = qkv
    heads = index.heads.long()
    k, v = (reference.expand_kv(x, q.shape[1])[:, heads] for x in (k, v))
    mask = index.mask(q.shape[2], k.shape[2])
    return reference.attention(q[:, heads], k, v, mask, scale=scale)


def error(got: Tensor, want: Tensor) -> float:
    """Relative to the root mean square of what is wanted."""
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize(("n_q", "n_k"), LENGTHS)
def test_attention_is_over_exactly_the_pairs_of_the_index(n_q: int, n_k: int) -> None:
    """In float64 nothing but a wrong pair could make a difference."""
    qkv = inputs(n_q, n_k)
    for index in (a_band(n_k), a_block(n_q, n_k)):
        out, lse = attend(qkv, index)
        want, want_lse = exact(qkv, index)
        torch.testing.assert_close(out, want, rtol=0, atol=1e-12)
        torch.testing.assert_close(lse, want_lse, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sharp", [1.0, 8.0])
def test_rounding_is_that_of_dense_attention(dtype: torch.dtype, sharp: float) -> None:
    """Two parts are rounded to the dtype before they are merged: at most twice the error."""
    qkv = inputs(1000, 1000, dtype, sharp=sharp)
    q, k, v = qkv
    dense = scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.125, enable_gqa=True)
    k, v = (reference.expand_kv(x, 6) for x in (k, v))
    mask = reference.causal_mask(1000, 1000).expand(2, 6, -1, -1)
    allowed = 2 * error(dense, reference.attention(q, k, v, mask, scale=0.125)[0])
    for index in (a_band(1000), a_block(1000, 1000)):
        out, lse = attend(qkv, index)
        want, want_lse = exact(qkv, index)
        assert error(out, want) <= allowed
        assert lse.dtype == torch.float32
        # Logits of up to 150 are rounded in fp32.
        torch.testing.assert_close(lse.double(), want_lse, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_planted_structure_is_found_and_followed(dtype: torch.dtype) -> None:
    """Estimate, index and attend together recover dense attention on structured inputs."""
    q, k, v = structured(1000, dtype)
    heads = torch.arange(6, dtype=torch.int32)
    columns, slashes = cpu.row_scores(q, k, heads, range(936, 1000), scale=0.125)
    index = band_index(columns, slashes, heads, [40] * 6, [103] * 6, cut_pieces=cpu.cut_pieces)
    assert index.density(1000).max() < 0.6
    out = cpu.band_attention(q, k, v, index, scale=0.125)
    want, _ = exact((q, k, v), index)
    assert error(out, want) < (1e-6 if dtype == torch.float32 else 1e-2)
    kept = a_shape_index(heads, [40] * 6, [103] * 6, batch=2, n_k=1000)
    dense = scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.125, enable_gqa=True)
    without = cpu.band_attention(q, k, v, kept, scale=0.125)
    assert error(out, dense.double()) < error(without, dense.double()) / 2


@pytest.mark.parametrize("dim", [1, 80, 96, 128, 256])
def test_any_head_dim(dim: int) -> None:
    qkv = inputs(150, 150, dim=dim)
    torch.testing.assert_close(attend(qkv, a_band(150)), exact(qkv, a_band(150)))


def test_inputs_need_not_be_contiguous() -> None:
    """As a model hands them over: tokens before heads in memory."""
    qkv = inputs(300, 300)
    strided = tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv)
    assert not strided[0].is_contiguous()
    for index in (a_band(300), a_block(300, 300)):
        assert torch.equal(attend(strided, index)[0], attend(qkv, index)[0])


@pytest.mark.parametrize("at_once", [1, 64 * 64, 64 * 1000])
def test_the_result_does_not_depend_on_how_much_is_gathered_at_once(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    qkv = inputs(640, 1000)
    monkeypatch.setattr(cpu, "_GATHERED", at_once)
    for index in (a_band(1000), a_block(640, 1000)):
        torch.testing.assert_close(attend(qkv, index), exact(qkv, index))


def test_an_index_without_any_key_to_gather_leaves_each_tile_to_itself() -> None:
    qkv = inputs(130, 130)
    heads = torch.arange(6, dtype=torch.int32)
    index = a_shape_index(heads, [0] * 6, [1] * 6, batch=2, n_k=130)
    got = cpu.band_attention(*qkv, index, scale=0.125)
    torch.testing.assert_close(got, exact(qkv, index)[0])


def test_a_tile_may_miss_its_own_block_and_a_row_without_keys_is_nan() -> None:
    """Block lists promise nothing: the first tile sees nothing, the second only block 0."""
    q, k, v = inputs(128, 128)
    index = BlockIndex(
        heads=torch.arange(6, dtype=torch.int32),
        starts=torch.tensor([0, 0, 1], dtype=torch.int32).expand(2, 6, -1),
        blocks=torch.zeros(2, 6, 1, dtype=torch.int32),
        n_q=128,
        n_k=128,
    )
    out = cpu.block_attention(q, k, v, index, scale=0.125)
    assert isinstance(out, Tensor)
    assert out[:, :, :64].isnan().all()
    torch.testing.assert_close(out[:, :, 64:], exact((q, k, v), index)[0][:, :, 64:])
    nothing = BlockIndex(index.heads, index.starts * 0, index.blocks, n_q=128, n_k=128)
    assert attend((q, k, v), nothing)[0].isnan().all()


def test_memory_is_bounded_by_one_tile_and_not_by_the_prompt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """8192 tokens, 1000 columns: all keys of all tiles would be 67 MB a head, fp32.

    What is noted is noted on the test's own thread, so the work is done there.
    """
    monkeypatch.setattr(cpu, "_on_each_thread", lambda run, items: [run(x) for x in items])
    q, k, v = (torch.zeros(1, 1, 8192, 64) for _ in range(3))
    heads = torch.zeros(1, dtype=torch.int32)
    index = a_shape_index(heads, [1000], [1000], batch=1, n_k=8192)
    with Largest() as largest:
        cpu.band_attention(q, k, v, index, scale=0.125)
    assert 2**20 <= largest.nbytes <= 4 * 2**20


@pytest.mark.parametrize("threads", [1, 3])
def test_the_result_does_not_depend_on_the_number_of_threads_and_leaves_it_alone(
    threads: int,
) -> None:
    """A thread begun later starts from the number torch was given, too."""
    qkv, before = inputs(1000, 1000, torch.float32), torch.get_num_threads()
    want = [attend(qkv, index) for index in (a_band(1000), a_block(1000, 1000))]
    torch.set_num_threads(threads)
    try:
        got = [attend(qkv, index) for index in (a_band(1000), a_block(1000, 1000))]
        with ThreadPoolExecutor(1) as pool:
            numbers = torch.get_num_threads(), pool.submit(torch.get_num_threads).result()
    finally:
        torch.set_num_threads(before)
    assert numbers == (threads, threads)
    for (out, lse), (want_out, want_lse) in zip(got, want, strict=True):
        assert torch.equal(out, want_out)
        assert torch.equal(lse, want_lse)


def test_what_goes_wrong_on_a_thread_is_told_and_the_threads_are_put_back() -> None:
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError):
        cpu._on_each_thread(lambda x: 1 // x, [1, 0, 1])
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_runs_in_the_modes_a_model_is_run_in(mode: type[torch.no_grad]) -> None:
    with mode():
        qkv = inputs(100, 100, torch.float32)
        out, _ = attend(qkv, a_band(100))
    torch.testing.assert_close(out.double(), exact(qkv, a_band(100))[0], rtol=0, atol=1e-5)


class Largest(TorchDispatchMode):
    """Notes the largest tensor any operation returns."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [x.numel() * x.element_size() for x in tree_leaves(out) if isinstance(x, Tensor)]
        self.nbytes = max(self.nbytes, *sizes, 0)
        return out


@pytest.mark.parametrize(("n_q", "n_k"), LENGTHS)
@pytest.mark.parametrize("skips", [(0, 0), (100, 30), (1, 2000)])
def test_scores_of_listed_rows_are_the_oracles(n_q: int, n_k: int, skips: tuple[int, int]) -> None:
    q, k, _ = inputs(n_q, n_k, torch.float32)
    heads = torch.tensor([5, 0], dtype=torch.int32)
    kept = {"skip_offsets": skips[0], "skip_columns": skips[1]}
    for rows in (range(max(n_k - n_q, n_k - 64), n_k), sorted({n_k - n_q, n_k - n_q // 2 - 1})):
        want = reference.row_scores(q, k, rows, scale=0.3, **kept)
        for got, full in zip(
            cpu.row_scores(q, k, heads, rows, scale=0.3, **kept), want, strict=True
        ):
            assert got.dtype == torch.float32
            torch.testing.assert_close(got.double(), full[:, [5, 0]], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("rows", "match"), [
    ([], "rows must be 1 to 64 positions, got 0"),
    ([50, 49], r"rows must ascend, each once, got \[50, 49\]"),
    ([29, 30], "rows must be positions of queries, 30 to 99, got 29 to 30"),
])  # fmt: skip
def test_rows_that_are_no_queries_are_refused(rows: list[int], match: str) -> None:
    q, k, _ = inputs(70, 100, torch.float32)
    with pytest.raises(ValueError, match=match):
        cpu.row_scores(q, k, torch.zeros(1, dtype=torch.int32), rows, scale=0.3)


@pytest.mark.parametrize("n", [1, 63, 64, 65, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_block_means_are_the_oracles(n: int, dtype: torch.dtype) -> None:
    x = inputs(n, n, dtype)[0]
    got = cpu.block_means(x)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), reference.block_means(x), rtol=1e-5, atol=1e-6)


@given(st.lists(st.lists(st.integers(0, 3000), unique=True).map(sorted), min_size=1, max_size=3))
def test_bands_are_cut_like_the_oracles(offsets: list[list[int]]) -> None:
    pieces = cpu.cut_pieces(padded(offsets)[:1], 3001)
    for got, row in zip(pieces[0], offsets, strict=True):
        assert got[got != NONE].tolist() == reference.cut_pieces(row)
        assert (got.diff() >= 0).all()


@pytest.mark.parametrize("n_before", [0, 1, 300])
def test_stretches_see_what_stands_before_all_of_them_and_themselves(
    n_before: int,
) -> None:
    lengths = (1, 7, 65, 13)
    q, k, v = inputs(sum(lengths), n_before + sum(lengths))
    own = torch.block_diag(*(torch.ones(n, n).tril() for n in lengths)).bool()
    seen = torch.cat([torch.ones(len(own), n_before, dtype=torch.bool), own], 1)
    expected = scaled_dot_product_attention(q, k, v, seen, scale=0.3, enable_gqa=True)
    found = cpu.stretches_attention(q, k, v, lengths, scale=0.3)
    torch.testing.assert_close(found, expected)


def test_stretches_that_are_not_the_queries_are_refused() -> None:
    with pytest.raises(ValueError, match=r"add up to n_q = 64, got \[60, 5\]"):
        cpu.stretches_attention(*inputs(64, 300), (60, 5), scale=1.0)


def test_inputs_that_do_not_fit_are_refused_with_their_values() -> None:
    q, k, v = inputs(100, 100)
    band = a_band(100)
    cases = [
        ((q, k[:, :, :99], v), r"\[2, 2, 99, 64\], \[2, 2, 100, 64\]"),
        ((q[:, :5], k, v), r"multiple of Hkv, got \[2, 5, 100, 64\]"),
        ((q[..., :32], k, v), r"\[2, 6, 100, 32\]"),
        ((q[:1], k, v), r"\[1, 6, 100, 64\]"),
        ((q[0], k, v), r"\[6, 100, 64\]"),
        ((q.float(), k, v), r"one floating dtype, got torch\.float32, torch\.float64"),
        ((q.int(), k.int(), v.int()), r"floating dtype, got torch\.int32"),
        ((q, k[:, :, :50], v[:, :, :50]), "between 1 and n_k = 50, got 100"),
        ((q[:, :, :0], k, v), "between 1 and n_k = 100, got 0"),
        ((q[:, :, :90], k[:, :, :90], v[:, :, :90]), "built for n_k = 100, k has 90"),
    ]
    for bad, match in cases:
        with pytest.raises(ValueError, match=match):
            cpu.band_attention(*bad, band, scale=0.1, out=torch.empty_like(bad[0]))
    with pytest.raises(ValueError, match="built for n_q = 100, q has 90"):
        cpu.block_attention(q[:, :, :90], k, v, a_block(100, 100), scale=0.1)
    with pytest.raises(ValueError, match="covers 3 of 6 query heads"):
        cpu.band_attention(q, k, v, band, scale=0.1)
    with pytest.raises(ValueError, match=r"shape of q \[2, 6, 100, 64\], got \[2, 2, 100, 64\]"):
        cpu.band_attention(q, k, v, band, scale=0.1, out=torch.empty_like(k))
