"""Scores that an index is chosen from: masses of some rows, means of blocks.

The probabilities of the rows, rows x keys per head, are never in memory: a first pass keeps
their log-sum-exp, a second computes them again and adds them up by column and by diagonal.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from minference_green.kernels import tile
from minference_green.kernels.index import TILE
from minference_green.kernels.selection import check_rows, to_device
from minference_green.kernels.tile import LN_2, load_tile

CHUNK_TILES = 16
"""Key tiles of one program: enough to hide its start, few enough to fill a GPU at 8K tokens."""

UNITS = 2**24
"""Mass 1 in whole numbers: TILE rows fit int32, and whole numbers add up alike in any order."""

# A kernel is compiled once, not again for lengths that happen to divide by 16.
LENGTHS = ("n_q", "n_k", "n_rows", "group", "skip_offsets", "skip_columns")


@triton.jit
def _load_queries(
    q_ptr, q_row, rows_ptr, n_rows, q_offset,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The listed rows' queries, ``[TILE, DIM]``, and their positions; past the list 0 and -1."""
    lane = tl.arange(0, TILE)
    dims = tl.arange(0, DIM)
    row = tl.load(rows_ptr + lane, lane < n_rows, -1)
    at = q_ptr + (row - q_offset)[:, None].to(tl.int64) * q_row + dims[None, :]
    return tl.load(at, (lane < n_rows)[:, None] & (dims < HEAD_DIM)[None, :], 0.0), row


