"""The best key tiles of each query tile: one program a row of scores, held in registers.

The least score that is chosen is found bit by bit from the top, comparing and counting. Then
everything above it is written in ascending order, ties by smaller position: no sort. A second
kernel moves the lists of all query tiles together, once their lengths are summed.
"""

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from minference_green.kernels.index import NONE, TILE, BlockIndex
from minference_green.kernels.selection import check_blocks, check_slab, listed_sizes, to_device
from minference_green.kernels.top import load_keys

LEAST_HELD = 1024
"""A row is held in the next power of two, so that lengths share kernels; short ones this one."""

CHUNK = 1024
"""Scores of one step of writing."""

SIZES = ("n_k", "n_blocks", "first_row", "begin", "n_tiles", "width")
PACK_SIZES = ("n_tiles", "width")

_NONE: tl.constexpr = tl.constexpr(NONE)


@triton.jit(do_not_specialize=SIZES)
def _best_kernel(
    scores_ptr, counts_ptr, lists_ptr, lengths_ptr,
    n_k, n_blocks, first_row, begin, n_tiles, width,
    TILE: tl.constexpr, HELD: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One query tile of those from ``begin``: its list, and how long it is behind that."""
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
    lists_ptr += (listed * n_tiles + begin + m) * width
    # Read again: what is held above leaves no registers for two sums along the row.
    written = 0
    earlier_ties = 0
    for chunk in range(0, last + 1, CHUNK):
        place = chunk + tl.arange(0, CHUNK)
        again = load_keys(scores_ptr, row, place, n_blocks, 0)
        tied = (again == least) & (place <= last)
        within = earlier_ties + tl.cumsum(tied.to(tl.int32), 0) <= n_ties
        chosen = ((again > least) & (place <= last)) | (tied & within)
        chosen = chosen | (place == 0) | (place == first) | (place == last)
        slot = written + tl.cumsum(chosen.to(tl.int32), 0) - 1
        tl.store(lists_ptr + slot, place, chosen)
        earlier_ties += tl.sum(tied.to(tl.int32), 0)
        written += tl.sum(chosen.to(tl.int32), 0)
    tl.store(lengths_ptr + listed * (n_tiles + 1) + begin + m + 1, written)


@triton.jit(do_not_specialize=PACK_SIZES)
def _pack_kernel(lists_ptr, starts_ptr, blocks_ptr, n_tiles, width, CHUNK: tl.constexpr):
    """The used part of each list behind that of the list before; ``NONE`` behind the last."""
    listed = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    place = tl.program_id(0).to(tl.int64) * CHUNK + tl.arange(0, CHUNK)
    m = place // width
    inside = m < n_tiles
    starts_ptr += listed * (n_tiles + 1)
    start = tl.load(starts_ptr + m, inside, 0)
    slot = start + place - m * width
    used = slot < tl.load(starts_ptr + m + 1, inside, 0)
    lists_ptr += listed * n_tiles * width
    blocks_ptr += listed * n_tiles * width
    tl.store(blocks_ptr + slot, tl.load(lists_ptr + place, used, 0), used)
    beyond = inside & (place >= tl.load(starts_ptr + n_tiles))
    tl.store(blocks_ptr + place, tl.full([CHUNK], _NONE, tl.int32), beyond)


def warps(held: int) -> int:
    """Warps of a program that holds so many scores: 16 of them a thread where it can."""
    return min(max(held // 512, 4), 32)


def listed_index(
    scores: Callable[[int, int], Tensor],
    slab: int,
    batch: int,
    heads: Tensor,
    top_ks: Sequence[int],
    n_q: int,
    n_k: int,
) -> BlockIndex:
    """The index of the best key tiles of all query tiles, ``slab`` of them scored at a time.

    As :func:`minference_green.kernels.selection.listed_index`, to the bit: equal scores go to
    the smaller position. ``scores(begin, end)`` is fp32 contiguous ``[B, H, end - begin, T]``.
    Two launches more than a launch for every slab, and none waits for the device. Raises
    ``ValueError`` on another dtype or layout, or numbers of prompts, heads or tiles that differ.
    """
    n_tiles, width = listed_sizes(top_ks, n_q, n_k)
    n_heads, device = len(heads), heads.device
    counts = to_device(top_ks, device)
    lists = torch.empty((batch, n_heads, n_tiles, width), dtype=torch.int32, device=device)
    # The first stays 0: summed up, lengths are starts.
    lengths = torch.zeros((batch, n_heads, n_tiles + 1), dtype=torch.int32, device=device)
    # From the last, which reaches the most keys: what it held is memory enough for all others.
    for begin in reversed(range(0, n_tiles, slab)):
        end, first_row = min(begin + slab, n_tiles), n_k - n_q + begin * TILE
        some = scores(begin, end)
        check_blocks(some, top_ks, first_row, n_k)
        check_slab(some, batch, n_heads, end - begin)
        if not some.is_contiguous():
            raise ValueError(f"scores must be contiguous, got strides {some.stride()}")
        held = max(LEAST_HELD, int(triton.next_power_of_2(some.shape[3])))
        _best_kernel[(end - begin, n_heads, batch)](
            some, counts, lists, lengths,
            n_k, some.shape[3], first_row, begin, n_tiles, width,
            TILE=TILE, HELD=held, CHUNK=CHUNK, num_warps=warps(held),
        )  # fmt: skip
        del some  # before the next are asked for
    starts = lengths.cumsum(-1, dtype=torch.int32)
    blocks = torch.empty((batch, n_heads, n_tiles * width), dtype=torch.int32, device=device)
    _pack_kernel[(triton.cdiv(n_tiles * width, CHUNK), n_heads, batch)](
        lists, starts, blocks, n_tiles, width, CHUNK=CHUNK, num_warps=4
    )
    return BlockIndex(heads=heads, starts=starts, blocks=blocks, n_q=n_q, n_k=n_k)
