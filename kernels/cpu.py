"""The CPU path: torch twins of the Triton kernels, over the same index types.

Sparse is really faster here too. Per head and a group of query tiles, the keys left of each
tile are gathered and go through torch's fused CPU attention as one batch; each tile's own 64
keys go through it causally; the two results are merged by their log-sum-exp.
"""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from minference_green.kernels.index import NONE, TILE, BandIndex, BlockIndex

_GATHERED = 2**20
"""Elements of K gathered at once: 4 MiB in fp32, which stays in the caches of a few cores."""


def band_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: BandIndex,
    *,
    scale: float,
    out: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over exactly the pairs visible in a :class:`BandIndex`.

    Shapes: ``q [B, Hq, n_q, D]``, ``k, v [B, Hkv, n_k, D]``; returns ``out [B, Hq, n_q, D]``
    and with ``return_lse`` also the natural log-sum-exp ``[B, len(index.heads), n_q]`` in fp32
    (fp64 for fp64 inputs). Only the index's heads are written; ``out`` must be given unless
    they are all. Raises ``ValueError`` on shapes, dtypes or lengths that do not fit.
    """
    _check(q, k, v, index.n_k)
    n_k = k.shape[2]

    def keys_of(b: int, h: int) -> _TileKeys:
        starts = index.tile_starts[b, h]
        starts = starts[starts < n_k].long()
        e = (starts[:, None] + torch.arange(TILE)).flatten()
        e = e[e < n_k]
        banded = torch.zeros(n_k, dtype=torch.bool)
        banded[e] = True
        columns = index.columns[b, h]
        columns = columns[columns < n_k].long()

        def left(first_rows: Tensor) -> tuple[Tensor, Tensor]:
            r0, reach = first_rows[:, None], int(first_rows[-1])
            near = r0 - 1 - e[: int(torch.searchsorted(e, reach))]
            column = columns[: int(torch.searchsorted(columns, reach))]
            distance = r0 - 1 - column
            # A column under a band of the tile is among the near keys already.
            alone = (distance >= 0) & ~banded[distance.clamp(min=0)]
            positions = torch.cat([near, column.expand(len(r0), -1)], dim=1)
            return positions, torch.cat([near >= 0, alone], dim=1)

        return _TileKeys(width=len(e) + len(columns), left=left, own=_every_key)

    return _attend(q, k, v, index.heads, keys_of, scale, out, return_lse)


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: BlockIndex,
    *,
    scale: float,
    out: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over exactly the pairs visible in a :class:`BlockIndex`.

    Shapes, results and errors as :func:`band_attention`; a row without any visible key
    becomes NaN.
    """
    _check(q, k, v, index.n_k)
    n_q, n_k = q.shape[2], k.shape[2]
    if n_q != index.n_q:
        raise ValueError(f"index was built for n_q = {index.n_q}, q has {n_q}")

    def keys_of(b: int, h: int) -> _TileKeys:
        starts = index.starts[b, h].long()
        counts = starts.diff()
        # One block past the end, so that an empty list has something to point at.
        blocks = torch.nn.functional.pad(index.blocks[b, h].long(), (0, 1), value=NONE)

        def listed(first_rows: Tensor) -> Tensor:
            tiles = (first_rows - (n_k - n_q)) // TILE
            entry = torch.arange(int(counts[tiles].max()))
            slot = (starts[tiles, None] + entry).clamp(max=len(blocks) - 1)
            return blocks[slot].masked_fill(entry >= counts[tiles, None], NONE)

        def left(first_rows: Tensor) -> tuple[Tensor, Tensor]:
            positions = listed(first_rows)[..., None] * TILE + torch.arange(TILE)
            positions = positions.flatten(1)
            return positions, positions < first_rows[:, None]

        def own(first_rows: Tensor) -> Tensor:
            block = (first_rows[:, None] + torch.arange(TILE)) // TILE
            return (listed(first_rows)[:, :, None] == block[:, None, :]).any(1)

        return _TileKeys(width=int(counts.max()) * TILE, left=left, own=own)

    return _attend(q, k, v, index.heads, keys_of, scale, out, return_lse)


