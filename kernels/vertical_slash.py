"""Attention over verticals and slashes (or an A-shape), one launch for many heads.

A query tile visits four kinds of key tiles; ``e`` counts columns leftward from it::

                column 0          e = 127 .. 64   63 .. 0 | r0 .. r0+63
                |  straddling  |  full tiles of the band  |  diagonal
                |  gathered columns, wherever they lie    |

Only the diagonal tile needs the causal mask. A gathered column that a band tile already
covers is masked, so that no key is counted twice.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minference_green.kernels import tile
from minference_green.kernels.index import NONE, TILE, BandIndex
from minference_green.kernels.tile import attend_tile, load_queries, load_tile, store_rows

NO_TILE: tl.constexpr = tl.constexpr(NONE)


@triton.jit
def uncovered(position, r0, bits_ptr, valid):
    """Whether gathered columns lie left of the query tile and under none of its band tiles."""
    e = r0 - 1 - position
    left = valid & (e >= 0)
    word = tl.load(bits_ptr + (e >> 5), left, 0)
    return left & (((word >> (e & 31)) & 1) == 0)


@triton.jit
def _band_kernel(
    q_ptr, k_desc, v_desc, column_k_desc, column_v_desc, out_ptr, lse_ptr,
    heads_ptr, starts_ptr, columns_ptr, bits_ptr, n_full_ptr, n_left_ptr,
    q_batch, q_head, q_row, out_batch, out_head, out_row,
    n_q, n_k, n_starts, n_columns, n_words, group, qk_scale,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr, HAS_LSE: tl.constexpr,
):  # fmt: skip
    # The last query tiles have the most work: they start first.
    m = tl.num_programs(0) - 1 - tl.program_id(0)
    h = tl.program_id(1)
    b = tl.program_id(2)
    n_heads = tl.num_programs(1)
    listed = b * n_heads + h
    head = tl.load(heads_ptr + h)
    kv_head = head // group
    r0 = n_k - n_q + m * TILE
    lane = tl.arange(0, TILE)

    q_at = b.to(tl.int64) * q_batch + head.to(tl.int64) * q_head
    q = load_queries(q_ptr, q_at, q_row, m * TILE, n_q, HEAD_DIM, TILE, DIM)
    acc = tl.zeros([TILE, DIM], tl.float32)
    row_max = tl.full([TILE], float("-inf"), tl.float32)
    row_sum = tl.zeros([TILE], tl.float32)

    # The diagonal first: every row sees itself, so its maximum is finite from here on.
    k = load_tile(k_desc, b, kv_head, r0, TILE, DIM)
    v = load_tile(v_desc, b, kv_head, r0, TILE, DIM)
    causal = lane[None, :] <= lane[:, None]
    acc, row_max, row_sum = attend_tile(acc, row_max, row_sum, q, k, v, qk_scale, causal, True)

    starts_ptr += listed.to(tl.int64) * n_starts
    n_full = tl.load(n_full_ptr + listed.to(tl.int64) * tl.num_programs(0) + m)
    for i in range(n_full):
        row = r0 - TILE - tl.load(starts_ptr + i)
        k = load_tile(k_desc, b, kv_head, row, TILE, DIM)
        v = load_tile(v_desc, b, kv_head, row, TILE, DIM)
        acc, row_max, row_sum = attend_tile(acc, row_max, row_sum, q, k, v, qk_scale, None, False)

    # Tiles are disjoint, so at most one straddles column 0.
    start = tl.load(starts_ptr + n_full, n_full < n_starts, NO_TILE)
    if start < r0:
        row = r0 - TILE - start
        k = load_tile(k_desc, b, kv_head, row, TILE, DIM)
        v = load_tile(v_desc, b, kv_head, row, TILE, DIM)
        real = (row + lane >= 0)[None, :]
        acc, row_max, row_sum = attend_tile(acc, row_max, row_sum, q, k, v, qk_scale, real, True)

    columns_ptr += listed.to(tl.int64) * n_columns
    bits_ptr += listed.to(tl.int64) * n_words
    n_left = tl.load(n_left_ptr + listed.to(tl.int64) * tl.num_programs(0) + m)
    for i in range(0, n_left // TILE * TILE, TILE):
        k = load_tile(column_k_desc, b, h, i, TILE, DIM)
        v = load_tile(column_v_desc, b, h, i, TILE, DIM)
        position = tl.load(columns_ptr + i + lane)
        seen = uncovered(position, r0, bits_ptr, lane >= 0)[None, :]
        acc, row_max, row_sum = attend_tile(acc, row_max, row_sum, q, k, v, qk_scale, seen, True)
    if n_left % TILE != 0:
        i = n_left // TILE * TILE
        left = i + lane < n_left
        k = load_tile(column_k_desc, b, h, i, TILE, DIM)
        # Columns from r0 on are not for this tile: whatever they hold must not meet a zero weight.
        v = tl.where(left[:, None], load_tile(column_v_desc, b, h, i, TILE, DIM), 0.0)
        position = tl.load(columns_ptr + i + lane, left, 0)
        seen = uncovered(position, r0, bits_ptr, left)[None, :]
        acc, row_max, row_sum = attend_tile(acc, row_max, row_sum, q, k, v, qk_scale, seen, True)

    out_at = b.to(tl.int64) * out_batch + head.to(tl.int64) * out_head
    store_rows(
        acc, row_max, row_sum, out_ptr, out_at, out_row, lse_ptr, listed.to(tl.int64) * n_q,
        m * TILE, n_q, HEAD_DIM, TILE, DIM, HAS_LSE,
    )  # fmt: skip


@triton.jit
def _mark_kernel(starts_ptr, bits_ptr, n_starts, n_words, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """Set bit ``e`` for every ``e`` under a band tile; a tile touches three words at most."""
    listed = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    start = tl.load(starts_ptr + listed * n_starts + i, i < n_starts, NO_TILE)
    first = start >> 5
    shift = start & 31
    ones = tl.full([BLOCK], -1, tl.int32)
    bits_ptr += listed * n_words
    for word in tl.static_range(TILE // 32 + 1):
        mask = ones
        if word == 0:
            mask = ones << shift
        if word == TILE // 32:
            mask = (1 << shift) - 1
        at = first + word
        tl.atomic_or(bits_ptr + at, mask, (start != NO_TILE) & (at < n_words))


def _band_bits(tile_starts: Tensor, n_k: int) -> Tensor:
    """Bits ``[B, H, ceil(n_k / 32)]`` int32: whether a distance ``e`` lies under a band tile."""
    batch, heads, n_starts = tile_starts.shape
    n_words = triton.cdiv(n_k, 32)
    bits = torch.zeros(batch, heads, n_words, dtype=torch.int32, device=tile_starts.device)
    if n_starts:
        block = 128
        _mark_kernel[(triton.cdiv(n_starts, block), batch * heads)](
            tile_starts, bits, n_starts, n_words, TILE=TILE, BLOCK=block, num_warps=4
        )
    return bits


def _gather(x: Tensor, kv_heads: Tensor, columns: Tensor) -> Tensor:
    """Rows ``columns`` of each head's KV head, ``[B, H, V, D]``; padding repeats the last row."""
    batch = torch.arange(x.shape[0], device=x.device)[:, None, None]
    return x[batch, kv_heads[None, :, None], columns.clamp(max=x.shape[2] - 1).long()]


