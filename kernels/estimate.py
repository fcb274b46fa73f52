"""Scores that an index is chosen from: masses of some rows, means of blocks.

The probabilities of the rows, rows x keys per head, are never in memory: a first pass keeps
their log-sum-exp, a second computes them again and adds them up by column and by diagonal.
"""

from collections.abc import Sequence
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from minference_green.kernels import tile
from minference_green.kernels.index import TILE
from minference_green.kernels.selection import check_rows, to_device
from minference_green.kernels.tile import load_tile

UNITS = 2**24
"""Mass 1 in whole numbers: TILE rows fit int32, and whole numbers add up alike in any order."""

LEAST_TILES = 16
"""Key tiles that a program of a short prompt takes: enough to hide its start."""

STEP: tl.constexpr = tl.constexpr(8)
"""Keys and rows of the squares that diagonals are added up in; the rows of a tensor-core tile."""

# A kernel is compiled once, not again for lengths that happen to divide by 16.
LENGTHS = (
    "n_q", "n_k", "n_rows", "n_heads", "group", "first", "past", "chunk", "step", "n_free",
    "n_partials", "skip_offsets", "skip_columns",
)  # fmt: skip


@triton.jit
def _listed_heads(
    heads_ptr, rows_ptr, n_k, n_rows, n_heads, group, HEADS: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """The query heads of one program, ``HEADS`` in the list side by side, and their rows.

    Returns the KV head to read; and for each of ``HEADS * TILE`` query rows the listed head,
    its query head, its position and whether it is one of this program's. Neighbours in the
    list mostly share a KV head; where they do not, ``HEADS`` programs read one each.
    """
    part = tl.program_id(2) % HEADS
    h0 = tl.program_id(0) * HEADS
    kv_head = tl.load(heads_ptr + tl.minimum(h0 + part, n_heads - 1)) // group
    lane = tl.arange(0, HEADS * TILE)
    listed = h0 + lane // TILE
    r = lane % TILE
    real = (listed < n_heads) & (r < n_rows)
    head = tl.load(heads_ptr + listed, real, 0).to(tl.int64)
    real = real & (head // group == kv_head)
    row = n_k - n_rows + r if rows_ptr is None else tl.load(rows_ptr + r, real, -1)
    return kv_head.to(tl.int64), listed, head, tl.where(real, row, -1), real


@triton.jit
def _is_served(heads_ptr, n_heads, group, HEADS: tl.constexpr):
    """Whether another program reads the KV head of this one, for both of their heads."""
    part = tl.program_id(2) % HEADS
    h0 = tl.program_id(0) * HEADS
    own = tl.load(heads_ptr + tl.minimum(h0 + part, n_heads - 1)) // group
    return (part > 0) & (own == tl.load(heads_ptr + h0) // group)


@triton.jit
def _load_queries(q_ptr, q_head, q_row, head, at, real, HEAD_DIM: tl.constexpr, DIM: tl.constexpr):
    """Rows of queries of several heads, ``[rows, DIM]``; those not real are zero."""
    dims = tl.arange(0, DIM)
    at = q_ptr + (head * q_head + at.to(tl.int64) * q_row)[:, None] + dims[None, :]
    return tl.load(at, real[:, None] & (dims < HEAD_DIM)[None, :], 0.0)


@triton.jit
def _add_logits(
    row_max, row_sum, q, k_ptr, k_row, j0, n_k, row, qk_scale,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One key tile more in the rows' running maxima and sums."""
    k = load_tile(k_ptr, k_row, j0, n_k, HEAD_DIM, TILE, DIM, MASKED)
    logits = tl.dot(q, tl.trans(k))
    if MASKED:
        j = j0 + tl.arange(0, TILE)
        logits = tl.where(j[None, :] <= row[:, None], logits, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(logits, 1) * qk_scale)
    anchor = new_max
    if MASKED:
        anchor = tl.where(new_max == float("-inf"), 0.0, new_max)
    weights = tl.exp2(logits * qk_scale - anchor[:, None])
    return new_max, row_sum * tl.exp2(row_max - anchor) + tl.sum(weights, 1)


@triton.jit(do_not_specialize=LENGTHS)
def _row_mass_kernel(
    q_ptr, k_ptr, partial_ptr, rows_ptr, heads_ptr,
    q_batch: tl.int64, q_head: tl.int64, q_row: tl.int64,
    k_batch: tl.int64, k_head: tl.int64, k_row: tl.int64,
    n_q, n_k, n_rows, n_heads, group, chunk, n_free, qk_scale,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Log2-sum-exp2 of the listed rows over one chunk of keys.

    Each row sees the first ``n_free`` key tiles whole.
    """
    if _is_served(heads_ptr, n_heads, group, HEADS):
        return
    b = (tl.program_id(2) // HEADS).to(tl.int64)
    kv_head, listed, head, row, real = _listed_heads(
        heads_ptr, rows_ptr, n_k, n_rows, n_heads, group, HEADS, TILE
    )  # fmt: skip
    q_ptr += b * q_batch
    k_ptr += b * k_batch + kv_head * k_head
    q = _load_queries(q_ptr, q_head, q_row, head, row - (n_k - n_q), real, HEAD_DIM, DIM)
    row_max = tl.full([HEADS * TILE], float("-inf"), tl.float32)
    row_sum = tl.zeros([HEADS * TILE], tl.float32)
    begin = tl.program_id(1) * chunk
    end = tl.minimum(begin + chunk, tl.cdiv(n_k, TILE))
    for t in range(begin, tl.minimum(end, n_free)):
        row_max, row_sum = _add_logits(
            row_max, row_sum, q, k_ptr, k_row, t * TILE, n_k, row, qk_scale,
            HEAD_DIM, DIM, TILE, False,
        )  # fmt: skip
    for t in range(tl.maximum(begin, n_free), end):
        row_max, row_sum = _add_logits(
            row_max, row_sum, q, k_ptr, k_row, t * TILE, n_k, row, qk_scale,
            HEAD_DIM, DIM, TILE, True,
        )  # fmt: skip
    r = tl.arange(0, HEADS * TILE) % TILE
    at = ((b * n_heads + listed) * tl.num_programs(1) + tl.program_id(1)) * TILE + r
    tl.store(partial_ptr + at, row_max + tl.log2(row_sum), real)


@triton.jit
def _total(partial_ptr, n_partials, real, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """Log2-sum-exp2 over all chunks; infinite, so that probabilities are 0, for rows not real.

    ``partial_ptr``: the rows' first partial sums, ``TILE`` apart.
    """
    chunk = tl.arange(0, BLOCK)[:, None]
    row_max = tl.where(real, float("-inf"), 0.0)
    row_sum = tl.where(real, 0.0, float("inf"))
    for c in range(0, n_partials, BLOCK):
        at = partial_ptr[None, :] + (c + chunk) * TILE
        partial = tl.load(at, (c + chunk < n_partials) & real[None, :], float("-inf"))
        new_max = tl.maximum(row_max, tl.max(partial, 0))
        anchor = tl.where(new_max == float("-inf"), 0.0, new_max)
        row_sum = row_sum * tl.exp2(row_max - anchor) + tl.sum(tl.exp2(partial - anchor), 0)
        row_max = new_max
    return row_max + tl.log2(row_sum)


@triton.jit
def _halves(x, TILE: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr):
    """First and second half of each head's rows; moves nothing."""
    return tl.split(tl.permute(tl.reshape(x, [TILE, HEADS, 2, HALF]), (0, 1, 3, 2)))


@triton.jit
def _eighths(x, TILE: tl.constexpr, HEADS: tl.constexpr):
    low, high = _halves(x, TILE, HEADS, TILE // 2)
    a, b = _halves(low, TILE, HEADS, TILE // 4)
    c, d = _halves(high, TILE, HEADS, TILE // 4)
    a0, a1 = _halves(a, TILE, HEADS, TILE // 8)
    b0, b1 = _halves(b, TILE, HEADS, TILE // 8)
    c0, c1 = _halves(c, TILE, HEADS, TILE // 8)
    d0, d1 = _halves(d, TILE, HEADS, TILE // 8)
    return a0, a1, b0, b1, c0, c1, d0, d1


@triton.jit(do_not_specialize=LENGTHS)
def _mass_kernel(
    q_ptr, k_ptr, partial_ptr, rows_ptr, columns_ptr, slashes_ptr, heads_ptr,
    q_batch: tl.int64, q_head: tl.int64, q_row: tl.int64,
    k_batch: tl.int64, k_head: tl.int64, k_row: tl.int64,
    n_q, n_k, n_rows, n_heads, group, first, step, chunk, past, n_partials,
    skip_offsets, skip_columns, qk_scale,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr, HEADS: tl.constexpr,
    LAST: tl.constexpr, MASKED: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """Column and diagonal sums of the listed rows' probabilities over one chunk of keys.

    Keys are counted back from the last one, ``e``: a row's offsets ascend with them. A program
    takes ``chunk`` key tiles from ``first`` on, ``step`` apart from the next program's, and
    stores those before tile ``past``.

    ``LAST``: the rows are the last ones. The keys of a tile come from eight runs of ``STEP``
    keys, and a run advances by ``STEP``::

        tile t = run 0: e0 + STEP t ...  | run 1 ... | ... | run 7

    Then the diagonals of a run's square with rows ``STEP i`` on continue ``i`` tiles later in
    that with the first rows: squares are added up by register, and only one in eight numbers
    has to move, for the diagonals of their sum. In a skewed square the entries with d >= r lie
    on its d-th diagonal, the others on the d-th of the square after. A program computes the
    ``TILE`` keys before each run again instead of adding to what another program wrote.

    Else rows share no diagonal of a tile: each entry is added where it belongs, in whole units.

    ``MASKED``: rows may not see all keys, or keys or offsets may be skipped.
    """
    if _is_served(heads_ptr, n_heads, group, HEADS):
        return
    b = (tl.program_id(2) // HEADS).to(tl.int64)
    kv_head, listed, head, row, real = _listed_heads(
        heads_ptr, rows_ptr, n_k, n_rows, n_heads, group, HEADS, TILE
    )  # fmt: skip
    q_ptr += b * q_batch
    k_ptr += b * k_batch + kv_head * k_head + (n_k - 1).to(tl.int64) * k_row
    q = tl.trans(_load_queries(q_ptr, q_head, q_row, head, row - (n_k - n_q), real, HEAD_DIM, DIM))
    r = tl.arange(0, HEADS * TILE) % TILE
    own_partial = partial_ptr + (b * n_heads + listed) * n_partials * TILE + r
    lse = _total(own_partial, n_partials, real, TILE, 16)
    back = n_k - 1 - row

    lane = tl.arange(0, TILE)
    dims = tl.arange(0, DIM)
    begin = (first + tl.program_id(1) * step) * TILE
    if LAST:
        e0 = begin + lane // STEP * (chunk * STEP) + lane % STEP
        advance = STEP
        warm_up = -(TILE // STEP)
    else:
        e0 = begin + lane
        advance = TILE
        warm_up = 0
    k_at = k_ptr - e0.to(tl.int64)[:, None] * k_row + dims[None, :]
    # Of the heads side by side, those that this program stores.
    own = tl.program_id(0) * HEADS + tl.arange(0, HEADS)
    kept = own < n_heads
    kept = kept & (tl.load(heads_ptr + own, kept, 0) // group == kv_head)
    out = (b * n_heads + own) * n_k

    zero = tl.zeros([TILE, HEADS, STEP], tl.float32)
    d1, d2, d3, d4, d5, d6, d7 = zero, zero, zero, zero, zero, zero, zero
    before = zero
    s = tl.arange(0, STEP)
    back_by = (s[:, None] - s[None, :]) & (STEP - 1)
    index = tl.broadcast_to(back_by[None, :, None, :], [TILE // STEP, STEP, HEADS, STEP])
    is_own = (s[:, None] >= s[None, :])[None, :, None, :]
    for t in range(warm_up, chunk):
        e = e0 + t * advance
        j = n_k - 1 - e
        inside = (e >= 0) & (j >= 0)
        k = tl.load(
            k_at - t * advance * k_row, inside[:, None] & (dims < HEAD_DIM)[None, :], 0.0
        )  # fmt: skip
        p = tl.exp2(tl.dot(k, q) * qk_scale - lse[None, :])
        if MASKED:
            offset = e[:, None] - back[None, :]
            p = tl.where((offset >= 0) & (j >= 0)[:, None], p, 0.0)
            counted = tl.where(offset >= skip_offsets, p, 0.0)
            p = tl.where((j >= skip_columns)[:, None], p, 0.0)
        else:
            counted = p
        sums = tl.sum(tl.reshape(counted, [TILE, HEADS, TILE]), 2)
        stored = ((t >= 0) & (e < past * TILE))[:, None] & kept[None, :]
        tl.store(columns_ptr + out[None, :] + j[:, None], sums, stored & (j >= 0)[:, None])
        if LAST:
            p0, p1, p2, p3, p4, p5, p6, p7 = _eighths(p, TILE, HEADS)
            square = tl.reshape(d1 + p0, [TILE // STEP, STEP, HEADS, STEP])
            d1, d2, d3, d4, d5, d6, d7 = (
                d2 + p1, d3 + p2, d4 + p3, d5 + p4, d6 + p5, d7 + p6, p7
            )  # fmt: skip
            skew = tl.gather(square, index, 1)
            old = tl.reshape(before, [TILE // STEP, STEP, HEADS, STEP])
            sums = tl.reshape(tl.sum(tl.where(is_own, skew, old), 3), [TILE, HEADS])
            before = tl.reshape(skew, [TILE, HEADS, STEP])
            o = e - (n_rows - 1)
            stored = stored & ((o >= 0) & (o < n_k))[:, None]
            tl.store(slashes_ptr + out[None, :] + o[:, None], sums, stored)
        else:
            units = (p * UNITS + 0.5).to(tl.int32)
            at = slashes_ptr + ((b * n_heads + listed) * n_k - back)[None, :] + e[:, None]
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
    batch, n_query_heads, n_q, head_dim = q.shape
    n_k, n_heads, n_rows = k.shape[2], len(heads), len(rows)
    check_rows(rows, n_q, n_k)
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")
    group = n_query_heads // k.shape[1]
    side_by_side = 2 if group > 1 else 1
    last = rows[0] == n_k - n_rows
    listed = None if last else to_device(rows, q.device)
    # One key tile past the last completes the largest offsets.
    n_tiles = triton.cdiv(n_k, TILE) + 1
    programs = triton.cdiv(n_heads, side_by_side), batch * side_by_side
    chunk, n_chunks = _share(n_tiles, programs[0] * batch, q.device)
    partials = torch.empty(batch, n_heads, n_chunks, TILE, dtype=torch.float32, device=q.device)
    strides = (*q.stride()[:3], *k.stride()[:3])
    counts = n_q, n_k, n_rows, n_heads, group
    qk_scale = scale * tile.LOG2_E
    options = {
        "HEAD_DIM": head_dim, "DIM": tile.padded(head_dim), "TILE": TILE, "HEADS": side_by_side,
    }  # fmt: skip
    launch = partial(launch_options, head_dim, side_by_side, _capability(q.device))
    _row_mass_kernel[(programs[0], n_chunks, programs[1])](
        q, k, partials, listed, heads, *strides, *counts, chunk, (rows[0] + 1) // TILE, qk_scale,
        **options, **launch(),
    )  # fmt: skip
    shape = (batch, n_heads, n_k)
    columns = torch.empty(shape, dtype=torch.float32, device=q.device)
    if last:
        slashes = torch.empty_like(columns)
    else:
        slashes = torch.zeros(shape, dtype=torch.int32, device=q.device)

    def add_masses(n: int, first: int, step: int, chunk: int, past: int, masked: bool) -> None:
        _mass_kernel[(programs[0], n, programs[1])](
            q, k, partials, listed, columns, slashes, heads, *strides, *counts,
            first, step, chunk, past, n_chunks, skip_offsets, skip_columns, qk_scale,
            **options, LAST=last, MASKED=masked, UNITS=UNITS, **launch(masked=masked),
        )  # fmt: skip

    # Key tiles from the end that need no mask: past the rows themselves and the skipped offsets
    # (and the tile before is past the rows), before the skipped columns.
    free = max(2, triton.cdiv(n_rows - 1 + skip_offsets, TILE))
    free_past = (n_k - skip_columns) // TILE
    if last and free_past > free:
        chunk, n = _share(free_past - free, programs[0] * batch, q.device)
        add_masses(n, free, chunk, chunk, free_past, False)
        # Both ends at once; what the longer takes from between them comes out the same.
        add_masses(2, 0, free_past, max(free, n_tiles - free_past), n_tiles, True)
    else:
        add_masses(n_chunks, 0, chunk, chunk, n_tiles, True)
    if not last:
        # Where they lie: a copy would be half as much again as all that is held here.
        slashes = torch.mul(slashes, 1 / UNITS, out=slashes.view(torch.float32))
    return columns, slashes


def _share(n_tiles: int, n: int, device: torch.device) -> tuple[int, int]:
    """Key tiles of a program, and programs, if ``n`` of them run beside each other.

    As many as the device holds at once, two on a multiprocessor; at least ``LEAST_TILES`` each.
    """
    processors = 132  # what the interpreter plays
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    programs = max(1, min(2 * processors // n, n_tiles // LEAST_TILES))
    chunk = triton.cdiv(n_tiles, programs)
    return chunk, triton.cdiv(n_tiles, chunk)


def launch_options(
    head_dim: int, side_by_side: int, capability: tuple[int, int], *, masked: bool = True
) -> dict[str, int]:
    """Four warps for each head of a program; without masks, two programs on a multiprocessor."""
    options = {"num_warps": 4 * side_by_side, "num_stages": 3 if head_dim <= 128 else 2}
    if capability == (9, 0) and head_dim <= 128 and not masked:
        # Triton 3.6 keeps below it by itself, 3.9 not; nothing spills.
        options["maxnreg"] = 128
    return options


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


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
