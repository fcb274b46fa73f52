"""What some rows of a prompt attend to, key tile by key tile."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from minference_green.kernels import tile
from minference_green.kernels.index import TILE
from minference_green.kernels.selection import check_probes, to_device
from minference_green.kernels.tile import LN_2, load_tile

CHUNK_TILES = 64
"""Key tiles of one program: its queries are loaded once for them."""

# A kernel is compiled once, not again for lengths that happen to divide by 16.
LENGTHS = ("n_q", "n_k", "n_rows", "n_tiles", "group")


@triton.jit(do_not_specialize=LENGTHS)
def _tile_mass_kernel(
    q_ptr, k_ptr, masses_ptr, rows_ptr, heads_ptr,
    q_batch: tl.int64, q_head: tl.int64, q_row: tl.int64,
    k_batch: tl.int64, k_head: tl.int64, k_row: tl.int64,
    n_q, n_k, n_rows, n_tiles, group, qk_scale,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of TILE listed rows over each key tile of one chunk that one of them sees."""
    h = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    head = tl.load(heads_ptr + h).to(tl.int64)
    q_ptr += b * q_batch + head * q_head
    k_ptr += b * k_batch + head // group * k_head
    lane = tl.arange(0, TILE)
    dims = tl.arange(0, DIM)
    n_chunks = tl.cdiv(n_tiles, CHUNK)
    first = tl.program_id(0) % n_chunks * CHUNK
    listed = tl.program_id(0) // n_chunks * TILE + lane
    row = tl.load(rows_ptr + listed, listed < n_rows, -1)
    at = q_ptr + (row - (n_k - n_q))[:, None].to(tl.int64) * q_row + dims[None, :]
    q = tl.load(at, (listed < n_rows)[:, None] & (dims < HEAD_DIM)[None, :], 0.0)
    masses_ptr += ((b * tl.num_programs(1) + h) * n_rows + listed) * n_tiles
    reach = tl.max(row, 0) // TILE + 1
    for t in range(first, tl.minimum(first + CHUNK, reach)):
        k = load_tile(k_ptr, k_row, t * TILE, n_k, HEAD_DIM, TILE, DIM, True)
        visible = (t * TILE + lane)[None, :] <= row[:, None]
        logits = tl.where(visible, tl.dot(q, tl.trans(k)) * qk_scale, float("-inf"))
        most = tl.max(logits, 1)
        anchor = tl.where(most == float("-inf"), 0.0, most)
        total = tl.sum(tl.exp2(logits - anchor[:, None]), 1)
        tl.store(masses_ptr + t, (anchor + tl.log2(total)) * LN_2, listed < n_rows)


def tile_masses(
    q: Tensor, k: Tensor, heads: Tensor, rows: Sequence[int], *, scale: float
) -> Tensor:
    """Log-sum-exp of each row's causal logits over every key tile the last row reaches.

    Shapes: ``q [B, Hq, n_q, D]``, ``k [B, Hkv, n_k, D]``, ``heads [H]`` int32, the query heads
    to read; ``rows``, positions of queries that do not descend, the last ``n_q`` of ``n_k``.
    Returns fp32 ``[B, H, len(rows), rows[-1] // TILE + 1]``, -inf where a row sees no key of a
    tile. The same bits on every call. Nothing waits for the device.

    Raises ``ValueError`` with the value on a shape, dtype, device or layout that does not fit.
    """
    tile.check_tensors(q=q, k=k)
    tile.check_grouped(q, k)
    tile.check_index("heads", heads, (None,), q)
    batch, _, n_q, head_dim = q.shape
    n_k, n_heads, n_rows = k.shape[2], len(heads), len(rows)
    check_probes(rows, n_q, n_k)
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")
    n_tiles = rows[-1] // TILE + 1
    # Tiles past a program's last row are not visited.
    masses = torch.full(
        (batch, n_heads, n_rows, n_tiles), -torch.inf, dtype=torch.float32, device=q.device
    )
    programs = triton.cdiv(n_tiles, CHUNK_TILES) * triton.cdiv(n_rows, TILE)
    _tile_mass_kernel[(programs, n_heads, batch)](
        q, k, masses, to_device(rows, q.device), heads, *q.stride()[:3], *k.stride()[:3],
        n_q, n_k, n_rows, n_tiles, q.shape[1] // k.shape[1], scale * tile.LOG2_E,
        HEAD_DIM=head_dim, DIM=tile.padded(head_dim), TILE=TILE, CHUNK=CHUNK_TILES,
        num_warps=8 if head_dim > 128 else 4, num_stages=3,
    )  # fmt: skip
    return masses
