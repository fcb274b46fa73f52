"""What some rows of each query tile attend to, key tile by key tile.

One kernel writes each probing row's largest logit, or its log-sum-exp, in every key tile it
sees; a second turns them into shares and puts the rows of a query tile together.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minference_green.kernels import tile
from minference_green.kernels.index import TILE
from minference_green.kernels.selection import check_probes
from minference_green.kernels.tile import LN_2, load_tile

CHUNK_TILES = 64
"""Key tiles of one program: its queries are loaded once for them."""

_HELD = 2048
"""Numbers that a program of the second kernel holds at once."""

# A kernel is compiled once, not again for lengths that happen to divide by 16.
MASS_LENGTHS = ("masses_tile", "n_q", "n_k", "n_rows", "n_tiles", "first_row", "group")
SHARE_LENGTHS = ("masses_tile", "n_k", "n_tiles", "first_row")


@triton.jit
def probing_row(number, first_row, n_k, ROWS: tl.constexpr, TILE: tl.constexpr):
    """Position of a probing row by its number; those past the end are the last query."""
    lane = number % ROWS * (TILE - 1) // (ROWS - 1) if ROWS > 1 else TILE - 1
    return tl.minimum(first_row + number // ROWS * TILE + lane, n_k - 1)


@triton.jit
def tile_mass(q, k, qk_scale, visible, MASKED: tl.constexpr, SUMMED: tl.constexpr):
    """Each row's largest logit in one key tile, or log-sum-exp, in base 2; -inf if it sees none.

    The largest needs no exponentials, which take longer than the product.
    """
    logits = tl.dot(q, tl.trans(k))
    if MASKED:
        logits = tl.where(visible, logits, float("-inf"))
    most = tl.max(logits, 1) * qk_scale
    if not SUMMED:
        return most
    if MASKED:
        most = tl.where(most == float("-inf"), 0.0, most)
    return most + tl.log2(tl.sum(tl.exp2(logits * qk_scale - most[:, None]), 1))


@triton.jit(do_not_specialize=MASS_LENGTHS)
def _tile_mass_kernel(
    q_ptr, k_ptr, masses_ptr, heads_ptr,
    q_batch: tl.int64, q_head: tl.int64, q_row: tl.int64,
    k_batch: tl.int64, k_head: tl.int64, k_row: tl.int64,
    masses_tile: tl.int64, n_q, n_k, n_rows, n_tiles, first_row, group, qk_scale,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
    QUERIES: tl.constexpr, CHUNK: tl.constexpr, SUMMED: tl.constexpr,
):  # fmt: skip
    """Masses of QUERIES probing rows over each key tile of one chunk that one of them sees.

    ``masses [B, H, n_tiles, n_rows]``: neighbouring rows are neighbours in memory.
    """
    h = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    head = tl.load(heads_ptr + h).to(tl.int64)
    q_ptr += b * q_batch + head * q_head
    k_ptr += b * k_batch + head // group * k_head
    masses_ptr += (b * tl.num_programs(1) + h) * n_tiles * masses_tile
    # Programs that run together share a chunk of keys: they read it from the L2 cache.
    n_groups = tl.cdiv(n_rows, QUERIES)
    first = tl.program_id(0) // n_groups * CHUNK
    # Rows past the last are the last once more: they write what it writes.
    number = tl.program_id(0) % n_groups * QUERIES + tl.arange(0, QUERIES)
    number = tl.minimum(number, n_rows - 1)
    row = probing_row(number, first_row, n_k, ROWS, TILE)
    end = tl.minimum(first + CHUNK, tl.max(row, 0) // TILE + 1)
    if first >= end:
        return
    lane = tl.arange(0, TILE)
    dims = tl.arange(0, DIM)
    at = q_ptr + (row - (n_k - n_q))[:, None].to(tl.int64) * q_row + dims[None, :]
    q = tl.load(at, (dims < HEAD_DIM)[None, :], 0.0)
    # Key tiles that every row sees whole.
    plain_end = tl.maximum(first, tl.minimum(end, (tl.min(row, 0) + 1) // TILE))
    for t in range(first, plain_end):
        k = load_tile(k_ptr, k_row, t * TILE, n_k, HEAD_DIM, TILE, DIM, False)
        mass = tile_mass(q, k, qk_scale, None, False, SUMMED)
        tl.store(masses_ptr + t * masses_tile + number, mass)
    for t in tl.range(plain_end, end, num_stages=1):
        k = load_tile(k_ptr, k_row, t * TILE, n_k, HEAD_DIM, TILE, DIM, True)
        visible = (t * TILE + lane)[None, :] <= row[:, None]
        mass = tile_mass(q, k, qk_scale, visible, True, SUMMED)
        tl.store(masses_ptr + t * masses_tile + number, mass)


@triton.jit(do_not_specialize=SHARE_LENGTHS)
def _share_kernel(
    masses_ptr, shares_ptr, masses_tile: tl.int64, n_k, n_tiles, first_row,
    ROWS: tl.constexpr, PADDED: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
    SUMMED: tl.constexpr,
):  # fmt: skip
    """Shares of one query tile's probing rows, put together for each key tile."""
    m = tl.program_id(0)
    listed = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    part = tl.arange(0, PADDED)
    number = m * ROWS + part
    row = probing_row(number, first_row, n_k, ROWS, TILE)
    # A short last tile repeats its last row, which counts once.
    repeats = probing_row(tl.maximum(number - 1, 0), first_row, n_k, ROWS, TILE) == n_k - 1
    counts = (part < ROWS) & ((part == 0) | ~repeats)
    masses_ptr += listed * n_tiles * masses_tile + number
    # A tile that its row does not see may never have been written.
    row = tl.where(counts, row, -1)
    reach = tl.max(row, 0) // TILE + 1
    most = tl.full([PADDED], float("-inf"), tl.float32)
    total = tl.zeros([PADDED], tl.float32)
    for first in range(0, reach, CHUNK):
        t = (first + tl.arange(0, CHUNK))[:, None]
        seen = t * TILE <= row[None, :]
        mass = tl.load(masses_ptr[None, :] + t * masses_tile, seen, float("-inf"))
        higher = tl.maximum(most, tl.max(mass, 0))
        anchor = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp2(most - anchor) + tl.sum(tl.exp2(mass - anchor[None, :]), 0)
        most = higher
    whole = tl.where(counts, most + tl.log2(total), 0.0)
    shares_ptr += (listed * tl.num_programs(0) + m) * n_tiles
    for first in range(0, n_tiles, CHUNK):
        i = first + tl.arange(0, CHUNK)
        seen = i[:, None] * TILE <= row[None, :]
        at = masses_ptr[None, :] + i[:, None] * masses_tile
        share = tl.load(at, seen, float("-inf")) - whole[None, :]
        if SUMMED:
            tl.store(shares_ptr + i, tl.sum(tl.exp2(share), 1), i < n_tiles)
        else:
            tl.store(shares_ptr + i, tl.max(share, 1) * LN_2, i < n_tiles)