def last_rows_scores(
    q: Tensor, k: Tensor, heads: Tensor, *, scale: float, rows: int = 64
) -> tuple[Tensor, Tensor]:
    """Column and slash mass of the last rows (MInference, algorithm 2), head by head.

    Shapes: ``q [B, Hq, n_q, D]``, ``k [B, Hkv, n_k, D]``, ``heads [H]`` query heads; returns
    fp32 ``columns [B, H, n_k]`` and ``slashes [B, H, n_k]`` as
    :func:`minference_green.kernels.reference.last_rows_scores`. Raises ``ValueError`` on
    shapes that do not fit.
    """
    _check(q, k, k, k.shape[2])
    batch, n_k, last = q.shape[0], k.shape[2], min(rows, q.shape[2])
    group = q.shape[1] // k.shape[1]
    columns = torch.zeros(batch, len(heads), n_k)
    slashes = torch.zeros(batch, len(heads), n_k)
    future = torch.ones(last, n_k, dtype=torch.bool).triu(n_k - last + 1)
    for b in range(batch):
        for n, head in enumerate(heads.tolist()):
            logits = q[b, head, -last:].float() @ k[b, head // group].float().T * scale
            mass = torch.softmax(logits.masked_fill_(future, -torch.inf), -1)
            columns[b, n] = mass.sum(0)
            for r, i in enumerate(range(n_k - last, n_k)):
                slashes[b, n, : i + 1] += mass[r, : i + 1].flip(0)
    return columns, slashes


def block_means(x: Tensor) -> Tensor:
    """Mean of each ``TILE`` real tokens: ``[B, H, N, D]`` to fp32 ``[B, H, ceil(N/TILE), D]``."""
    whole = x.shape[2] // TILE * TILE
    means: Tensor = x[:, :, :whole].unflatten(2, (whole // TILE, TILE)).mean(3, dtype=torch.float32)
    if whole == x.shape[2]:
        return means
    rest = x[:, :, whole:].mean(2, keepdim=True, dtype=torch.float32)
    return torch.cat([means, rest], dim=2)


def cut_tiles(offsets: Tensor) -> Tensor:
    """Key-tile starts that cover the bands of ascending slashes, in the fewest disjoint tiles.

    Shapes: ``offsets [B, H, S]`` int32, padded with ``NONE``; returns the same, as
    :func:`minference_green.kernels.reference.cut_tiles`.
    """
    tiles = torch.full_like(offsets, NONE)
    for source, target in zip(offsets.flatten(0, 1), tiles.flatten(0, 1), strict=True):
        ascending = source[source != NONE].tolist()
        starts: list[int] = []
        end = 0
        # The first slash past what is covered begins the next tile.
        while (n := bisect_right(ascending, end)) < len(ascending):
            starts.append(max(end, ascending[n] - TILE))
            end = starts[-1] + TILE
        target[: len(starts)] = torch.tensor(starts, dtype=torch.int32)
    return tiles


@dataclass(frozen=True)
class _TileKeys:
    """What the query tiles of one head see, asked for by their first absolute rows ``[G]``."""

    width: int
    """Upper bound of the keys left of any tile."""
    left: Callable[[Tensor], tuple[Tensor, Tensor]]
    """Positions of keys before the tile and which of them count, both ``[G, W]``."""
    own: Callable[[Tensor], Tensor | None]
    """Which of the tile's own 64 keys count, ``[G, TILE]``; ``None`` for all."""


def _every_key(_: Tensor) -> None:
    return None


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: Tensor,
    keys_of: Callable[[int, int], _TileKeys],
    scale: float,
    out: Tensor | None,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    n_q, n_k = q.shape[2], k.shape[2]
    if out is None:
        if len(heads) != q.shape[1]:
            raise ValueError(
                f"index covers {len(heads)} of {q.shape[1]} query heads: give out= to fill "
                "the rows of some heads only"
            )
        out = torch.empty_like(q)
    if out.shape != q.shape:
        raise ValueError(f"out must have the shape of q {list(q.shape)}, got {list(out.shape)}")
    precision = torch.promote_types(q.dtype, torch.float32)
    lse = torch.empty(q.shape[0], len(heads), n_q, dtype=precision)
    group = q.shape[1] // k.shape[1]
    first_rows = torch.arange(n_k - n_q, n_k, TILE)
    for b in range(q.shape[0]):
        for n, head in enumerate(heads.tolist()):
            keys = keys_of(b, n)
            k_head, v_head = k[b, head // group].contiguous(), v[b, head // group].contiguous()
            q_tiles = _tiles(q[b, head])
            k_tiles, v_tiles = _tiles(k_head[n_k - n_q :]), _tiles(v_head[n_k - n_q :])
            step = max(1, _GATHERED // max(1, keys.width * q.shape[3]))
            for begin in range(0, len(first_rows), step):
                some = slice(begin, begin + step)
                part = _own_keys(
                    q_tiles[some], k_tiles[some], v_tiles[some], keys.own(first_rows[some]), scale
                )
                positions, valid = keys.left(first_rows[some])
                if positions.shape[1]:
                    left = _left_keys(q_tiles[some], k_head, v_head, positions, valid, scale)
                    part = _merge(part, left)
                rows = slice(begin * TILE, min((begin + step) * TILE, n_q))
                out[b, head, rows] = part[0].flatten(0, 1)[: rows.stop - rows.start].to(out.dtype)
                lse[b, n, rows] = part[1].flatten()[: rows.stop - rows.start]
    return (out, lse) if return_lse else out


def _tiles(x: Tensor) -> Tensor:
    """Rows ``[n, D]`` in tiles ``[ceil(n / TILE), TILE, D]``, the last one filled with zeros."""
    return torch.nn.functional.pad(x, (0, 0, 0, -len(x) % TILE)).view(-1, TILE, x.shape[1])


def _own_keys(
    q: Tensor, k: Tensor, v: Tensor, listed: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Causal attention of each tile ``[G, TILE, D]`` to itself, over its ``listed`` keys."""
    if listed is None or bool(listed.all()):
        return _fused(q, k, v, None, scale, is_causal=True)
    causal = torch.ones(TILE, TILE, dtype=torch.bool).tril()
    return _fused(q, k, v, causal & listed[:, None, :], scale)


def _left_keys(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, valid: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of each tile ``[G, TILE, D]`` to gathered keys, the same for all its rows."""
    chosen = positions.clamp(0, len(k) - 1).flatten()
    k_left = k.index_select(0, chosen).view(*positions.shape, -1)
    v_left = v.index_select(0, chosen).view(*positions.shape, -1)
    return _fused(q, k_left, v_left, None if bool(valid.all()) else valid[:, None, :], scale)


def _fused(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, *, is_causal: bool = False
) -> tuple[Tensor, Tensor]:
    """Torch's fused CPU attention of a batch of tiles, with its log-sum-exp.

    Shapes: ``q [G, TILE, D]``, ``k, v [G, W, D]``, ``mask [G, 1 or TILE, W]`` bool; returns
    ``[G, TILE, D]`` and ``[G, TILE]``. Called by its operator name because the public function
    keeps the log-sum-exp to itself.
    """
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # noqa: SLF001
    bias = None
    if mask is not None:
        bias = torch.zeros(mask.shape, dtype=q.dtype).masked_fill_(~mask, -torch.inf)[:, None]
    out, lse = attention(
        q[:, None], k[:, None], v[:, None], is_causal=is_causal, attn_mask=bias, scale=scale
    )
    out, lse = out[:, 0].to(lse.dtype), lse[:, 0]
    if mask is not None:
        # The operator reports 0 for a row that sees no key.
        lse = lse.masked_fill(~mask.any(-1), -torch.inf)
    return out, lse


def _merge(one: tuple[Tensor, Tensor], two: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over two disjoint sets of keys, from the attention over each."""
    lse = torch.logaddexp(one[1], two[1])
    weights = [torch.exp(part[1] - lse)[..., None] for part in (one, two)]
    return one[0] * weights[0] + two[0] * weights[1], lse


def _check(q: Tensor, k: Tensor, v: Tensor, n_k: int) -> None:
    fits = (
        q.ndim == k.ndim == 4
        and k.shape == v.shape
        and q.shape[0] == k.shape[0]
        and q.shape[3] == k.shape[3]
        and k.shape[1] > 0
        and q.shape[1] % k.shape[1] == 0
    )
    if not fits:
        raise ValueError(
            "needs q [B, Hq, n_q, D] and k, v [B, Hkv, n_k, D] with Hq a multiple of Hkv, "
            f"got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        )
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"q, k and v need one floating dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if not 1 <= q.shape[2] <= k.shape[2]:
        raise ValueError(f"n_q must be between 1 and n_k = {k.shape[2]}, got {q.shape[2]}")
    if k.shape[2] != n_k:
        raise ValueError(f"index was built for n_k = {n_k}, k has {k.shape[2]}")
