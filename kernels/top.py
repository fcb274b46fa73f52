"""Top-k positions by radix select: each row's chosen set in ascending order, without a sort.

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
from minference_green.kernels.selection import check_scores, to_device

DIGIT_BITS = 8
CHUNK = 4096
"""Scores of one program: a row of 8K tokens still fills two of them."""

SIZES = ("n", "n_counts", "n_forced", "width")


@triton.jit
def load_keys(scores_ptr, row, i, n, n_forced):
    """Scores as keys of the same order; forced positions above all others."""
    score = tl.load(scores_ptr + row * n + i, i < n, 0.0)
    # Adding +0 turns -0 into +0, which is the same score.
    bits = (score + 0.0).to(tl.uint32, bitcast=True)
    key = tl.where(bits >> 31 == 1, ~bits, bits | 0x80000000)
    return tl.where(i < n_forced, 0xFFFFFFFF, key).to(tl.uint32)


@triton.jit
def resolve(histogram_ptr, row, count, KNOWN: tl.constexpr, BITS: tl.constexpr):
    """The first ``KNOWN`` digits of the row's count-th largest key, and its rank among equals."""
    prefix = tl.zeros([1], tl.uint32)
    digits = tl.arange(0, 1 << BITS)
    for p in tl.static_range(KNOWN):
        found = tl.load(histogram_ptr + (row * (32 // BITS) + p) * (1 << BITS) + digits)
        at_least = tl.cumsum(found, 0, reverse=True)
        # The largest digit that is reached by at least ``count`` keys.
        digit = tl.maximum(tl.sum((at_least >= count).to(tl.int32), 0) - 1, 0)
        count -= tl.sum(tl.where(digits > digit, found, 0), 0)
        prefix = (prefix << BITS) | digit.to(tl.uint32)
    return prefix, count


@triton.jit(do_not_specialize=SIZES)
def _histogram_kernel(
    scores_ptr, histogram_ptr, counts_ptr, n, n_counts, n_forced,
    PASS: tl.constexpr, BITS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Count the next digit of the keys that agree with the count-th largest so far."""
    row = tl.program_id(1).to(tl.int64)
    count = tl.load(counts_ptr + row % n_counts)
    i = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    key = load_keys(scores_ptr, row, i, n, n_forced)
    agrees = i < n
    SHIFT: tl.constexpr = 32 - BITS * (PASS + 1)
    if PASS > 0:
        prefix, count = resolve(histogram_ptr, row, count, PASS, BITS)
        agrees = agrees & ((key >> (SHIFT + BITS)) == prefix)
    digit = ((key >> SHIFT) & ((1 << BITS) - 1)).to(tl.int32)
    found = tl.histogram(digit, 1 << BITS, mask=agrees)
    at = histogram_ptr + (row * (32 // BITS) + PASS) * (1 << BITS) + tl.arange(0, 1 << BITS)
    tl.atomic_add(at, found, found > 0, sem="relaxed")


@triton.jit(do_not_specialize=SIZES)
def _count_kernel(
    scores_ptr, histogram_ptr, counts_ptr, totals_ptr, n, n_counts, n_forced,
    BITS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """How many keys of each chunk lie above the count-th largest, and how many equal it."""
    row = tl.program_id(1).to(tl.int64)
    count = tl.load(counts_ptr + row % n_counts)
    least, _ = resolve(histogram_ptr, row, count, 32 // BITS, BITS)
    i = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    key = load_keys(scores_ptr, row, i, n, n_forced)
    at = totals_ptr + (row * tl.num_programs(0) + tl.program_id(0)) * 2
    tl.store(at, tl.sum(((key > least) & (i < n)).to(tl.int32), 0))
    tl.store(at + 1, tl.sum(((key == least) & (i < n)).to(tl.int32), 0))


@triton.jit(do_not_specialize=SIZES)
def _write_kernel(
    scores_ptr, histogram_ptr, counts_ptr, totals_ptr, positions_ptr, n, n_counts, n_forced, width,
    BITS: tl.constexpr, CHUNK: tl.constexpr, TOTALS: tl.constexpr,
):  # fmt: skip
    """Write the chosen positions of one chunk behind those of the chunks before it."""
    row = tl.program_id(1).to(tl.int64)
    chunk = tl.program_id(0)
    count = tl.load(counts_ptr + row % n_counts)
    least, n_ties = resolve(histogram_ptr, row, count, 32 // BITS, BITS)
    above = 0
    equal = 0
    for first in range(0, chunk, TOTALS):
        earlier = first + tl.arange(0, TOTALS)
        at = totals_ptr + (row * tl.num_programs(0) + earlier) * 2
        above += tl.sum(tl.load(at, earlier < chunk, 0), 0)
        equal += tl.sum(tl.load(at + 1, earlier < chunk, 0), 0)
    i = chunk * CHUNK + tl.arange(0, CHUNK)
    key = load_keys(scores_ptr, row, i, n, n_forced)
    tied = (key == least) & (i < n)
    within = equal + tl.cumsum(tied.to(tl.int32), 0) <= n_ties
    chosen = ((key > least) & (i < n)) | (tied & within)
    slot = above + tl.minimum(equal, n_ties) + tl.cumsum(chosen.to(tl.int32), 0) - 1
    tl.store(positions_ptr + row * width + slot, i, chosen)


def top_positions(scores: Tensor, counts: Sequence[int], forced: int) -> Tensor:
    """Ascending positions of each head's largest scores, its first ``forced`` positions first.

    As :func:`minference_green.kernels.selection.top_positions`, to the bit: equal scores go to
    the smaller position. Shapes: ``scores [B, H, N]`` fp32 contiguous, one of ``counts`` per
    head; returns int32 ``[B, H, min(max(counts), N)]``, padded with ``NONE``. Does not wait
    for the device. Raises ``ValueError`` on another dtype, layout or number of counts.
    """
    check_scores(scores, counts)
    if not scores.is_contiguous():
        raise ValueError(f"scores must be contiguous, got strides {scores.stride()}")
    batch, heads, n = scores.shape
    device = scores.device
    taken = to_device([min(count, n) for count in counts], device)
    width = min(max(counts), n)
    rows, chunks = batch * heads, triton.cdiv(n, CHUNK)
    shape = (rows, 32 // DIGIT_BITS, 1 << DIGIT_BITS)
    histogram = torch.zeros(shape, dtype=torch.int32, device=device)
    totals = torch.empty(rows, chunks, 2, dtype=torch.int32, device=device)
    positions = torch.full((batch, heads, width), NONE, dtype=torch.int32, device=device)
    grid, sizes = (chunks, rows), (n, heads, forced)
    for number in range(32 // DIGIT_BITS):
        _histogram_kernel[grid](
            scores, histogram, taken, *sizes, PASS=number, BITS=DIGIT_BITS, CHUNK=CHUNK
        )
    _count_kernel[grid](scores, histogram, taken, totals, *sizes, BITS=DIGIT_BITS, CHUNK=CHUNK)
    _write_kernel[grid](
        scores, histogram, taken, totals, positions, *sizes, width,
        BITS=DIGIT_BITS, CHUNK=CHUNK, TOTALS=256,
    )  # fmt: skip
    return positions