def options(head_dim: int) -> dict[str, int]:
    """Probing rows of a program of the first kernel, which read the same keys; warps, stages."""
    # Small keys are soon multiplied: 128 rows would take them from L2 faster than it gives.
    if head_dim <= 64:
        return {"QUERIES": 256, "num_warps": 8, "num_stages": 3}
    return {"QUERIES": 128, "num_warps": 8, "num_stages": 2}


def tile_shares(
    q: Tensor,
    k: Tensor,
    heads: Tensor,
    rows: int,
    begin: int,
    end: int,
    *,
    scale: float,
    summed: bool = False,
) -> Tensor:
    """What the probing rows of some query tiles attend to: one number per query and key tile.

    Probing rows are :func:`minference_green.kernels.selection.probing_rows`. The number is the
    natural logarithm of the largest share that one of them gives the key tile, -inf where none
    sees it: a row shares itself out by the softmax of its largest logit in each key tile. Or,
    ``summed``, the attention that all of them put on it, a row that is repeated counted once:
    with ``rows = TILE`` the mass of the whole query tile.

    Shapes: ``q [B, Hq, n_q, D]``, ``k [B, Hkv, n_k, D]``, ``heads [H]`` int32, the query heads
    to read; queries are the last ``n_q`` positions. Returns fp32 ``[B, H, end - begin, T]`` for
    the query tiles from ``begin`` to before ``end`` and all ``T`` key tiles that the last of
    them reaches. Holds ``rows`` times as much beside it. The same bits on every call. Nothing
    waits for the device.

    Raises ``ValueError`` with the value on a shape, dtype, device or layout that does not fit,
    ``rows`` outside 1 to ``TILE``, or query tiles that are not there.
    """
    tile.check_tensors(q=q, k=k)
    tile.check_grouped(q, k)
    tile.check_index("heads", heads, (None,), q)
    batch, _, n_q, head_dim = q.shape
    n_k, n_heads = k.shape[2], len(heads)
    check_probes(rows, begin, end, n_q)
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")
    n_rows, first_row = (end - begin) * rows, n_k - n_q + begin * TILE
    n_tiles = triton.cdiv(min(n_k - n_q + end * TILE, n_k), TILE)
    masses = torch.empty((batch, n_heads, n_tiles, n_rows), dtype=torch.float32, device=q.device)
    how = options(head_dim)
    programs = triton.cdiv(n_rows, how["QUERIES"]) * triton.cdiv(n_tiles, CHUNK_TILES)
    _tile_mass_kernel[(programs, n_heads, batch)](
        q, k, masses, heads, *q.stride()[:3], *k.stride()[:3],
        masses.stride(2), n_q, n_k, n_rows, n_tiles, first_row,
        q.shape[1] // k.shape[1], scale * tile.LOG2_E,
        HEAD_DIM=head_dim, DIM=tile.padded(head_dim), TILE=TILE, ROWS=rows,
        CHUNK=CHUNK_TILES, SUMMED=summed, **how,
    )  # fmt: skip
    shares = torch.empty(
        (batch, n_heads, end - begin, n_tiles), dtype=torch.float32, device=q.device
    )
    padded = triton.next_power_of_2(rows)
    _share_kernel[(end - begin, n_heads, batch)](
        masses, shares, masses.stride(2), n_k, n_tiles, first_row,
        ROWS=rows, PADDED=padded, TILE=TILE, CHUNK=_HELD // padded, SUMMED=summed, num_warps=4,
    )  # fmt: skip
    return shares
