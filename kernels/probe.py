"""What some rows of each query tile attend to, key tile by key tile.

One kernel writes what each probing row finds in every key tile it sees; a second turns that
into shares and puts the rows of a query tile together. Two things can be found:

- the row's largest logit, which says nearly what its attention there is and needs no
  exponentials, of rows and keys rounded to 8 bits, twice the products in a second. ``NOTES.md``
  says what that loses;
- its log-sum-exp, in the precision of the inputs: the attention itself.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from minference_green.kernels import tile
from minference_green.kernels.index import TILE
from minference_green.kernels.selection import check_kv_heads, check_probes
from minference_green.kernels.tile import LN_2, load_tile

CHUNK_TILES = 64
"""Key tiles of one program: its queries are loaded once for them."""

STEP_TILES = 2
"""Key tiles of one step of the products of 8 bits: 128 keys beside 128 rows."""

_HELD = 2048
"""Numbers that a program of the second kernel holds at once."""

_SAMPLED: tl.constexpr = tl.constexpr(64)
"""Keys whose mean all keys are taken from before they are rounded."""

_UNSEEN: tl.constexpr = tl.constexpr(-(2**31))

# A kernel is compiled once, not again for lengths that happen to divide by 16.
MASS_LENGTHS = ("masses_tile", "n_q", "n_k", "n_rows", "n_tiles", "first_row", "group")
LARGEST_LENGTHS = (*MASS_LENGTHS, "first_kv", "n_kv", "n_key_tiles")
SHARE_LENGTHS = ("masses_tile", "n_k", "n_tiles", "first_row")
ROUND_LENGTHS = ("n_k", "first_kv", "n_key_tiles")


@dataclass(frozen=True)
class RoundedKeys:
    """Keys of some neighbouring KV heads in 8 bits, each key tile in units of its own.

    Shapes: ``numbers [B, G, tiles, TILE, DIM]`` int8 with ``DIM`` the padded head dimension,
    ``units [B, G, tiles]`` fp32, with room for whole steps of the kernel that reads them.
    """

    numbers: Tensor
    units: Tensor
    first_kv: int
    of: tuple[int, int, int]
    """Batch, tokens and head dimension of the keys."""


@triton.jit
def _rounded(x, largest):
    """Whole numbers of -127 to 127, and what one of them stands for.

    By exact division: numbers of 8 bits often lie at a half, and devices shall round alike.
    """
    unit = tl.div_rn(tl.where(largest > 0, largest, 1.0), 127.0)
    return tl.floor(tl.div_rn(x, tl.broadcast_to(unit, x.shape)) + 0.5).to(tl.int8), unit


@triton.jit(do_not_specialize=ROUND_LENGTHS)
def _round_kernel(
    k_ptr, numbers_ptr, units_ptr,
    k_batch: tl.int64, k_head: tl.int64, k_row: tl.int64, n_k, first_kv, n_key_tiles,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The keys of one key tile, less the mean of some keys, in 8 bits.

    A vector taken from all keys takes one number from all logits of a row: its shares stay. They
    depend by rounding alone on keys that the row does not see, whatever those are.
    """
    t = tl.program_id(0)
    g = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    dims = tl.arange(0, DIM)
    k_ptr += b * k_batch + (first_kv + g).to(tl.int64) * k_head
    sampled = (tl.arange(0, _SAMPLED).to(tl.int64) * n_k // _SAMPLED)[:, None]
    some = tl.load(k_ptr + sampled * k_row + dims[None, :], (dims < HEAD_DIM)[None, :], 0.0)
    some = some.to(tl.float32)
    # One that is not finite would spoil every tile.
    middle = tl.sum(tl.where(tl.abs(some) < float("inf"), some, 0.0), 0) / _SAMPLED
    k = load_tile(k_ptr, k_row, t * TILE, n_k, HEAD_DIM, TILE, DIM, True).to(tl.float32)
    j = t * TILE + tl.arange(0, TILE)
    k = tl.where((j < n_k)[:, None], k - middle[None, :], 0.0)
    numbers, unit = _rounded(k, tl.max(tl.max(tl.abs(k), 1), 0))
    at = (b * tl.num_programs(1) + g) * n_key_tiles + t
    own = (at * TILE + tl.arange(0, TILE))[:, None] * DIM + dims[None, :]
    tl.store(numbers_ptr + own, numbers)
    tl.store(units_ptr + at, unit)


@triton.jit
def probing_row(number, first_row, n_k, ROWS: tl.constexpr, TILE: tl.constexpr):
    """Position of a probing row by its number; those past the end are the last query."""
    lane = number % ROWS * (TILE - 1) // (ROWS - 1) if ROWS > 1 else TILE - 1
    return tl.minimum(first_row + number // ROWS * TILE + lane, n_k - 1)


@triton.jit
def _own_rows(
    first_row, n_rows, n_k, ROWS: tl.constexpr, TILE: tl.constexpr, QUERIES: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Numbers and positions of a program's probing rows, and the key tiles it takes of each.

    Those from the first to before the second every row sees whole, from there to before the
    third some row sees a key. Programs that run together share a chunk of keys: they read it
    from the L2 cache.
    """
    n_groups = tl.cdiv(n_rows, QUERIES)
    first = tl.program_id(0) // n_groups * CHUNK
    # Rows past the last are the last once more: they write what it writes.
    number = tl.program_id(0) % n_groups * QUERIES + tl.arange(0, QUERIES)
    number = tl.minimum(number, n_rows - 1)
    row = probing_row(number, first_row, n_k, ROWS, TILE)
    end = tl.minimum(first + CHUNK, tl.max(row, 0) // TILE + 1)
    plain_end = tl.maximum(first, tl.minimum(end, (tl.min(row, 0) + 1) // TILE))
    return number, row, first, plain_end, end


@triton.jit
def _largest(
    q, numbers_at, units_ptr, t, unit, row,
    DIM: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Largest logits, base 2, of rounded rows in ``TILES`` key tiles; -inf where none is seen."""
    # 31 bits are enough for 8 million tokens; wide sums would take the registers of a program.
    k = tl.load(numbers_at + t * (TILE * DIM))
    logits = tl.dot(q, tl.trans(k))
    if MASKED:
        key = t * TILE + tl.arange(0, TILES * TILE)
        logits = tl.where(key[None, :] <= row[:, None], logits, _UNSEEN)
    most = tl.max(tl.reshape(logits, [q.shape[0], TILES, TILE]), 2)
    units = tl.load(units_ptr + t + tl.arange(0, TILES))
    mass = most.to(tl.float32) * unit[:, None] * units[None, :]
    if MASKED:
        mass = tl.where(most == _UNSEEN, float("-inf"), mass)
    return mass


@triton.jit(do_not_specialize=LARGEST_LENGTHS)
def _largest_kernel(
    q_ptr, numbers_ptr, units_ptr, masses_ptr, heads_ptr,
    q_batch: tl.int64, q_head: tl.int64, q_row: tl.int64,
    masses_tile, n_q, n_k, n_rows, n_tiles, first_row, group,
    first_kv, n_kv, n_key_tiles, qk_scale,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
    QUERIES: tl.constexpr, CHUNK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Largest logits of QUERIES probing rows in each key tile of one chunk that one of them sees.

    ``masses [B, H, n_tiles, n_rows]``: neighbouring rows are neighbours in memory.
    """
    number, row, first, plain_end, end = _own_rows(
        first_row, n_rows, n_k, ROWS, TILE, QUERIES, CHUNK
    )  # fmt: skip
    if first >= end:
        return
    h = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    head = tl.load(heads_ptr + h).to(tl.int64)
    dims = tl.arange(0, DIM)
    q_at = q_ptr + b * q_batch + head * q_head + dims[None, :]
    q_at += (row - (n_k - n_q))[:, None].to(tl.int64) * q_row
    q = tl.load(q_at, (dims < HEAD_DIM)[None, :], 0.0).to(tl.float32)
    q, unit = _rounded(q, tl.max(tl.abs(q), 1)[:, None])
    unit = tl.reshape(unit, [QUERIES]) * qk_scale
    slot = b * n_kv + head // group - first_kv
    keys = tl.arange(0, TILES * TILE)
    numbers_at = numbers_ptr + slot * n_key_tiles * TILE * DIM + keys[:, None] * DIM + dims[None, :]
    units_ptr += slot * n_key_tiles
    masses_ptr += (b * tl.num_programs(1) + h) * n_tiles * masses_tile
    tiles = tl.arange(0, TILES)
    # Whole steps; what is left over is masked.
    plain_end = first + (plain_end - first) // TILES * TILES
    for t in range(first, plain_end, TILES):
        mass = _largest(q, numbers_at, units_ptr, t, unit, row, DIM, TILE, TILES, False)
        tl.store(masses_ptr + (t + tiles)[None, :] * masses_tile + number[:, None], mass)
    for t in tl.range(plain_end, end, TILES, num_stages=1):
        mass = _largest(q, numbers_at, units_ptr, t, unit, row, DIM, TILE, TILES, True)
        at = masses_ptr + (t + tiles)[None, :] * masses_tile + number[:, None]
        tl.store(at, mass, (t + tiles < end)[None, :])


@triton.jit
def _log_sum(q, k, qk_scale, visible, MASKED: tl.constexpr):
    """Each row's log-sum-exp in one key tile, in base 2; -inf if it sees none."""
    logits = tl.dot(q, tl.trans(k))
    if MASKED:
        logits = tl.where(visible, logits, float("-inf"))
    most = tl.max(logits, 1) * qk_scale
    if MASKED:
        most = tl.where(most == float("-inf"), 0.0, most)
    return most + tl.log2(tl.sum(tl.exp2(logits * qk_scale - most[:, None]), 1))


@triton.jit(do_not_specialize=MASS_LENGTHS)
def _sum_kernel(
    q_ptr, k_ptr, masses_ptr, heads_ptr,
    q_batch: tl.int64, q_head: tl.int64, q_row: tl.int64,
    k_batch: tl.int64, k_head: tl.int64, k_row: tl.int64,
    masses_tile: tl.int64, n_q, n_k, n_rows, n_tiles, first_row, group, qk_scale,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
    QUERIES: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """As :func:`_largest_kernel`, log-sum-exps, by the inputs as they are."""
    number, row, first, plain_end, end = _own_rows(
        first_row, n_rows, n_k, ROWS, TILE, QUERIES, CHUNK
    )  # fmt: skip
    if first >= end:
        return
    h = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    head = tl.load(heads_ptr + h).to(tl.int64)
    q_ptr += b * q_batch + head * q_head
    k_ptr += b * k_batch + head // group * k_head
    masses_ptr += (b * tl.num_programs(1) + h) * n_tiles * masses_tile
    lane = tl.arange(0, TILE)
    dims = tl.arange(0, DIM)
    at = q_ptr + (row - (n_k - n_q))[:, None].to(tl.int64) * q_row + dims[None, :]
    q = tl.load(at, (dims < HEAD_DIM)[None, :], 0.0)
    for t in range(first, plain_end):
        k = load_tile(k_ptr, k_row, t * TILE, n_k, HEAD_DIM, TILE, DIM, False)
        tl.store(masses_ptr + t * masses_tile + number, _log_sum(q, k, qk_scale, None, False))
    for t in tl.range(plain_end, end, num_stages=1):
        k = load_tile(k_ptr, k_row, t * TILE, n_k, HEAD_DIM, TILE, DIM, True)
        visible = (t * TILE + lane)[None, :] <= row[:, None]
        tl.store(masses_ptr + t * masses_tile + number, _log_sum(q, k, qk_scale, visible, True))


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
    # A row that finds nothing anywhere shares nothing out.
    whole = tl.where(most > float("-inf"), most + tl.log2(total), 0.0)
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


def options(head_dim: int, *, summed: bool) -> dict[str, int]:
    """Probing rows of a program of the first kernel, which read the same keys; warps, stages."""
    if not summed:
        return {"QUERIES": 128, "num_warps": 8, "num_stages": 3}
    # Small keys are soon multiplied: 128 rows would take them from L2 faster than it gives.
    if head_dim <= 64:
        return {"QUERIES": 256, "num_warps": 8, "num_stages": 3}
    return {"QUERIES": 128, "num_warps": 8, "num_stages": 2}


def round_keys(k: Tensor, kv_heads: range) -> RoundedKeys:
    """The keys of some neighbouring KV heads of ``k [B, Hkv, n_k, D]``, in 8 bits.

    Raises ``ValueError`` with the value on a shape, dtype, device or layout that does not fit,
    or KV heads that are not there.
    """
    tile.check_tensors(k=k)
    batch, n_kv, n_k, head_dim = k.shape
    check_kv_heads(kv_heads, n_kv)
    tiles, dim = triton.cdiv(triton.cdiv(n_k, TILE), STEP_TILES) * STEP_TILES, tile.padded(head_dim)
    shape = (batch, len(kv_heads), tiles)
    numbers = torch.empty((*shape, TILE, dim), dtype=torch.int8, device=k.device)
    units = torch.empty(shape, dtype=torch.float32, device=k.device)
    _round_kernel[(tiles, len(kv_heads), batch)](
        k, numbers, units, *k.stride()[:3], n_k, kv_heads.start, tiles,
        HEAD_DIM=head_dim, DIM=dim, TILE=TILE, num_warps=4,
    )  # fmt: skip
    return RoundedKeys(numbers, units, kv_heads.start, (batch, n_k, head_dim))


def shares_of(k: Tensor, kv_heads: range) -> Callable[..., Tensor]:
    """:func:`tile_shares` for many calls: the keys of the KV heads are rounded once for all."""
    return partial(tile_shares, rounded=round_keys(k, kv_heads))


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
    rounded: RoundedKeys | None = None,
) -> Tensor:
    """What the probing rows of some query tiles attend to: one number per query and key tile.

    Probing rows are :func:`minference_green.kernels.selection.probing_rows`. The number is the
    natural logarithm of the largest share that one of them gives the key tile, -inf where none
    sees it: a row shares itself out by the softmax of its largest logit in each key tile, of
    itself and keys in 8 bits. Or, ``summed``, the
    attention that all of them put on it, a row that is repeated counted once, of the inputs as
    they are: with ``rows = TILE`` the mass of the whole query tile.

    Shapes: ``q [B, Hq, n_q, D]``, ``k [B, Hkv, n_k, D]``, ``heads [H]`` int32, the query heads
    to read; queries are the last ``n_q`` positions. ``rounded`` are the keys of all KV heads
    that they read; without it all are rounded here. Returns fp32 ``[B, H, end - begin, T]`` for
    the query tiles from ``begin`` to before ``end`` and all ``T`` key tiles that the last of
    them reaches. Holds ``rows`` times as much beside it. The same bits on every call. Nothing
    waits for the device.

    Raises ``ValueError`` with the value on a shape, dtype, device or layout that does not fit,
    ``rows`` outside 1 to ``TILE``, query tiles that are not there, or too many of them: a
    head's probing rows times its key tiles must be less than 2^31.
    """
    tile.check_tensors(q=q, k=k)
    tile.check_grouped(q, k)
    tile.check_index("heads", heads, (None,), q)
    batch, n_query_heads, n_q, head_dim = q.shape
    n_kv_heads, n_k, n_heads = k.shape[1], k.shape[2], len(heads)
    check_probes(rows, begin, end, n_q)
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")
    if rounded and rounded.of != (batch, n_k, head_dim):
        raise ValueError(
            f"keys were rounded of batch, tokens, head_dim {rounded.of}, "
            f"got {(batch, n_k, head_dim)}"
        )
    n_rows, first_row = (end - begin) * rows, n_k - n_q + begin * TILE
    n_tiles = triton.cdiv(min(n_k - n_q + end * TILE, n_k), TILE)
    if n_tiles * n_rows >= 2**31:
        raise ValueError(
            f"{end - begin} query tiles of {rows} rows over {n_tiles} key tiles "
            "are too many at once"
        )
    masses = torch.empty((batch, n_heads, n_tiles, n_rows), dtype=torch.float32, device=q.device)
    how = options(head_dim, summed=summed)
    programs = triton.cdiv(n_rows, how["QUERIES"]) * triton.cdiv(n_tiles, CHUNK_TILES)
    sizes = masses.stride(2), n_q, n_k, n_rows, n_tiles, first_row, n_query_heads // n_kv_heads
    shape = {
        "HEAD_DIM": head_dim, "DIM": tile.padded(head_dim), "TILE": TILE, "ROWS": rows,
        "CHUNK": CHUNK_TILES,
    }  # fmt: skip
    if summed:
        _sum_kernel[(programs, n_heads, batch)](
            q, k, masses, heads, *q.stride()[:3], *k.stride()[:3], *sizes, scale * tile.LOG2_E,
            **shape, **how,
        )  # fmt: skip
    else:
        keys = rounded or round_keys(k, range(n_kv_heads))
        _, n_kv, n_key_tiles = keys.units.shape
        _largest_kernel[(programs, n_heads, batch)](
            q, keys.numbers, keys.units, masses, heads, *q.stride()[:3], *sizes,
            keys.first_kv, n_kv, n_key_tiles, scale * tile.LOG2_E,
            **shape, **how, TILES=STEP_TILES,
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
