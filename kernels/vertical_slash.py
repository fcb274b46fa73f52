"""Attention over verticals and slashes (or an A-shape), one launch for many heads.

A query tile visits three kinds of key tiles; ``e`` counts columns leftward from it::

                column 0            e = 79 .. 64   15 .. 0 | r0 .. r0+63
                | edge |   pieces of the band, in fours    | edge
                |  gathered columns, wherever they lie     |

Four pieces, wherever they lie, fill a tile. Edge tiles are masked: the diagonal one by causality,
the other, if there is one, to the pieces that are left and by column 0. A gathered column that a
piece already covers is masked, so that no key counts twice.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minference_green.kernels import tile
from minference_green.kernels.index import NONE, PIECE, TILE, BandIndex
from minference_green.kernels.tile import attend_tile, load_rows, load_tile, store_rows

NO_PIECE: tl.constexpr = tl.constexpr(NONE)
# A kernel is compiled once, not again for lengths that happen to divide by 16.
LENGTHS = ("n_q", "n_k", "n_pieces", "n_columns", "n_words", "group")


@triton.jit
def uncovered(columns_ptr, n_left, r0, bits_ptr, TILE: tl.constexpr):
    """Which of ``TILE`` gathered columns, the first ``n_left`` left of r0, no piece covers."""
    lane = tl.arange(0, TILE)
    left = lane < n_left
    e = r0 - 1 - tl.load(columns_ptr + lane, left, 0)
    word = tl.load(bits_ptr + (e >> 5), left, 0)
    return left & (((word >> (e & 31)) & 1) == 0)


@triton.jit(do_not_specialize=LENGTHS)
def _band_kernel(
    q_ptr, k_ptr, v_ptr, column_k_ptr, column_v_ptr, out_ptr, lse_ptr,
    heads_ptr, pieces_ptr, columns_ptr, bits_ptr, n_seen_ptr, n_whole_ptr, n_left_ptr,
    q_batch: tl.int64, q_head: tl.int64, q_row: tl.int64,
    k_batch: tl.int64, k_head: tl.int64, k_row: tl.int64,
    v_batch: tl.int64, v_head: tl.int64, v_row: tl.int64,
    out_batch: tl.int64, out_head: tl.int64, out_row: tl.int64,
    n_q, n_k, n_pieces, n_columns, n_words, group, qk_scale,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr, PIECE: tl.constexpr,
    HAS_LSE: tl.constexpr,
):  # fmt: skip
    # The last query tiles have the most work: they start first.
    m = tl.num_programs(0) - 1 - tl.program_id(0)
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
    lane = tl.arange(0, TILE)
    q = load_tile(q_ptr, q_row, m * TILE, n_q, HEAD_DIM, TILE, DIM, True)
    acc = tl.zeros([TILE, DIM], tl.float32)
    row_max = tl.full([TILE], float("-inf"), tl.float32)
    row_sum = tl.zeros([TILE], tl.float32)

    # Edge tiles, the diagonal first: every row sees itself, so its maximum is finite from there.
    # Pieces are disjoint, so at most one reaches past column 0, and the other edge is one tile.
    pieces_ptr += listed * n_pieces
    at = listed * tl.num_programs(0) + m
    n_seen = tl.load(n_seen_ptr + at)
    n_full = tl.load(n_whole_ptr + at) * PIECE // TILE
    edge = n_full * (TILE // PIECE) + lane // PIECE
    edge = r0 - PIECE - tl.load(pieces_ptr + edge, edge < n_seen, NO_PIECE) + lane % PIECE
    j = r0 + lane
    for _ in tl.range(0, 1 + (n_full * (TILE // PIECE) < n_seen).to(tl.int32), num_stages=1):
        k = load_rows(k_ptr, k_row, j, n_k, HEAD_DIM, DIM, True)
        v = load_rows(v_ptr, v_row, j, n_k, HEAD_DIM, DIM, True)
        seen = (j[None, :] <= (r0 + lane)[:, None]) & (j >= 0)[None, :]
        acc, row_max, row_sum = attend_tile(acc, row_max, row_sum, q, k, v, qk_scale, seen, True)
        j = edge

    before = r0 - PIECE + lane % PIECE
    own_ptr = pieces_ptr + lane // PIECE
    for i in range(n_full):
        j = before - tl.load(own_ptr + i * (TILE // PIECE))
        k = load_rows(k_ptr, k_row, j, n_k, HEAD_DIM, DIM, False)
        v = load_rows(v_ptr, v_row, j, n_k, HEAD_DIM, DIM, False)
        acc, row_max, row_sum = attend_tile(acc, row_max, row_sum, q, k, v, qk_scale, None, False)

    columns_ptr += listed * n_columns
    column_k_ptr += listed * n_columns * HEAD_DIM
    column_v_ptr += listed * n_columns * HEAD_DIM
    bits_ptr += listed * n_words
    n_left = tl.load(n_left_ptr + listed * tl.num_programs(0) + m)
    for i in range(0, n_left, TILE):
        k = load_tile(column_k_ptr, HEAD_DIM, i, n_left, HEAD_DIM, TILE, DIM, True)
        v = load_tile(column_v_ptr, HEAD_DIM, i, n_left, HEAD_DIM, TILE, DIM, True)
        seen = uncovered(columns_ptr + i, n_left - i, r0, bits_ptr, TILE)[None, :]
        acc, row_max, row_sum = attend_tile(acc, row_max, row_sum, q, k, v, qk_scale, seen, True)

    store_rows(
        acc, row_max, row_sum, out_ptr, out_row, lse_ptr + listed * n_q, m * TILE, n_q,
        HEAD_DIM, TILE, DIM, HAS_LSE,
    )  # fmt: skip


@triton.jit(do_not_specialize=("n_pieces", "n_words"))
def _mark_kernel(pieces_ptr, bits_ptr, n_pieces, n_words, PIECE: tl.constexpr, BLOCK: tl.constexpr):
    """Set bit ``e`` for every ``e`` under a piece, which touches two words at most."""
    listed = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    piece = tl.load(pieces_ptr + listed * n_pieces + i, i < n_pieces, NO_PIECE)
    both = tl.full([BLOCK], (1 << PIECE) - 1, tl.int64) << (piece & 31)
    bits_ptr += listed * n_words
    for word in tl.static_range(2):
        at = (piece >> 5) + word
        mask = (both >> (32 * word)).to(tl.int32)
        tl.atomic_or(bits_ptr + at, mask, (piece != NO_PIECE) & (mask != 0) & (at < n_words))


def _band_bits(pieces: Tensor, n_k: int) -> Tensor:
    """Bits ``[B, H, W]`` int32: whether a distance ``e`` lies under a piece.

    The second tile of a pair may lie wholly past the last query; it is computed, not stored, and
    asks for distances up to ``n_k + TILE - 2``.
    """
    batch, heads, n_pieces = pieces.shape
    n_words = triton.cdiv(n_k + TILE, 32)
    bits = torch.zeros(batch, heads, n_words, dtype=torch.int32, device=pieces.device)
    if n_pieces:
        block = 128
        _mark_kernel[(triton.cdiv(n_pieces, block), batch * heads)](
            pieces, bits, n_pieces, n_words, PIECE=PIECE, BLOCK=block, num_warps=4
        )
    return bits


@triton.jit(do_not_specialize=("n_k", "n_columns", "n_rows", "group"))
def _gather_kernel(
    k_ptr, v_ptr, column_k_ptr, column_v_ptr, heads_ptr, columns_ptr,
    k_batch: tl.int64, k_head: tl.int64, k_row: tl.int64,
    v_batch: tl.int64, v_head: tl.int64, v_row: tl.int64,
    n_k, n_columns, n_rows, group,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Copy the rows of chosen columns; padding becomes zeros.

    A query tile reads its last column tile whole, and a weight of 0 does not silence a value
    that is not finite. Such a value turns its key into NaN instead and itself into 0: rows that
    see the column become NaN, rows that do not are masked.
    """
    h = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    listed = b * tl.num_programs(1) + h
    kv_head = tl.load(heads_ptr + h).to(tl.int64) // group
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    dims = tl.arange(0, DIM)
    row = tl.load(columns_ptr + listed * n_columns + i, i < n_columns, n_k).to(tl.int64)
    real = (row < n_k)[:, None] & (dims < HEAD_DIM)[None, :]
    k_at = k_ptr + b * k_batch + kv_head * k_head + row[:, None] * k_row + dims[None, :]
    v_at = v_ptr + b * v_batch + kv_head * v_head + row[:, None] * v_row + dims[None, :]
    k = tl.load(k_at, real, 0.0)
    v = tl.load(v_at, real, 0.0)
    # Infinity minus itself is NaN, and NaN equals nothing.
    finite = tl.min((v - v == 0.0).to(tl.int32), 1) != 0
    k = tl.where(finite[:, None], k, float("nan"))
    v = tl.where(finite[:, None], v, 0.0)
    at = (listed * n_rows + i)[:, None] * HEAD_DIM + dims[None, :]
    kept = (i < n_rows)[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(column_k_ptr + at, k.to(column_k_ptr.dtype.element_ty), kept)
    tl.store(column_v_ptr + at, v.to(column_v_ptr.dtype.element_ty), kept)


def _gather(
    k: Tensor, v: Tensor, heads: Tensor, columns: Tensor, group: int
) -> tuple[Tensor, Tensor]:
    """Keys and values of each listed head's columns, ``[B, H, max(V, 1), D]``, contiguous."""
    batch, n_heads, n_columns = columns.shape
    n_rows, head_dim = max(n_columns, 1), k.shape[3]
    column_k = k.new_empty(batch, n_heads, n_rows, head_dim)
    column_v = torch.empty_like(column_k)
    _gather_kernel[(triton.cdiv(n_rows, TILE), n_heads, batch)](
        k, v, column_k, column_v, heads, columns, *k.stride()[:3], *v.stride()[:3],
        k.shape[2], n_columns, n_rows, group,
        HEAD_DIM=head_dim, DIM=tile.padded(head_dim), TILE=TILE, num_warps=4,
    )  # fmt: skip
    return column_k, column_v


def _pairs_refusal(**tensors: Tensor) -> str | None:
    """What keeps the kernel of ``band_pair.py`` from these tensors, with the value."""
    for name, x in tensors.items():
        capability = torch.cuda.get_device_capability(x.device) if x.is_cuda else None
        if capability != (9, 0):
            return (
                f"needs a Hopper GPU (capability 9.0), {name} is on {x.device} "
                f"of capability {capability}"
            )
        if x.shape[3] > 128:
            return f"needs head_dim up to 128, got {x.shape[3]}"
        steps = [x.stride(d) * x.element_size() for d in range(3) if x.shape[d] > 1]
        if x.data_ptr() % 16 or any(step % 16 for step in steps):
            return (
                f"needs rows of {name} that start at multiples of 16 bytes, "
                f"got strides {x.stride()}"
            )
    return None


def band_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: BandIndex,
    *,
    scale: float,
    out: Tensor | None = None,
    return_lse: bool = False,
    pairs: bool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention over the pairs that ``index.mask`` shows, for the heads it lists.

    Shapes: ``q [B, Hq, n_q, D]``, ``k, v [B, Hkv, n_k, D]`` with ``Hq`` a multiple of ``Hkv``
    and D one of 64, 96, 128, 256; bfloat16 or float16; queries are the last ``n_q`` positions.
    Returns ``out [B, Hq, n_q, D]``, of which only the listed heads' rows are written, and with
    ``return_lse`` also the natural log-sum-exp, fp32 ``[B, len(index.heads), n_q]``.
    ``out=None`` allocates it, in q's memory layout. A query tile reads a key only if at least
    one of its rows sees it. Nothing waits for the device.

    ``pairs`` is the kernel of ``band_pair.py``, in which two query tiles share key tiles: by
    default wherever it fits (Hopper, head_dim up to 128, rows at multiples of 16 bytes),
    ``False`` never, ``True`` or an error. The pairs attended to are the same, as long as no run
    of pieces is shorter than a tile, which :class:`BandIndex` demands and nothing here checks.

    Raises ``ValueError`` with the value on a shape, dtype, device or layout that does not fit.
    """
    out = tile.check_attention(q, k, v, out, index.heads, index.n_k, scale)
    batch, _, n_q, head_dim = q.shape
    n_k, n_heads = k.shape[2], len(index.heads)
    tile.check_index("heads", index.heads, (None,), q)
    tile.check_index("pieces", index.pieces, (batch, n_heads, None), q)
    tile.check_index("columns", index.columns, (batch, n_heads, None), q)
    lse = tile.new_lse(q, index.heads, return_lse)

    heads, pieces, columns = index.heads, index.pieces, index.columns
    group = q.shape[1] // k.shape[1]
    column_k, column_v = _gather(k, v, heads, columns, group)
    bits = _band_bits(pieces, n_k)
    why_not = None if pairs is False else _pairs_refusal(q=q, k=k, v=v)
    if pairs and why_not:
        raise ValueError(f"pairs {why_not}; leave pairs out")
    if pairs is not False and not why_not:
        # Imported here: Gluon is for Hopper only.
        from minference_green.kernels import band_pair

        band_pair.attend_pairs(
            q, k, v, column_k, column_v, out, lse, heads, pieces, columns, bits,
            scale=scale, has_lse=return_lse,
        )  # fmt: skip
        return (out, lse) if return_lse else out
    n_tiles = triton.cdiv(n_q, TILE)
    n_seen = tile.count_below(pieces, n_k - n_q, TILE, n_tiles)
    # A piece is whole if it ends before column 0: piece + PIECE <= r0.
    n_whole = tile.count_below(pieces, n_k - n_q - PIECE + 1, TILE, n_tiles)
    n_left = tile.count_below(columns, n_k - n_q, TILE, n_tiles)
    _band_kernel[(n_tiles, n_heads, batch)](
        q, k, v, column_k, column_v, out, lse,
        heads, pieces, columns, bits, n_seen, n_whole, n_left,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
        n_q, n_k, pieces.shape[2], columns.shape[2], bits.shape[2], group,
        scale * tile.LOG2_E,
        HEAD_DIM=head_dim, DIM=tile.padded(head_dim), TILE=TILE, PIECE=PIECE, HAS_LSE=return_lse,
        **tile.launch_options(head_dim, q.device),
    )  # fmt: skip
    return (out, lse) if return_lse else out
