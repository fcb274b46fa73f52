"""Scores that an index is chosen from: masses of the last rows, means of blocks.

The probabilities of the last rows, rows x keys per head, are never in memory: a first pass
keeps their log-sum-exp, a second computes them again and adds them up by column and by
diagonal.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minference_green.kernels import tile
from minference_green.kernels.index import TILE
from minference_green.kernels.tile import LN_2, load_tile

CHUNK_TILES = 16
"""Key tiles of one program: enough to hide its start, few enough to fill a GPU at 8K tokens."""

# A kernel is compiled once, not again for lengths that happen to divide by 16.
LENGTHS = ("n_q", "n_k", "n_rows", "group")


@triton.jit(do_not_specialize=LENGTHS)
def _row_mass_kernel(
    q_ptr, k_ptr, partial_ptr, heads_ptr,
    q_batch: tl.int64, q_head: tl.int64, q_row: tl.int64,
    k_batch: tl.int64, k_head: tl.int64, k_row: tl.int64,
    n_q, n_k, n_rows, group, qk_scale,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of the last rows over one chunk of keys."""
    h = tl.program_id(0)
    chunk = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    head = tl.load(heads_ptr + h).to(tl.int64)
    q_ptr += b * q_batch + head * q_head
    k_ptr += b * k_batch + head // group * k_head
    lane = tl.arange(0, TILE)
    q = load_tile(q_ptr, q_row, n_q - n_rows, n_q, HEAD_DIM, TILE, DIM, True)
    row = n_k - n_rows + lane
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
def _skewed(
    q, k_ptr, k_row, n_k, t, row, lse, qk_scale,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Probabilities of key tile ``t``, key by row: p[c, r], and skew[d, r] = p[(r - d) % TILE, r].

    Both are summed along rows, the axis that one thread holds.
    """
    lane = tl.arange(0, TILE)
    j = t * TILE + lane
    k = load_tile(k_ptr, k_row, t * TILE, n_k, HEAD_DIM, TILE, DIM, True)
    logits = tl.dot(k, tl.trans(q)) * qk_scale
    visible = (j[:, None] <= row[None, :]) & (j >= 0)[:, None]
    p = tl.where(visible, tl.exp2(logits - lse[None, :]), 0.0)
    return p, tl.gather(p, (lane[None, :] - lane[:, None]) & (TILE - 1), 0)


@triton.jit(do_not_specialize=LENGTHS)
def _mass_kernel(
    q_ptr, k_ptr, lse_ptr, columns_ptr, slashes_ptr, heads_ptr,
    q_batch: tl.int64, q_head: tl.int64, q_row: tl.int64,
    k_batch: tl.int64, k_head: tl.int64, k_row: tl.int64,
    n_q, n_k, n_rows, group, qk_scale, log2_e,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Column and diagonal sums of the last rows' probabilities over one chunk of keys.

    In a skewed tile the entries with r >= d lie on diagonal r - c = d of that tile, the others
    on the same diagonal of the tile before. So TILE offsets are complete with two
    tiles; a program computes the tile before its first one again instead of adding to
    what another program wrote.
    """
    h = tl.program_id(0)
    first = tl.program_id(1) * CHUNK
    b = tl.program_id(2).to(tl.int64)
    listed = b * tl.num_programs(0) + h
    head = tl.load(heads_ptr + h).to(tl.int64)
    q_ptr += b * q_batch + head * q_head
    k_ptr += b * k_batch + head // group * k_head
    lane = tl.arange(0, TILE)
    q = load_tile(q_ptr, q_row, n_q - n_rows, n_q, HEAD_DIM, TILE, DIM, True)
    # Rows past the last have an infinite log-sum-exp, so that all their probabilities are 0.
    lse = tl.load(lse_ptr + listed * TILE + lane, lane < n_rows, float("inf")) * log2_e
    row = n_k - n_rows + lane
    same_tile = lane[None, :] >= lane[:, None]
    _, before = _skewed(q, k_ptr, k_row, n_k, first - 1, row, lse, qk_scale, HEAD_DIM, DIM, TILE)
    for t in range(first, first + CHUNK):
        p, skew = _skewed(q, k_ptr, k_row, n_k, t, row, lse, qk_scale, HEAD_DIM, DIM, TILE)
        j = t * TILE + lane
        tl.store(columns_ptr + listed * n_k + j, tl.sum(p, 1), j < n_k)
        offset = n_k - n_rows - t * TILE + lane
        sums = tl.sum(tl.where(same_tile, skew, before), 1)
        tl.store(slashes_ptr + listed * n_k + offset, sums, (offset >= 0) & (offset < n_k))
        before = skew


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


def last_rows_scores(
    q: Tensor, k: Tensor, heads: Tensor, *, scale: float, rows: int = TILE
) -> tuple[Tensor, Tensor]:
    """Column and slash mass of the last rows' causal softmax (MInference, algorithm 2).

    Shapes: ``q [B, Hq, n_q, D]``, ``k [B, Hkv, n_k, D]``, ``heads [H]`` int32, the query heads
    to score; returns ``columns`` and ``slashes``, fp32 ``[B, H, n_k]``: over the last
    ``min(rows, n_q)`` rows, ``columns[j]`` is the mass on key ``j`` and ``slashes[o]`` the mass
    at distance ``o``. The same bits on every call. Nothing waits for the device.

    Raises ``ValueError`` with the value on a shape, dtype, device or layout that does not fit.
    """
    tile.check_tensors(q=q, k=k)
    tile.check_grouped(q, k)
    tile.check_index("heads", heads, (None,), q)
    if not 1 <= rows <= TILE:
        raise ValueError(f"rows must be between 1 and {TILE}, got {rows}")
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")
    batch, _, n_q, head_dim = q.shape
    n_k, n_heads, n_rows = k.shape[2], len(heads), min(rows, q.shape[2])
    # One key tile past the last completes the smallest offsets.
    chunks = triton.cdiv(triton.cdiv(n_k, TILE) + 1, CHUNK_TILES)
    grid = (n_heads, chunks, batch)
    partial = torch.empty(batch, n_heads, chunks, TILE, dtype=torch.float32, device=q.device)
    columns = torch.empty(batch, n_heads, n_k, dtype=torch.float32, device=q.device)
    slashes = torch.empty_like(columns)
    group, qk_scale = q.shape[1] // k.shape[1], scale * tile.LOG2_E
    sizes = {"HEAD_DIM": head_dim, "DIM": tile.padded(head_dim), "TILE": TILE}
    _row_mass_kernel[grid](
        q, k, partial, heads, *q.stride()[:3], *k.stride()[:3], n_q, n_k, n_rows, group, qk_scale,
        **sizes, CHUNK=CHUNK_TILES, num_warps=4, num_stages=3,
    )  # fmt: skip
    lse = torch.logsumexp(partial, 2)
    _mass_kernel[grid](
        q, k, lse, columns, slashes, heads, *q.stride()[:3], *k.stride()[:3],
        n_q, n_k, n_rows, group, qk_scale, tile.LOG2_E,
        **sizes, CHUNK=CHUNK_TILES, num_warps=8 if head_dim > 128 else 4, num_stages=3,
    )  # fmt: skip
    return columns, slashes


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
