"""The best key tiles of each query tile: one program a row of scores, held in registers.

The least score that is chosen is found bit by bit from the top, comparing and counting. Then
everything above it is written in ascending order, ties by smaller position: no sort.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from minference_green.kernels.index import NONE, TILE
from minference_green.kernels.selection import ALWAYS, check_blocks, to_device
from minference_green.kernels.top import load_keys

LEAST_HELD = 1024
"""A row is held in the next power of two, so that lengths share kernels; short ones this one."""

CHUNK = 1024
"""Scores of one step of writing."""

SIZES = ("n_k", "n_blocks", "first_row", "width")


@triton.jit(do_not_specialize=SIZES)
def _best_kernel(
    scores_ptr, counts_ptr, lists_ptr, n_k, n_blocks, first_row, width,
    TILE: tl.constexpr, HELD: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0)
    h = tl.program_id(1)
    listed = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + h
    row = listed * tl.num_programs(0) + m
    first = (first_row + m * TILE) // TILE
    last = (tl.minimum(first_row + m * TILE + TILE, n_k) - 1) // TILE
    i = tl.arange(0, HELD)
    # The key 0 is that of no number.
    key = tl.where(i <= last, load_keys(scores_ptr, row, i, n_blocks, 0), 0)
    count = tl.minimum(tl.load(counts_ptr + h), last + 1)
    # The largest key that is reached by at least ``count`` of them.
    least = tl.zeros([1], tl.uint32)
    bit = tl.full([1], 1 << 31, tl.uint32)
    for _ in range(32):
        enough = tl.sum((key >= (least | bit)).to(tl.int32), 0) >= count
        least = tl.where(enough, least | bit, least)
        bit = bit >> 1
    n_ties = count - tl.sum((key > least).to(tl.int32), 0)
    # Read again: what is held above leaves no registers for two sums along the row.
    written = 0
    earlier_ties = 0
    for begin in range(0, last + 1, CHUNK):
        place = begin + tl.arange(0, CHUNK)
        again = load_keys(scores_ptr, row, place, n_blocks, 0)
        tied = (again == least) & (place <= last)
        within = earlier_ties + tl.cumsum(tied.to(tl.int32), 0) <= n_ties
        chosen = ((again > least) & (place <= last)) | (tied & within)
        chosen = chosen | (place == 0) | (place == first) | (place == last)
        slot = written + tl.cumsum(chosen.to(tl.int32), 0) - 1
        tl.store(lists_ptr + row * width + slot, place, chosen)
        earlier_ties += tl.sum(tied.to(tl.int32), 0)
        written += tl.sum(chosen.to(tl.int32), 0)


def warps(held: int) -> int:
    """Warps of a program that holds so many scores: 16 of them a thread where it can."""
    return min(max(held // 512, 4), 32)


def best_blocks(scores: Tensor, top_ks: Sequence[int], first_row: int, n_k: int) -> Tensor:
    """Key tiles of consecutive query tiles by score, as ascending lists.

    As :func:`minference_green.kernels.selection.best_blocks`, to the bit: equal scores go to
    the smaller position. Shapes: ``scores [B, H, M, T]`` fp32 contiguous, one ``top_k`` per
    head; returns int32 ``[B, H, M, min(max(top_ks) + 3, T)]``, padded with ``NONE``. Does not
    wait for the device. Raises ``ValueError`` on another dtype, layout, number of sizes or
    number of key tiles.
    """
    check_blocks(scores, top_ks, first_row, n_k)
    if not scores.is_contiguous():
        raise ValueError(f"scores must be contiguous, got strides {scores.stride()}")
    batch, n_heads, n_tiles, n_blocks = scores.shape
    width = min(max(top_ks) + ALWAYS, n_blocks)
    lists = torch.full(
        (batch, n_heads, n_tiles, width), NONE, dtype=torch.int32, device=scores.device
    )
    held = max(LEAST_HELD, int(triton.next_power_of_2(n_blocks)))
    _best_kernel[(n_tiles, n_heads, batch)](
        scores, to_device(top_ks, scores.device), lists, n_k, n_blocks, first_row, width,
        TILE=TILE, HELD=held, CHUNK=CHUNK, num_warps=warps(held),
    )  # fmt: skip
    return lists
