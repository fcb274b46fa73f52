"""From scores to an index: deterministic top-k and the builders of both index types.

Torch only and on any device. Nothing here waits for the device: sizes come from budgets and
lengths, never from data, so that a CUDA stream runs from estimate to attend without a stop.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from minference_green.kernels.index import NONE, PIECE, TILE, BandIndex, BlockIndex

FORCED_COLUMNS = 30
"""First columns that are always chosen, and the least number of columns (MInference)."""

FORCED_OFFSETS = 100
"""First slashes that are always chosen first (MInference)."""

LEAST_OFFSETS = 50
"""The least number of slashes (MInference)."""

ALWAYS = 3
"""Key tiles kept whatever their score: tile 0, and up to two that reach past a first row."""

_SLAB = 2**25
"""Scores of block pairs held at once: 128 MiB of them, 256 MiB of their sort keys."""

_PROBED_BYTES = 288 * 2**20
"""What probing holds at once: a number per probing row and key tile, and one for all rows."""

_LOW = 2**31 - 1
_UNREACHABLE = -(2**63)


def top_positions(scores: Tensor, counts: Sequence[int], forced: int) -> Tensor:
    """Ascending positions of each head's largest scores, its first ``forced`` positions first.

    Equal scores go to the smaller position, so that an index is the same on every device.
    Shapes: ``scores [B, H, N]`` fp32 and one of ``counts`` per head; returns int32
    ``[B, H, min(max(counts), N)]``, padded with ``NONE``. Raises ``ValueError`` on another
    dtype or number of counts.
    """
    check_scores(scores, counts)
    keys = _sort_keys(scores)
    keys[..., :forced] = (keys[..., :forced] & _LOW) | (_LOW << 32)
    return _positions(_largest(keys, counts)).sort(-1).values


def chosen_bands(
    columns: Tensor, slashes: Tensor, verticals: Sequence[int], offsets: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """:func:`top_positions` of each head's columns and slashes, MInference's forced ones first."""
    return (
        top_positions(columns, verticals, FORCED_COLUMNS),
        top_positions(slashes, offsets, FORCED_OFFSETS),
    )


def band_index(
    columns: Tensor,
    slashes: Tensor,
    heads: Tensor,
    vertical_sizes: Sequence[int],
    slash_sizes: Sequence[int],
    *,
    cut_pieces: Callable[[Tensor, int], Tensor],
    choose: Callable[..., tuple[Tensor, Tensor]] = chosen_bands,
) -> BandIndex:
    """MInference's vertical-slash choice: each head's best columns and best slashes.

    Per head ``min(N, max(vertical_size, 30))`` columns with the first 30 always among them,
    and ``min(N, max(slash_size, 50))`` slashes, the first 100 before any other.

    Shapes: ``columns`` and ``slashes [B, H, N]`` fp32, ``heads [H]`` int32 query heads, one
    size per head. ``cut_pieces`` turns ascending slashes into pieces on their device, and
    ``choose`` is the device's :func:`chosen_bands`.
    Raises ``ValueError`` if sizes and heads differ in number.
    """
    verticals = [max(size, FORCED_COLUMNS) for size in vertical_sizes]
    offsets = [max(size, LEAST_OFFSETS) for size in slash_sizes]
    best_columns, best_offsets = choose(columns, slashes, verticals, offsets)
    return BandIndex(
        heads=heads,
        pieces=cut_pieces(best_offsets, columns.shape[2]),
        columns=best_columns,
        n_k=columns.shape[2],
    )


def a_shape_index(
    heads: Tensor, n_inits: Sequence[int], n_locals: Sequence[int], *, batch: int, n_k: int
) -> BandIndex:
    """The first ``n_init`` keys and a local window of at least ``n_local``; nothing to estimate.

    Shapes: ``heads [H]`` int32 query heads, one size of each kind per head. Raises
    ``ValueError`` if sizes and heads differ in number, or on a window that misses the diagonal.
    """
    _check_counts(n_inits, len(heads))
    _check_counts(n_locals, len(heads))
    if min(n_locals) < 1:
        raise ValueError(f"n_local must be at least 1, the diagonal, got {min(n_locals)}")
    # The first row of a tile looks n_local - 1 keys back, its other rows less far past it.
    reaches = [min(n_local - 1, n_k) for n_local in n_locals]
    pieces = [range(0, max(reach, TILE) if reach else 0, PIECE) for reach in reaches]
    columns = [range(min(n_init, n_k)) for n_init in n_inits]
    return BandIndex(
        heads=heads,
        pieces=_padded_rows(pieces, batch, heads.device),
        columns=_padded_rows(columns, batch, heads.device),
        n_k=n_k,
    )


def join_bands(first: BandIndex, second: BandIndex) -> BandIndex:
    """One index of both heads lists, so that a layer needs one launch."""
    if first.n_k != second.n_k:
        raise ValueError(f"indices of different lengths: n_k = {first.n_k} and {second.n_k}")
    return BandIndex(
        heads=torch.cat([first.heads, second.heads]),
        pieces=_stack_heads(first.pieces, second.pieces),
        columns=_stack_heads(first.columns, second.columns),
        n_k=first.n_k,
    )


def probing_rows(rows: int, begin: int, end: int, n_q: int, n_k: int) -> Tensor:
    """Positions of the probing rows of query tiles, int64 ``[end - begin, rows]``.

    They lie evenly from the query tile's first row to its last (one row: the last); in a
    shorter last tile those beyond its end are its last row.
    """
    part = torch.arange(rows)
    lane = part * (TILE - 1) // (rows - 1) if rows > 1 else part + TILE - 1
    first = n_k - n_q + TILE * torch.arange(begin, end)
    return (first[:, None] + lane).clamp(max=n_k - 1)


def best_blocks(scores: Tensor, top_ks: Sequence[int], first_row: int, n_k: int) -> Tensor:
    """Key tiles of consecutive query tiles by score, as ascending lists.

    Among the key tiles that start at or before a query tile's last row: the ``top_k`` of
    largest score, ties to the smaller position, tile 0, and those that reach past its first row.

    Shapes: ``scores [B, H, M, T]`` fp32 of the query tiles whose first starts at ``first_row``,
    over at least the key tiles that they reach, one ``top_k`` per head; returns int32
    ``[B, H, M, min(max(top_ks) + 3, T)]``, padded with ``NONE``. Raises ``ValueError`` on
    another dtype, number of sizes or number of key tiles.
    """
    check_blocks(scores, top_ks, first_row, n_k)
    batch, n_heads, n_tiles, n_blocks = scores.shape
    first = first_row + TILE * torch.arange(n_tiles, dtype=torch.int32, device=scores.device)
    last = (first + TILE).clamp(max=n_k) - 1
    block = torch.arange(n_blocks, device=scores.device)
    keys = _sort_keys(scores).masked_fill_(block > (last // TILE)[:, None], _UNREACHABLE)
    best = _positions(_largest(keys, top_ks))
    always = torch.stack([torch.zeros_like(first), first // TILE, last // TILE], dim=-1)
    both = torch.cat([best, always.expand(batch, n_heads, -1, -1)], dim=-1).sort(-1).values
    repeated = torch.nn.functional.pad(both[..., 1:] == both[..., :-1], (1, 0))
    each_once = both.masked_fill_(repeated, NONE).sort(-1).values
    return each_once[..., : min(max(top_ks) + ALWAYS, n_blocks)].contiguous()


def listed_index(
    scores: Callable[[int, int], Tensor],
    slab: int,
    batch: int,
    heads: Tensor,
    top_ks: Sequence[int],
    n_q: int,
    n_k: int,
) -> BlockIndex:
    """The index of :func:`best_blocks` of all query tiles, ``slab`` of them scored at a time.

    ``scores(begin, end)`` gives the scores of the query tiles from ``begin`` to before ``end``,
    as :func:`best_blocks` takes them. There is room for a full list of every query tile; what
    is not used is ``NONE``. Raises ``ValueError`` as :func:`best_blocks` does, and on scores of
    another number of prompts, heads or query tiles.
    """
    n_tiles, width = listed_sizes(top_ks, n_q, n_k)
    lists = []
    for begin in range(0, n_tiles, slab):
        end = min(begin + slab, n_tiles)
        some = scores(begin, end)
        check_slab(some, batch, len(heads), end - begin)
        some = best_blocks(some, top_ks, n_k - n_q + begin * TILE, n_k)
        lists.append(torch.nn.functional.pad(some, (0, width - some.shape[-1]), value=NONE))
    padded = torch.cat(lists, dim=2)
    unused = padded == NONE
    ends = (~unused).sum(-1).cumsum(-1)
    # Stable: what is used moves up, in order.
    order = unused.flatten(2).int().argsort(stable=True)
    return BlockIndex(
        heads=heads,
        starts=torch.nn.functional.pad(ends, (1, 0)).int(),
        blocks=padded.flatten(2).gather(2, order),
        n_q=n_q,
        n_k=n_k,
    )


def listed_sizes(top_ks: Sequence[int], n_q: int, n_k: int) -> tuple[int, int]:
    """Number of query tiles, and of key tiles that the longest of their lists can have."""
    return -(-n_q // TILE), min(max(top_ks) + ALWAYS, -(-n_k // TILE))


def block_index(
    q_means: Tensor,
    k_means: Tensor,
    heads: Tensor,
    top_ks: Sequence[int],
    *,
    scale: float,
    n_q: int,
    n_k: int,
    build: Callable[..., BlockIndex] = listed_index,
) -> BlockIndex:
    """MInference's block-sparse choice: the best key tiles of each query tile by pooled score.

    Among key tiles that start at or before the query tile's last row: the ``top_k`` of largest
    ``scale * mean(Q) . mean(K)``, tile 0, and every tile that reaches past the query tile's
    first row (MInference keeps neither of the last two, and a query can then lose itself).

    Shapes: ``q_means [B, H, ceil(n_q / TILE), D]`` and ``k_means [B, H, ceil(n_k / TILE), D]``
    fp32, KV heads repeated for their query heads; ``heads [H]`` int32, one ``top_k`` per head.
    ``build`` is the device's :func:`listed_index`. Raises ``ValueError`` if shapes,
    lengths or numbers of heads disagree.
    """
    batch, n_heads, n_tiles, _ = q_means.shape
    n_blocks = k_means.shape[2]
    _check_counts(top_ks, n_heads)
    if (n_tiles, n_blocks) != (-(-n_q // TILE), -(-n_k // TILE)):
        raise ValueError(
            f"means of {n_tiles} query and {n_blocks} key tiles do not fit "
            f"n_q = {n_q}, n_k = {n_k} at {TILE} tokens a tile"
        )

    def scores(begin: int, end: int) -> Tensor:
        return q_means[:, :, begin:end] @ k_means.transpose(-1, -2) * scale

    slab = max(1, _SLAB // (batch * n_heads * n_blocks))
    return build(scores, slab, batch, heads, top_ks, n_q, n_k)


def probed_index(
    q: Tensor,
    k: Tensor,
    heads: Tensor,
    top_ks: Sequence[int],
    rows: int,
    *,
    scale: float,
    tile_shares: Callable[..., Tensor],
    build: Callable[..., BlockIndex] = listed_index,
) -> BlockIndex:
    """The best key tiles of each query tile by the attention of some of its rows.

    A key tile scores the largest share that any of the ``rows`` probing rows of
    :func:`probing_rows` gives it: shares, because rows compare by them whatever the size of
    their logits. Of each query tile the ``top_k`` key tiles of largest score, tile 0, and
    every tile that reaches past its first row.

    Shapes: ``q [B, Hq, n_q, D]``, ``k [B, Hkv, n_k, D]``, ``heads [H]`` int32 query heads, one
    ``top_k`` per head. ``tile_shares`` is the device's kernel of that name, ``build`` its
    :func:`listed_index`. Scores held at once are bounded whatever the length, unless one query
    tile alone needs more. Nothing waits for the device. Raises ``ValueError`` if numbers of
    heads disagree, or on ``rows`` outside 1 to ``TILE``.
    """
    batch, _, n_q, _ = q.shape
    n_k = k.shape[2]
    _check_counts(top_ks, len(heads))
    check_probes(rows, 0, -(-n_q // TILE), n_q)

    def scores(begin: int, end: int) -> Tensor:
        return tile_shares(q, k, heads, rows, begin, end, scale=scale)

    slab = max(1, _PROBED_BYTES // (4 * batch * len(heads) * -(-n_k // TILE) * (rows + 1)))
    # A kernel's program takes 128 probing rows: whole programs, where there is room.
    whole = max(1, 128 // rows)
    slab = slab // whole * whole or slab
    return build(scores, slab, batch, heads, top_ks, n_q, n_k)


def _sort_keys(scores: Tensor) -> Tensor:
    """Distinct int64 keys in the order of (score, smaller position), along the last dimension."""
    # Adding +0 turns -0 into +0; a negative float's bits grow with its magnitude.
    bits = (scores + 0.0).view(torch.int32)
    bits = bits ^ ((bits >> 31) & _LOW)
    position = torch.arange(scores.shape[-1], device=scores.device)
    return (bits.long() << 32) | (_LOW - position)


def _largest(keys: Tensor, counts: Sequence[int]) -> Tensor:
    """The largest keys ``[B, H, ..., max(counts)]``; past a head's count, unreachable ones."""
    width = min(max(counts), keys.shape[-1])
    largest = keys.topk(width, sorted=True).values
    if min(counts) >= width:
        return largest
    limit = to_device(counts, keys.device).view(-1, *[1] * (keys.ndim - 2))
    beyond = torch.arange(width, device=keys.device) >= limit
    return largest.masked_fill_(beyond, _UNREACHABLE)


