"""The best columns and slashes by radix select: ascending positions, without a sort.

A row's k-th largest score is found digit by digit from the top, each digit by one histogram
over the row. Then everything above it is written in place, ties by smaller position. Scores
are compared as unsigned keys whose order is the order of the floats.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from minference_green.kernels.index import NONE
from minference_green.kernels.selection import (
    FORCED_COLUMNS,
    FORCED_OFFSETS,
    check_scores,
    to_device,
)

DIGIT_BITS = (6, 6, 10, 10)
"""From the top. Six bits are counted in registers; what agrees in twelve is mostly rare."""

CHUNK = 2048
"""Scores of one program: a row of 8K tokens still fills four of them."""

BINS = sum(1 << bits for bits in DIGIT_BITS)

KNOWN_SIZE: tl.constexpr = tl.constexpr(2 * (len(DIGIT_BITS) + 1))
"""Numbers that the kernels leave behind for a row: two after every digit, and before the first."""

NO_POSITION: tl.constexpr = tl.constexpr(NONE)
SIZES = ("n", "n_heads", "forced_columns", "forced_slashes", "column_width", "slash_width")


@triton.jit
def _row(columns_ptr, slashes_ptr, counts_ptr, n_heads, forced_columns, forced_slashes):
    """Scores, row among them, count and forced positions of a program; slashes come last."""
    half = tl.num_programs(1) // 2
    row = tl.program_id(1)
    if row < half:
        scores_ptr = columns_ptr
        forced = forced_columns
    else:
        scores_ptr = slashes_ptr
        forced = forced_slashes
    count = tl.load(counts_ptr + row // half * n_heads + row % half % n_heads)
    return scores_ptr, (row % half).to(tl.int64), count, forced


@triton.jit
def load_keys(scores_ptr, row, i, n, n_forced):
    """Scores as keys of the same order; forced positions above all others."""
    score = tl.load(scores_ptr + row * n + i, i < n, 0.0)
    # Adding +0 turns -0 into +0, which is the same score.
    bits = (score + 0.0).to(tl.uint32, bitcast=True)
    key = tl.where(bits >> 31 == 1, ~bits, bits | 0x80000000)
    return tl.where(i < n_forced, 0xFFFFFFFF, key).to(tl.uint32)


@triton.jit
def _resolved(histogram_ptr, known_ptr, count, KNOWN: tl.constexpr, BITS: tl.constexpr):
    """First ``KNOWN`` digits of the row's count-th largest key, and its rank among equals.

    ``histogram_ptr`` counts the last of them, of ``BITS`` bits; the others an earlier kernel left
    behind ``known_ptr``, and the row's first program leaves these.
    """
    prefix = tl.zeros([], tl.uint32)
    if KNOWN > 1:
        prefix = tl.load(known_ptr + 2 * KNOWN - 2).to(tl.uint32, bitcast=True)
        count = tl.load(known_ptr + 2 * KNOWN - 1)
    if KNOWN > 0:
        digits = tl.arange(0, 1 << BITS)
        found = tl.load(histogram_ptr + digits)
        at_least = tl.cumsum(found, 0, reverse=True)
        # The largest digit that is reached by at least ``count`` keys.
        digit = tl.maximum(tl.sum((at_least >= count).to(tl.int32), 0) - 1, 0)
        count -= tl.sum(tl.where(digits > digit, found, 0), 0)
        prefix = (prefix << BITS) | digit.to(tl.uint32)
        if tl.program_id(0) == 0:
            tl.store(known_ptr + 2 * KNOWN, prefix.to(tl.int32, bitcast=True))
            tl.store(known_ptr + 2 * KNOWN + 1, count)
    return prefix, count


@triton.jit(do_not_specialize=SIZES)
def _histogram_kernel(
    columns_ptr, slashes_ptr, counts_ptr, histogram_ptr, known_ptr,
    n, n_heads, forced_columns, forced_slashes,
    PASS: tl.constexpr, BITS: tl.constexpr, BEFORE: tl.constexpr, SHIFT: tl.constexpr,
    FIRST_BIN: tl.constexpr, BINS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Count the next ``BITS`` of the keys that agree with the count-th largest so far.

    ``BEFORE`` are the bits of the digit before, ``SHIFT`` those behind this one.
    """
    scores_ptr, own_row, count, forced = _row(
        columns_ptr, slashes_ptr, counts_ptr, n_heads, forced_columns, forced_slashes
    )  # fmt: skip
    row = tl.program_id(1)
    histogram_ptr += row * BINS + FIRST_BIN
    known_ptr += row * KNOWN_SIZE
    prefix, _ = _resolved(histogram_ptr - (1 << BEFORE), known_ptr, count, PASS, BEFORE)
    i = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    key = load_keys(scores_ptr, own_row, i, n, forced)
    agrees = i < n
    if PASS > 0:
        agrees = agrees & ((key >> (SHIFT + BITS)) == prefix)
    digit = ((key >> SHIFT) & ((1 << BITS) - 1)).to(tl.int32)
    # One by one where few agree; equal scores in their thousands would wait for each other.
    if (PASS < 2) | (tl.sum(agrees.to(tl.int32), 0) > CHUNK // 16):
        found = tl.histogram(digit, 1 << BITS, mask=agrees)
        at = histogram_ptr + tl.arange(0, 1 << BITS)
        tl.atomic_add(at, found, found > 0, sem="relaxed")
    else:
        tl.atomic_add(histogram_ptr + digit, 1, agrees, sem="relaxed")


@triton.jit(do_not_specialize=SIZES)
def _count_kernel(
    columns_ptr, slashes_ptr, counts_ptr, histogram_ptr, known_ptr, totals_ptr,
    n, n_heads, forced_columns, forced_slashes,
    PASSES: tl.constexpr, BEFORE: tl.constexpr, BINS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """How many keys of each chunk lie above the count-th largest, and how many equal it."""
    scores_ptr, own_row, count, forced = _row(
        columns_ptr, slashes_ptr, counts_ptr, n_heads, forced_columns, forced_slashes
    )  # fmt: skip
    row = tl.program_id(1)
    last = histogram_ptr + row * BINS + BINS - (1 << BEFORE)
    least, _ = _resolved(last, known_ptr + row * KNOWN_SIZE, count, PASSES, BEFORE)
    i = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    key = load_keys(scores_ptr, own_row, i, n, forced)
    at = totals_ptr + (row * tl.num_programs(0) + tl.program_id(0)) * 2
    tl.store(at, tl.sum(((key > least) & (i < n)).to(tl.int32), 0))
    tl.store(at + 1, tl.sum(((key == least) & (i < n)).to(tl.int32), 0))


@triton.jit(do_not_specialize=SIZES)
def _write_kernel(
    columns_ptr, slashes_ptr, counts_ptr, known_ptr, totals_ptr, best_columns_ptr,
    best_slashes_ptr, n, n_heads, forced_columns, forced_slashes, column_width, slash_width,
    PASSES: tl.constexpr, CHUNK: tl.constexpr, TOTALS: tl.constexpr,
):  # fmt: skip
    """Write the chosen positions of one chunk behind those of the chunks before it."""
    scores_ptr, own_row, count, forced = _row(
        columns_ptr, slashes_ptr, counts_ptr, n_heads, forced_columns, forced_slashes
    )  # fmt: skip
    row = tl.program_id(1)
    if row < tl.num_programs(1) // 2:
        positions_ptr = best_columns_ptr
        width = column_width
    else:
        positions_ptr = best_slashes_ptr
        width = slash_width
    positions_ptr += own_row * width
    chunk = tl.program_id(0)
    known_ptr += row * KNOWN_SIZE + 2 * PASSES
    least = tl.load(known_ptr).to(tl.uint32, bitcast=True)
    n_ties = tl.load(known_ptr + 1)
    above = 0
    equal = 0
    for first in range(0, chunk, TOTALS):
        earlier = first + tl.arange(0, TOTALS)
        at = totals_ptr + (row * tl.num_programs(0) + earlier) * 2
        above += tl.sum(tl.load(at, earlier < chunk, 0), 0)
        equal += tl.sum(tl.load(at + 1, earlier < chunk, 0), 0)
    i = chunk * CHUNK + tl.arange(0, CHUNK)
    key = load_keys(scores_ptr, own_row, i, n, forced)
    is_above = (key > least) & (i < n)
    is_equal = (key == least) & (i < n)
    # Both counts in one scan; CHUNK fits either half of a number.
    so_far = tl.cumsum(is_above.to(tl.int32) + (is_equal.to(tl.int32) << 16), 0)
    ties = equal + (so_far >> 16)
    slot = above + (so_far & 0xFFFF) + tl.minimum(ties, n_ties) - 1
    tl.store(positions_ptr + slot, i, is_above | (is_equal & (ties <= n_ties)))
    tl.store(positions_ptr + i, NO_POSITION, (i >= count) & (i < width))


def chosen_bands(
    columns: Tensor, slashes: Tensor, verticals: Sequence[int], offsets: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Ascending positions of each head's largest column and slash scores, the forced ones first.

    As :func:`minference_green.kernels.selection.chosen_bands`, to the bit: equal scores go to
    the smaller position. Shapes: ``columns`` and ``slashes [B, H, N]`` fp32 contiguous, one
    count of each per head; returns int32 ``[B, H, min(max(verticals), N)]`` and ``[B, H,
    min(max(offsets), N)]``, padded with ``NONE``. Does not wait for the device. Raises
    ``ValueError`` on another dtype, layout or number of counts.
    """
    for scores, numbers in ((columns, verticals), (slashes, offsets)):
        check_scores(scores, numbers)
        if not scores.is_contiguous():
            raise ValueError(f"scores must be contiguous, got strides {scores.stride()}")
    if columns.shape != slashes.shape:
        raise ValueError(
            "scores of columns and slashes must have one shape, "
            f"got {tuple(columns.shape)} and {tuple(slashes.shape)}"
        )
    batch, heads, n = columns.shape
    device = columns.device
    counts = to_device([min(count, n) for count in (*verticals, *offsets)], device)
    widths = min(max(verticals), n), min(max(offsets), n)
    rows, chunks, passes = 2 * batch * heads, triton.cdiv(n, CHUNK), len(DIGIT_BITS)
    histogram = torch.zeros(rows, BINS, dtype=torch.int32, device=device)
    known = torch.empty(rows, KNOWN_SIZE.value, dtype=torch.int32, device=device)
    totals = torch.empty(rows, chunks, 2, dtype=torch.int32, device=device)
    best = [torch.empty(batch, heads, width, dtype=torch.int32, device=device) for width in widths]
    grid, sizes = (chunks, rows), (n, heads, FORCED_COLUMNS, FORCED_OFFSETS)
    shared = columns, slashes, counts
    before, first_bin, shift = 0, 0, 32
    for number, bits in enumerate(DIGIT_BITS):
        shift -= bits
        _histogram_kernel[grid](
            *shared, histogram, known, *sizes, PASS=number, BITS=bits, BEFORE=before,
            SHIFT=shift, FIRST_BIN=first_bin, BINS=BINS, CHUNK=CHUNK,
        )  # fmt: skip
        before, first_bin = bits, first_bin + (1 << bits)
    _count_kernel[grid](
        *shared, histogram, known, totals, *sizes,
        PASSES=passes, BEFORE=before, BINS=BINS, CHUNK=CHUNK,
    )  # fmt: skip
    _write_kernel[grid](
        *shared, known, totals, *best, *sizes, *widths, PASSES=passes, CHUNK=CHUNK, TOTALS=256
    )  # fmt: skip
    return best[0], best[1]
