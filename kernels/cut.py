"""Cutting the bands of chosen slashes into key tiles, on the device."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minference_green.kernels.index import NONE, TILE

NO_TILE: tl.constexpr = tl.constexpr(NONE)


@triton.jit(do_not_specialize=("n_offsets",))
def _cut_kernel(offsets_ptr, starts_ptr, n_offsets, TILE: tl.constexpr):
    """One row, tile after tile: where one starts depends on where the one before it ended.

    A tile serves at most ``TILE`` slashes, so one load holds all that it serves.
    """
    row = tl.program_id(0).to(tl.int64) * n_offsets
    lane = tl.arange(0, TILE)
    first = 0
    count = 0
    end = 0
    offsets = tl.load(offsets_ptr + row + lane, lane < n_offsets, NO_TILE)
    nearest = tl.min(offsets, 0)
    while nearest != NO_TILE:
        if nearest > end:
            start = tl.maximum(end, nearest - TILE)
            tl.store(starts_ptr + row + count, start)
            count += 1
            end = start + TILE
        first += tl.sum((offsets <= end).to(tl.int32), 0)
        offsets = tl.load(offsets_ptr + row + first + lane, first + lane < n_offsets, NO_TILE)
        nearest = tl.min(offsets, 0)


def cut_tiles(offsets: Tensor) -> Tensor:
    """Key-tile starts that cover the bands of chosen slashes, at most one per slash.

    Slash ``o`` needs every ``e`` in ``[o - TILE, o)``, cut at 0; tiles are laid from the
    diagonal outward, each at the first ``e`` not yet covered. Shapes: ``offsets [B, H, S]``
    int32, rows strictly ascending and then padded with ``NONE``; returns the same shape,
    likewise ascending and padded. Does not wait for the device.

    Raises ``ValueError`` with the value if ``offsets`` is not contiguous int32 ``[B, H, S]``.
    """
    if offsets.dtype != torch.int32 or offsets.ndim != 3 or not offsets.is_contiguous():
        raise ValueError(
            f"offsets must be contiguous int32 [B, H, S], got {offsets.dtype} "
            f"{tuple(offsets.shape)} with strides {offsets.stride()}"
        )
    starts = torch.full_like(offsets, NONE)
    batch, heads, n_offsets = offsets.shape
    if starts.numel():
        _cut_kernel[(batch * heads,)](offsets, starts, n_offsets, TILE=TILE, num_warps=1)
    return starts