@triton.jit(do_not_specialize=LENGTHS)
def _row_mass_kernel(
    q_ptr, k_ptr, partial_ptr, rows_ptr, heads_ptr,
    q_batch: tl.int64, q_head: tl.int64, q_row: tl.int64,
    k_batch: tl.int64, k_head: tl.int64, k_row: tl.int64,
    n_q, n_k, n_rows, group, qk_scale,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of the listed rows over one chunk of keys."""
    h = tl.program_id(0)
    chunk = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    head = tl.load(heads_ptr + h).to(tl.int64)
    q_ptr += b * q_batch + head * q_head
    k_ptr += b * k_batch + head // group * k_head
    lane = tl.arange(0, TILE)
    q, row = _load_queries(q_ptr, q_row, rows_ptr, n_rows, n_k - n_q, HEAD_DIM, DIM, TILE)
    row_max = tl.full([TILE], float("-inf"), tl.float32)
    row_sum = tl.zeros([TILE], tl.float32)
    for j0 in range(chunk * CHUNK * TILE, tl.minimum((chunk + 1) * CHUNK * TILE, n_k), TILE):
        k = load_tile(k_ptr, k_row, j0, n_k, HEAD_DIM, TILE, DIM, True)
        visible = (j0 + lane)[None, :] <= row[:, None]
        logits = tl.where(visible, tl.dot(q, tl.trans(k)) * qk_scale, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(logits, 1))
        anchor = tl.where(new_max == float("-inf"), 0.0, new_max)
        row_sum = row_sum * tl.exp2(row_max - anchor) + tl.sum(tl.exp2(logits - anchor[:, None]), 1)
        row_max = new_max
    at = ((b * tl.num_programs(0) + h) * tl.num_programs(1) + chunk) * TILE
    tl.store(partial_ptr + at + lane, (row_max + tl.log2(row_sum)) * LN_2)


@triton.jit
def _probabilities(
    q, k_ptr, k_row, n_k, t, back, lse, qk_scale,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Probabilities of the ``t``-th key tile from the end, key by row.

    Keys are counted back from the last one, so that a row's offsets ascend with them. Sums are
    along rows, the axis that one thread holds.
    """
    e = t * TILE + tl.arange(0, TILE)
    last = k_ptr + (n_k - 1).to(tl.int64) * k_row
    k = load_tile(last, -k_row, t * TILE, n_k, HEAD_DIM, TILE, DIM, True)
    logits = tl.dot(k, tl.trans(q)) * qk_scale
    visible = (e[:, None] >= back[None, :]) & (e < n_k)[:, None]
    return tl.where(visible, tl.exp2(logits - lse[None, :]), 0.0)


@triton.jit
def _skewed(p, TILE: tl.constexpr):
    """skew[d, r] = p[(d - r) % TILE, r]: every diagonal of a tile in a line."""
    lane = tl.arange(0, TILE)
    return tl.gather(p, (lane[:, None] - lane[None, :]) & (TILE - 1), 0)


@triton.jit(do_not_specialize=LENGTHS)
def _mass_kernel(
    q_ptr, k_ptr, lse_ptr, rows_ptr, columns_ptr, slashes_ptr, heads_ptr,
    q_batch: tl.int64, q_head: tl.int64, q_row: tl.int64,
    k_batch: tl.int64, k_head: tl.int64, k_row: tl.int64,
    n_q, n_k, n_rows, group, skip_offsets, skip_columns, qk_scale, log2_e,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
    LAST: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """Column and diagonal sums of the listed rows' probabilities over one chunk of keys.

    ``LAST``: the rows are the last ones, so a key tile and they share TILE + n_rows - 1
    diagonals. In a skewed tile the entries with d >= r lie on the d-th of them, the others on
    the d-th of the tile after. So TILE offsets are complete with two tiles; a program computes
    the tile before its first one again instead of adding to what another program wrote.

    Else rows share no diagonal of a tile: each entry is added where it belongs, in whole units.
    """
    h = tl.program_id(0)
    first = tl.program_id(1) * CHUNK
    b = tl.program_id(2).to(tl.int64)
    listed = b * tl.num_programs(0) + h
    head = tl.load(heads_ptr + h).to(tl.int64)
    q_ptr += b * q_batch + head * q_head
    k_ptr += b * k_batch + head // group * k_head
    columns_ptr += listed * n_k
    slashes_ptr += listed * n_k
    lane = tl.arange(0, TILE)
    q, row = _load_queries(q_ptr, q_row, rows_ptr, n_rows, n_k - n_q, HEAD_DIM, DIM, TILE)
    # Rows past the list have an infinite log-sum-exp, so that all their probabilities are 0.
    lse = tl.load(lse_ptr + listed * TILE + lane, lane < n_rows, float("inf")) * log2_e
    back = n_k - 1 - row
    far = back + skip_offsets
    if LAST:
        p = _probabilities(
            q, k_ptr, k_row, n_k, first - 1, back, lse, qk_scale, HEAD_DIM, DIM, TILE
        )  # fmt: skip
        j = n_k - 1 - (first - 1) * TILE - lane
        before = _skewed(tl.where((j >= skip_columns)[:, None], p, 0.0), TILE)
    for t in range(first, first + CHUNK):
        p = _probabilities(q, k_ptr, k_row, n_k, t, back, lse, qk_scale, HEAD_DIM, DIM, TILE)
        e = t * TILE + lane
        j = n_k - 1 - e
        sums = tl.sum(tl.where(e[:, None] >= far[None, :], p, 0.0), 1)
        tl.store(columns_ptr + j, sums, j >= 0)
        p = tl.where((j >= skip_columns)[:, None], p, 0.0)
        if LAST:
            skew = _skewed(p, TILE)
            sums = tl.sum(tl.where(lane[:, None] >= lane[None, :], skew, before), 1)
            o = e - (n_rows - 1)
            tl.store(slashes_ptr + o, sums, (o >= 0) & (o < n_k))
            before = skew
        else:
            units = (p * UNITS + 0.5).to(tl.int32)
            at = (slashes_ptr - back)[None, :] + e[:, None]
            tl.atomic_add(at, units, units > 0, sem="relaxed")


@triton.jit(do_not_specialize=("n",))
def _block_mean_kernel(
    x_ptr, mean_ptr, x_batch: tl.int64, x_head: tl.int64, x_row: tl.int64, n,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    h = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    x_ptr += b * x_batch + h.to(tl.int64) * x_head
    x = load_tile(x_ptr, x_row, block * TILE, n, HEAD_DIM, TILE, DIM, True)
    count = tl.minimum(n - block * TILE, TILE)
    mean = tl.sum(x.to(tl.float32), 0) / count
    at = ((b * tl.num_programs(1) + h) * tl.num_programs(0) + block) * HEAD_DIM
    dims = tl.arange(0, DIM)
    tl.store(mean_ptr + at + dims, mean, dims < HEAD_DIM)


def row_scores(
    q: Tensor,
    k: Tensor,
    heads: Tensor,
    rows: Sequence[int],
    *,
    scale: float,
    skip_offsets: int = 0,
    skip_columns: int = 0,
) -> tuple[Tensor, Tensor]:
    """Column and slash mass of some rows' causal softmax (MInference, algorithm 2).

    Shapes: ``q [B, Hq, n_q, D]``, ``k [B, Hkv, n_k, D]``, ``heads [H]`` int32, the query heads
    to score; ``rows``, up to ``TILE`` ascending positions of queries, the last ``n_q`` of
    ``n_k``. Returns ``columns`` and ``slashes``, fp32 ``[B, H, n_k]``: over the rows,
    ``columns[j]`` is the mass on key ``j`` at distances from ``skip_offsets`` on, and
    ``slashes[o]`` the mass at distance ``o`` on keys from ``skip_columns`` on. Slashes of rows
    that are not simply the last ones are sums of multiples of 1 / ``UNITS``. The same bits on
    every call. Nothing waits for the device.

    Raises ``ValueError`` with the value on a shape, dtype, device or layout that does not fit.
    """
    tile.check_tensors(q=q, k=k)
    tile.check_grouped(q, k)
    tile.check_index("heads", heads, (None,), q)
    batch, _, n_q, head_dim = q.shape
    n_k, n_heads, n_rows = k.shape[2], len(heads), len(rows)
    check_rows(rows, n_q, n_k)
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")
    listed = to_device(rows, q.device)
    # One key tile past the last completes the largest offsets.
    chunks = triton.cdiv(triton.cdiv(n_k, TILE) + 1, CHUNK_TILES)
    grid = (n_heads, chunks, batch)
    partial = torch.empty(batch, n_heads, chunks, TILE, dtype=torch.float32, device=q.device)
    group, qk_scale = q.shape[1] // k.shape[1], scale * tile.LOG2_E
    sizes = {"HEAD_DIM": head_dim, "DIM": tile.padded(head_dim), "TILE": TILE}
    _row_mass_kernel[grid](
        q, k, partial, listed, heads, *q.stride()[:3], *k.stride()[:3],
        n_q, n_k, n_rows, group, qk_scale,
        **sizes, CHUNK=CHUNK_TILES, num_warps=4, num_stages=3,
    )  # fmt: skip
    lse = torch.logsumexp(partial, 2)
    last = rows[0] == n_k - n_rows
    shape = (batch, n_heads, n_k)
    columns = torch.empty(shape, dtype=torch.float32, device=q.device)
    if last:
        slashes = torch.empty_like(columns)
    else:
        slashes = torch.zeros(shape, dtype=torch.int32, device=q.device)
    _mass_kernel[grid](
        q, k, lse, listed, columns, slashes, heads, *q.stride()[:3], *k.stride()[:3],
        n_q, n_k, n_rows, group, skip_offsets, skip_columns, qk_scale, tile.LOG2_E,
        **sizes, CHUNK=CHUNK_TILES, LAST=last, UNITS=UNITS,
        num_warps=8 if head_dim > 128 else 4, num_stages=3,
    )  # fmt: skip
    return columns, slashes if last else slashes.float().mul_(1 / UNITS)


def block_means(x: Tensor) -> Tensor:
    """Mean of each ``TILE`` real tokens: ``[B, H, N, D]`` to fp32 ``[B, H, ceil(N/TILE), D]``.

    Raises ``ValueError`` with the value on a shape, dtype, device or layout that does not fit.
    """
    tile.check_tensors(x=x)
    batch, heads, n, head_dim = x.shape
    blocks = triton.cdiv(n, TILE)
    mean = torch.empty(batch, heads, blocks, head_dim, dtype=torch.float32, device=x.device)
    _block_mean_kernel[(blocks, heads, batch)](
        x, mean, *x.stride()[:3], n,
        HEAD_DIM=head_dim, DIM=tile.padded(head_dim), TILE=TILE, num_warps=4,
    )  # fmt: skip
    return mean