def _positions(keys: Tensor) -> Tensor:
    """The int32 positions that keys stand for; ``NONE`` for unreachable ones."""
    position = (_LOW - (keys & _LOW)).to(torch.int32)
    return position.masked_fill_(keys == _UNREACHABLE, NONE)


def _padded_rows(rows: Sequence[range], batch: int, device: torch.device) -> Tensor:
    """Int32 ``[batch, len(rows), longest]`` of arithmetic rows, padded with ``NONE``."""
    width = max(len(row) for row in rows)
    step = torch.arange(width, dtype=torch.int32, device=device)
    lengths = to_device([len(row) for row in rows], device)
    table = (step * rows[0].step).masked_fill(step >= lengths[:, None], NONE)
    return table.expand(batch, -1, -1).contiguous()


def _stack_heads(first: Tensor, second: Tensor) -> Tensor:
    width = max(first.shape[2], second.shape[2])
    pad = torch.nn.functional.pad
    return torch.cat([pad(x, (0, width - x.shape[2]), value=NONE) for x in (first, second)], dim=1)


def to_device(values: Sequence[int], device: torch.device) -> Tensor:
    """Int32 tensor of host numbers; from pinned memory, a copy that the host need not wait for."""
    host = torch.tensor(values, dtype=torch.int32)
    if device.type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)