def band_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: BandIndex,
    *,
    scale: float,
    out: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention over the pairs that ``index.mask`` shows, for the heads it lists.

    Shapes: ``q [B, Hq, n_q, D]``, ``k, v [B, Hkv, n_k, D]`` with ``Hq`` a multiple of ``Hkv``
    and D one of 64, 96, 128, 256; bfloat16 or float16; queries are the last ``n_q`` positions.
    Returns ``out [B, Hq, n_q, D]``, of which only the listed heads' rows are written, and with
    ``return_lse`` also the natural log-sum-exp, fp32 ``[B, len(index.heads), n_q]``.
    ``out=None`` allocates it, in q's memory layout. A query tile reads a key only if at least
    one of its rows sees it. Nothing waits for the device.

    Raises ``ValueError`` with the value on a shape, dtype, device or layout that does not fit.
    """
    out = tile.check_attention(q, k, v, out, index.heads, index.n_k, scale)
    batch, _, n_q, head_dim = q.shape
    n_k, n_heads = k.shape[2], len(index.heads)
    tile.check_index("heads", index.heads, (None,), q)
    tile.check_index("tile_starts", index.tile_starts, (batch, n_heads, None), q)
    tile.check_index("columns", index.columns, (batch, n_heads, None), q)
    lse = tile.new_lse(q, index.heads, return_lse)

    columns = index.columns
    if columns.shape[2] == 0:
        columns = columns.new_full((batch, n_heads, 1), NONE)
    group = q.shape[1] // k.shape[1]
    kv_heads = (index.heads // group).long()
    n_tiles = triton.cdiv(n_q, TILE)
    r0 = torch.arange(n_k - n_q, n_k, TILE, dtype=torch.int32, device=q.device)
    r0 = r0.expand(batch, n_heads, n_tiles).contiguous()
    n_full = torch.searchsorted(index.tile_starts, r0 - TILE, right=True, out_int32=True)
    n_left = torch.searchsorted(columns, r0, out_int32=True)
    bits = _band_bits(index.tile_starts, n_k)
    _band_kernel[(n_tiles, n_heads, batch)](
        q, tile.describe(k), tile.describe(v),
        tile.describe(_gather(k, kv_heads, columns)), tile.describe(_gather(v, kv_heads, columns)),
        out, lse, index.heads, index.tile_starts, columns, bits, n_full, n_left,
        *q.stride()[:3], *out.stride()[:3],
        n_q, n_k, index.tile_starts.shape[2], columns.shape[2], bits.shape[2],
        group, scale * tile.LOG2_E,
        HEAD_DIM=head_dim, DIM=tile.padded(head_dim), TILE=TILE, HAS_LSE=return_lse,
        **tile.launch_options(head_dim),
    )  # fmt: skip
    return (out, lse) if return_lse else out
