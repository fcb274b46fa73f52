"""Attention over lists of key tiles, one launch for many heads."""

import triton
import triton.language as tl
from torch import Tensor

from minference_green.kernels import tile
from minference_green.kernels.index import TILE, BlockIndex
from minference_green.kernels.tile import attend_tile, load_tile, store_rows

# A kernel is compiled once, not again for lengths that happen to divide by 16.
LENGTHS = ("n_q", "n_k", "n_blocks", "group")


@triton.jit(do_not_specialize=LENGTHS)
def _block_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, heads_ptr, starts_ptr, blocks_ptr,
    q_batch: tl.int64, q_head: tl.int64, q_row: tl.int64,
    k_batch: tl.int64, k_head: tl.int64, k_row: tl.int64,
    v_batch: tl.int64, v_head: tl.int64, v_row: tl.int64,
    out_batch: tl.int64, out_head: tl.int64, out_row: tl.int64,
    n_q, n_k, n_blocks, group, qk_scale,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr, HAS_LSE: tl.constexpr,
):  # fmt: skip
    # The last query tiles have the most work: they start first.
    n_tiles = tl.num_programs(0)
    m = n_tiles - 1 - tl.program_id(0)
    h = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    listed = b * tl.num_programs(1) + h
    head = tl.load(heads_ptr + h).to(tl.int64)
    kv_head = head // group
    q_ptr += b * q_batch + head * q_head
    k_ptr += b * k_batch + kv_head * k_head
    v_ptr += b * v_batch + kv_head * v_head
    out_ptr += b * out_batch + head * out_head
    r0 = n_k - n_q + m * TILE
    n_seen = tl.minimum(n_k, r0 + TILE)
    lane = tl.arange(0, TILE)
    q = load_tile(q_ptr, q_row, m * TILE, n_q, HEAD_DIM, TILE, DIM, True)
    acc = tl.zeros([TILE, DIM], tl.float32)
    row_max = tl.full([TILE], float("-inf"), tl.float32)
    row_sum = tl.zeros([TILE], tl.float32)

    begin = tl.load(starts_ptr + listed * (n_tiles + 1) + m)
    end = tl.load(starts_ptr + listed * (n_tiles + 1) + m + 1)
    blocks_ptr += listed * n_blocks
    # Tiles that reach past the query tile's first row are the last of the ascending list, one
    # or two of them. They go first: every row sees itself there and has a finite maximum then.
    plain_end = end
    reaches = plain_end > begin
    while reaches:
        last = tl.load(blocks_ptr + plain_end - 1)
        reaches = last * TILE + TILE - 1 > r0
        plain_end -= reaches.to(tl.int32)
        reaches = reaches & (plain_end > begin)
    for i in tl.range(plain_end, end, num_stages=1):
        j0 = tl.load(blocks_ptr + i) * TILE
        # A key that no row of the tile sees is not read: it must not meet its zero weight.
        k = load_tile(k_ptr, k_row, j0, n_seen, HEAD_DIM, TILE, DIM, True)
        v = load_tile(v_ptr, v_row, j0, n_seen, HEAD_DIM, TILE, DIM, True)
        seen = (j0 + lane)[None, :] <= (r0 + lane)[:, None]
        acc, row_max, row_sum = attend_tile(acc, row_max, row_sum, q, k, v, qk_scale, seen, True)
    for i in range(begin, plain_end):
        j0 = tl.load(blocks_ptr + i) * TILE
        k = load_tile(k_ptr, k_row, j0, n_seen, HEAD_DIM, TILE, DIM, False)
        v = load_tile(v_ptr, v_row, j0, n_seen, HEAD_DIM, TILE, DIM, False)
        acc, row_max, row_sum = attend_tile(acc, row_max, row_sum, q, k, v, qk_scale, None, False)

    store_rows(
        acc, row_max, row_sum, out_ptr, out_row, lse_ptr + listed * n_q, m * TILE, n_q,
        HEAD_DIM, TILE, DIM, HAS_LSE,
    )  # fmt: skip


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: BlockIndex,
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
    ``out=None`` allocates it, in q's memory layout. A query tile reads a key only if its tile is
    listed and at least one of its rows sees it; a row without any visible key becomes NaN.
    Nothing waits for the device.

    Raises ``ValueError`` with the value on a shape, dtype, device or layout that does not fit.
    """
    out = tile.check_attention(q, k, v, out, index.heads, index.n_k, scale)
    batch, _, n_q, head_dim = q.shape
    if n_q != index.n_q:
        raise ValueError(f"index was built for n_q = {index.n_q}, got q with {n_q} rows")
    n_heads, n_tiles = len(index.heads), triton.cdiv(n_q, TILE)
    tile.check_index("heads", index.heads, (None,), q)
    tile.check_index("starts", index.starts, (batch, n_heads, n_tiles + 1), q)
    tile.check_index("blocks", index.blocks, (batch, n_heads, None), q)
    lse = tile.new_lse(q, index.heads, return_lse)
    _block_kernel[(n_tiles, n_heads, batch)](
        q, k, v, out, lse,
        index.heads, index.starts, index.blocks,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
        n_q, k.shape[2], index.blocks.shape[2], q.shape[1] // k.shape[1], scale * tile.LOG2_E,
        HEAD_DIM=head_dim, DIM=tile.padded(head_dim), TILE=TILE, HAS_LSE=return_lse,
        **tile.launch_options(head_dim, q.device),
    )  # fmt: skip
    return (out, lse) if return_lse else out