def check_rows(rows: Sequence[int], n_q: int, n_k: int) -> None:
    """Refuse rows that are not 1 to ``TILE`` ascending positions among the last ``n_q``."""
    if not 1 <= len(rows) <= TILE:
        raise ValueError(f"rows must be 1 to {TILE} positions, got {len(rows)}")
    if any(a >= b for a, b in pairwise(rows)):
        raise ValueError(f"rows must ascend, each once, got {list(rows)}")
    if rows[0] < n_k - n_q or rows[-1] >= n_k:
        raise ValueError(
            f"rows must be positions of queries, {n_k - n_q} to {n_k - 1}, "
            f"got {rows[0]} to {rows[-1]}"
        )


def check_probes(rows: int, begin: int, end: int, n_q: int) -> None:
    """Refuse a number of probing rows that is not 1 to ``TILE``, or query tiles not there."""
    if not 1 <= rows <= TILE:
        raise ValueError(f"rows must be between 1 and {TILE}, got {rows}")
    n_tiles = -(-n_q // TILE)
    if not 0 <= begin < end <= n_tiles:
        raise ValueError(f"query tiles must be some of 0 to {n_tiles}, got {begin} to {end}")


def check_kv_heads(kv_heads: range, n_kv: int) -> None:
    """Refuse KV heads that are not some of ``n_kv``, next to each other."""
    if not 0 <= kv_heads.start < kv_heads.stop <= n_kv or kv_heads.step != 1:
        raise ValueError(
            f"KV heads must be some of 0 to {n_kv}, next to each other, got {kv_heads}"
        )


def check_blocks(scores: Tensor, top_ks: Sequence[int], first_row: int, n_k: int) -> None:
    """Refuse scores that are not fp32 ``[B, H, M, T]`` over all that their query tiles reach."""
    if scores.dtype != torch.float32 or scores.ndim != 4:
        raise ValueError(
            f"scores must be float32 [B, H, M, T], got {scores.dtype} {tuple(scores.shape)}"
        )
    _check_counts(top_ks, scores.shape[1])
    reach = (min(first_row + scores.shape[2] * TILE, n_k) - 1) // TILE + 1
    if scores.shape[3] < reach:
        raise ValueError(
            f"scores must cover the {reach} key tiles that the query tiles reach, "
            f"got {scores.shape[3]}"
        )


def check_slab(scores: Tensor, batch: int, n_heads: int, n_tiles: int) -> None:
    """Refuse scores that are not those of so many prompts, heads and query tiles."""
    if scores.shape[:3] != (batch, n_heads, n_tiles):
        raise ValueError(
            f"scores must be of {batch} prompts, {n_heads} heads and {n_tiles} query tiles, "
            f"got {tuple(scores.shape)}"
        )


def check_scores(scores: Tensor, counts: Sequence[int]) -> None:
    """Refuse scores that are not fp32 ``[B, H, N]`` or counts that are not one per head."""
    if scores.dtype != torch.float32 or scores.ndim != 3:
        raise ValueError(
            f"scores must be float32 [B, H, N], got {scores.dtype} {tuple(scores.shape)}"
        )
    _check_counts(counts, scores.shape[1])


def _check_counts(counts: Sequence[int], n_heads: int) -> None:
    if len(counts) != n_heads or n_heads == 0:
        raise ValueError(f"needs one size per head: {n_heads} heads, {len(counts)} sizes")
