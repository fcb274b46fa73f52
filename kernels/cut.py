"""Cutting the bands of chosen slashes into pieces, on the device."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minference_green.kernels.index import NONE, PIECE, TILE, room_for_pieces

NO_PIECE: tl.constexpr = tl.constexpr(NONE)
BLOCK = 1024
"""Slashes that a program looks at together."""


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit(do_not_specialize=("n_offsets", "n_pieces"))
def _cut_kernel(
    offsets_ptr, pieces_ptr, n_offsets, n_pieces,
    TILE: tl.constexpr, PIECE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One head. Each slash adds the pieces that its run needs to reach it, which are few."""
    offsets_ptr += tl.program_id(0).to(tl.int64) * n_offsets
    pieces_ptr += tl.program_id(0).to(tl.int64) * n_pieces
    run = 0
    count = 0
    for first in range(0, n_offsets, BLOCK):
        i = first + tl.arange(0, BLOCK)
        offset = tl.load(offsets_ptr + i, i < n_offsets, NO_PIECE)
        before = tl.load(offsets_ptr + i - 1, (i > 0) & (i < n_offsets), 0)
        real = (offset > 0) & (offset != NO_PIECE)
        offset = tl.maximum(offset, TILE)
        begins = before == 0
        before = tl.maximum(before, TILE)
        begins = begins | (offset - TILE - before >= PIECE)
        begin = tl.where(real & begins, offset - TILE, run)
        begin = tl.associative_scan(begin, 0, _larger)
        has = tl.where(begins, 0, (before - begin + PIECE - 1) // PIECE)
        new = tl.where(real, (offset - begin + PIECE - 1) // PIECE - has, 0)
        at = count + tl.cumsum(new, 0) - new
        for more in tl.static_range(TILE // PIECE + 1):
            tl.store(pieces_ptr + at + more, begin + (has + more) * PIECE, more < new)
        run = tl.max(begin, 0)
        count += tl.sum(new, 0)


def cut_pieces(offsets: Tensor, n_k: int) -> Tensor:
    """Pieces that cover the bands of chosen slashes.

    Slash ``o`` needs every ``e`` in ``[o - TILE, o)``; bands that touch, or are less than a piece
    apart, are one run, cut from its nearest ``e`` outward. Shapes: ``offsets [B, H, S]`` int32
    below ``n_k``, rows strictly ascending and then padded with ``NONE``; returns
    ``[B, H, P]`` int32, likewise ascending and padded. Does not wait for the device.

    Raises ``ValueError`` with the value if ``offsets`` is not contiguous int32 ``[B, H, S]``.
    """
    if offsets.dtype != torch.int32 or offsets.ndim != 3 or not offsets.is_contiguous():
        raise ValueError(
            f"offsets must be contiguous int32 [B, H, S], got {offsets.dtype} "
            f"{tuple(offsets.shape)} with strides {offsets.stride()}"
        )
    batch, heads, n_offsets = offsets.shape
    n_pieces = room_for_pieces(n_offsets, n_k)
    pieces = torch.full((batch, heads, n_pieces), NONE, dtype=torch.int32, device=offsets.device)
    if offsets.numel():
        _cut_kernel[(batch * heads,)](
            offsets, pieces, n_offsets, n_pieces, TILE=TILE, PIECE=PIECE, BLOCK=BLOCK, num_warps=4
        )
    return pieces
