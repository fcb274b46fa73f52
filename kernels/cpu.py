"""The CPU path: torch twins of the Triton kernels, over the same index types.

Sparse is really faster here too. A job is one query tile of one head. Jobs are taken in order of
how many keys lie left of their tile, as many at a time as memory allows: their keys are
gathered and go through torch's fused CPU attention as one batch, each tile's own 64 keys go
through it causally, and the two results are merged by their log-sum-exp. Nothing here has a
gradient.
"""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from minference_green.kernels.index import (
    NONE,
    PIECE,
    TILE,
    BandIndex,
    BlockIndex,
    room_for_pieces,
)
from minference_green.kernels.selection import (
    check_kv_heads,
    check_probes,
    check_rows,
    probing_rows,
)

T = TypeVar("T")

_GATHERED = 2**20
"""Elements of K a thread gathers at once, 4 MiB in fp32, unless one tile alone needs more."""

_LOGITS = 2**21
"""Logits of probing rows a thread holds at once, unless one query tile alone needs more."""


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
    first_rows = torch.arange(k.shape[2] - q.shape[2], k.shape[2], TILE)
    n_tiles, n_k = len(first_rows), index.n_k
    # Padding becomes n_k, which no tile reaches; one more entry keeps an empty list readable.
    pieces = _padded(index.pieces.long().clamp(max=n_k), n_k)
    columns = _padded(index.columns.long().clamp(max=n_k), n_k)
    r0_of_tile = first_rows.expand(*pieces.shape[:2], -1).contiguous()
    n_pieces = torch.searchsorted(pieces, r0_of_tile).flatten()
    n_columns = torch.searchsorted(columns, r0_of_tile).flatten()
    banded = index.banded()

    def left(jobs: Tensor) -> tuple[Tensor, Tensor]:
        head, r0 = jobs[:, None] // n_tiles, first_rows[jobs % n_tiles, None]
        piece = torch.arange(int(n_pieces[jobs].max()))
        first = r0 - PIECE - _pick(pieces, head * pieces.shape[2] + piece)
        # Positions below 0 lie before the first key, as do all of the pieces past a job's own.
        near = (first[..., None] + torch.arange(PIECE)).flatten(1)
        column = _pick(columns, head * columns.shape[2] + torch.arange(int(n_columns[jobs].max())))
        distance = r0 - 1 - column
        # A column under a band of the tile is among the near keys already.
        covered = _pick(banded, head * n_k + distance.clamp(min=0))
        positions = torch.cat([near, column], dim=1)
        return positions, torch.cat([near >= 0, (distance >= 0) & ~covered], dim=1)

    tiles = _TileKeys(listed=n_pieces * PIECE, singles=n_columns, left=left, own=lambda _: None)
    return _attend(q, k, v, index.heads, tiles, scale, out, return_lse)


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
    first_rows = torch.arange(n_k - n_q, n_k, TILE)
    n_tiles = len(first_rows)
    blocks = _padded(index.blocks.long(), NONE)
    # Where each job's list begins in the flattened blocks of all heads.
    base = torch.arange(blocks.shape[0] * blocks.shape[1]) * blocks.shape[2]
    begins = (index.starts[..., :-1].long().flatten(0, 1) + base[:, None]).flatten()
    counts = index.starts.long().diff().flatten()
    blocks = blocks.flatten()

    def listed(jobs: Tensor, n: Tensor) -> Tensor:
        slot = torch.arange(int(n[jobs].max()))
        block = _pick(blocks, (begins[jobs, None] + slot).clamp(max=len(blocks) - 1))
        return block.masked_fill(slot >= counts[jobs, None], NONE)

    # The last block of a list is usually the tile's own: no key of it is left of the tile.
    last = _pick(blocks, (begins + counts - 1).clamp(min=0)) * TILE
    n_left = counts - ((counts > 0) & (last >= first_rows.repeat(len(base)))).long()

    def left(jobs: Tensor) -> tuple[Tensor, Tensor]:
        block = listed(jobs, n_left)
        positions = (block[..., None] * TILE + torch.arange(TILE)).flatten(1)
        return positions, positions < first_rows[jobs % n_tiles, None]

    def own(jobs: Tensor) -> Tensor:
        block = (first_rows[jobs % n_tiles, None] + torch.arange(TILE)) // TILE
        return (listed(jobs, counts)[:, :, None] == block[:, None, :]).any(1)

    tiles = _TileKeys(listed=n_left * TILE, singles=torch.zeros_like(n_left), left=left, own=own)
    return _attend(q, k, v, index.heads, tiles, scale, out, return_lse)


def stretches_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], *, scale: float
) -> Tensor:
    """Attention of stretches of queries, each over the keys before all of them and its own.

    Shapes: ``q [B, Hq, n_q, D]``, ``k, v [B, Hkv, n_k, D]``, where the last ``n_q`` keys are the
    stretches' own and ``n_q`` is the sum of ``lengths``; returns ``[B, Hq, n_q, D]``. All keys
    before are seen by every query, so they need no mask, which costs torch's fused attention
    twice as much again as the attention itself. Raises ``ValueError`` on shapes that do not fit.
    """
    _check(q, k, v, k.shape[2])
    if sum(lengths) != q.shape[2]:
        raise ValueError(f"lengths must add up to n_q = {q.shape[2]}, got {list(lengths)}")
    n_before = k.shape[2] - q.shape[2]
    keys, values = (x[:, :, n_before:].split(lengths, 2) for x in (k, v))
    own = [
        _flash(*each, scale=scale, is_causal=True)
        for each in zip(q.split(lengths, 2), keys, values, strict=True)
    ]
    part = torch.cat([out for out, _ in own], 2), torch.cat([lse for _, lse in own], 2)
    if n_before:
        part = _merge(part, _flash(q, k[:, :, :n_before], v[:, :, :n_before], scale=scale))
    return part[0].to(q.dtype)


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
    """Column and slash mass of some rows' causal softmax (MInference, algorithm 2), head by head.

    Shapes: ``q [B, Hq, n_q, D]``, ``k [B, Hkv, n_k, D]``, ``heads [H]`` query heads, ``rows``
    up to ``TILE`` ascending positions of queries; returns fp32 ``columns [B, H, n_k]`` and
    ``slashes [B, H, n_k]`` as :func:`minference_green.kernels.reference.row_scores`. Raises
    ``ValueError`` on shapes or rows that do not fit.
    """
    _check(q, k, k, k.shape[2])
    batch, n_q, n_k = q.shape[0], q.shape[2], k.shape[2]
    check_rows(rows, n_q, n_k)
    group = q.shape[1] // k.shape[1]
    columns = torch.zeros(batch, len(heads), n_k)
    slashes = torch.zeros(batch, len(heads), n_k)
    listed = torch.tensor(rows)
    distance = listed[:, None] - torch.arange(n_k)

    def score(job: tuple[int, int, int]) -> None:
        b, n, head = job
        queries = q[b, head].index_select(0, listed - (n_k - n_q)).float()
        logits = queries @ k[b, head // group].float().T * scale
        mass = torch.softmax(logits.masked_fill_(distance < 0, -torch.inf), -1)
        mirrored = mass.flip(1)
        mirrored[:, max(0, n_k - skip_columns) :] = 0
        # Mirrored, a row's slashes begin with its own key and end with key 0.
        for i, row in enumerate(rows):
            slashes[b, n, : row + 1] += mirrored[i, n_k - 1 - row :]
        columns[b, n] = mass.masked_fill_(distance < skip_offsets, 0).sum(0)

    jobs = [(b, n, head) for b in range(batch) for n, head in enumerate(heads.tolist())]
    _on_each_thread(score, jobs)
    return columns, slashes


def tile_shares(
    q: Tensor,
    k: Tensor,
    heads: Tensor,
    rows: int,
    begin: int,
    end: int,
    *,
    scale: float,
    summed: bool = False,
) -> Tensor:
    """What the probing rows of some query tiles attend to: one number per query and key tile.

    The natural logarithm of the largest share that one of
    :func:`minference_green.kernels.selection.probing_rows` gives the key tile, -inf where none
    sees it: a row shares itself out by the softmax of its largest logit in each key tile. Or,
    ``summed``, the attention that all of them put on it, a row that is repeated counted once.

    Shapes: ``q [B, Hq, n_q, D]``, ``k [B, Hkv, n_k, D]``, ``heads [H]`` query heads; returns
    fp32 ``[B, H, end - begin, T]`` for the query tiles from ``begin`` to before ``end`` and all
    ``T`` key tiles that the last of them reaches. Raises ``ValueError`` on shapes, rows or query
    tiles that do not fit.
    """
    _check(q, k, k, k.shape[2])
    batch, n_q, n_k = q.shape[0], q.shape[2], k.shape[2]
    check_probes(rows, begin, end, n_q)
    group, probes = q.shape[1] // k.shape[1], probing_rows(rows, begin, end, n_q, n_k)
    fill = 0.0 if summed else -torch.inf
    reach = int(probes[-1, -1]) // TILE + 1
    shares = torch.full((batch, len(heads), end - begin, reach), fill)

    def score(job: tuple[int, int, int, Tensor]) -> None:
        b, n, head, tiles = job
        at = probes[tiles]
        seen = int(at[-1, -1]) + 1
        # Keys from here on are not seen by every row.
        near = int(at[0, 0])
        queries = q[b, head].index_select(0, at.flatten() - (n_k - n_q)).float() * scale
        logits = torch.full((len(queries), -(-seen // TILE) * TILE), -torch.inf)
        torch.mm(queries, k[b, head // group, :seen].float().T, out=logits[:, :seen])
        logits[:, near:seen].masked_fill_(torch.arange(near, seen) > at.view(-1, 1), -torch.inf)
        by_tile = logits.unflatten(1, (-1, TILE))
        masses = by_tile.logsumexp(-1) if summed else by_tile.amax(-1)
        share = (masses - masses.logsumexp(-1, keepdim=True)).view(*at.shape, -1)
        if summed:
            repeated = torch.nn.functional.pad(at[:, 1:] == at[:, :-1], (1, 0))
            share = share.exp_().masked_fill_(repeated[..., None], 0).sum(1)
        else:
            share = share.amax(1)
        shares[b, n, tiles, : share.shape[1]] = share

    step = max(1, _LOGITS // (rows * n_k))
    parts = torch.arange(end - begin).split(step)
    jobs = [
        (b, n, head, tiles)
        for b in range(batch)
        for n, head in enumerate(heads.tolist())
        for tiles in parts
    ]
    _on_each_thread(score, jobs)
    return shares


def shares_of(k: Tensor, kv_heads: range) -> Callable[..., Tensor]:
    """:func:`tile_shares` for many calls over some KV heads; a CPU has nothing to prepare.

    Raises ``ValueError`` on KV heads that are not there or not next to each other.
    """
    check_kv_heads(kv_heads, k.shape[1])
    return tile_shares


def block_means(x: Tensor) -> Tensor:
    """Mean of each ``TILE`` real tokens: ``[B, H, N, D]`` to fp32 ``[B, H, ceil(N/TILE), D]``."""
    whole = x.shape[2] // TILE * TILE
    means: Tensor = x[:, :, :whole].unflatten(2, (whole // TILE, TILE)).mean(3, dtype=torch.float32)
    if whole == x.shape[2]:
        return means
    rest = x[:, :, whole:].mean(2, keepdim=True, dtype=torch.float32)
    return torch.cat([means, rest], dim=2)


def cut_pieces(offsets: Tensor, n_k: int) -> Tensor:
    """Pieces that cover the bands of ascending slashes, those less than a piece apart as one.

    Shapes: ``offsets [B, H, S]`` int32 below ``n_k``, padded with ``NONE``; returns
    ``[B, H, P]`` int32, as :func:`minference_green.kernels.reference.cut_pieces`.
    """
    before = torch.nn.functional.pad(offsets[..., :-1].long(), (1, 0))
    real = (offsets > 0) & (offsets != NONE)
    offset = offsets.long().clamp(min=TILE)
    begins = (before == 0) | (offset - TILE - before.clamp(min=TILE) >= PIECE)
    begin = (offset - TILE).masked_fill(~(real & begins), 0).cummax(-1).values
    has = (-(-(before.clamp(min=TILE) - begin) // PIECE)).masked_fill(begins, 0)
    new = (-(-(offset - begin) // PIECE) - has).masked_fill(~real, 0)
    at = new.cumsum(-1) - new
    room = room_for_pieces(offsets.shape[2], n_k)
    pieces = torch.full((*offsets.shape[:2], room + 1), NONE, dtype=torch.int64)
    for more in range(TILE // PIECE + 1):
        listed = more < new
        piece = (begin + (has + more) * PIECE).masked_fill(~listed, NONE)
        pieces.scatter_(2, (at + more).masked_fill(~listed, room), piece)
    return pieces[..., :room].to(torch.int32).contiguous()


@dataclass(frozen=True)
class _TileKeys:
    """What query tiles see. Jobs are numbered ``(b * H + h) * n_tiles + m``."""

    listed: Tensor
    """Keys of the blocks or pieces left of each job's tile: int64, one number per job."""
    singles: Tensor
    """Further single keys left of it."""
    left: Callable[[Tensor], tuple[Tensor, Tensor]]
    """Of jobs ``[J]``: key positions, as many as the longest has, and which count, ``[J, W]``."""
    own: Callable[[Tensor], Tensor | None]
    """Of jobs ``[J]``: which of the tile's own 64 keys count, ``[J, TILE]``; ``None`` for all."""


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: Tensor,
    tiles: _TileKeys,
    scale: float,
    out: Tensor | None,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    out = _output(q, out, heads)
    batch, _, n_q, dim = q.shape
    kv_heads = heads.long() // (q.shape[1] // k.shape[1])
    # KV head of each job, in the flattened [B * Hkv].
    kv = (torch.arange(batch)[:, None] * k.shape[1] + kv_heads).flatten()
    n_tiles = len(tiles.listed) // len(kv)
    q_tiles = _tiles(q.index_select(1, heads))
    k_tiles, v_tiles = _tiles(k[:, :, -n_q:]), _tiles(v[:, :, -n_q:])
    k_rows, v_rows = k.reshape(-1, dim), v.reshape(-1, dim)
    result = torch.empty_like(q_tiles)
    lse = torch.empty(q_tiles.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))
    # Alike jobs together, the longest first: what they gather is padded to the longest of them.
    most_singles = int(tiles.singles.max())
    order = (tiles.listed * (most_singles + 1) + tiles.singles).argsort(descending=True)

    def run(jobs: Tensor) -> None:
        kv_of_job = kv[jobs // n_tiles]
        own_tile = kv_of_job * n_tiles + jobs % n_tiles
        q_job, k_own, v_own = (
            x.index_select(0, at)
            for x, at in ((q_tiles, jobs), (k_tiles, own_tile), (v_tiles, own_tile))
        )
        part = _own_keys(q_job, k_own, v_own, tiles.own(jobs), scale)
        positions, seen = tiles.left(jobs)
        if positions.shape[1]:
            rows = positions.clamp_(0, k.shape[2] - 1).add_(kv_of_job[:, None] * k.shape[2])
            mask = None if bool(seen.all()) else seen[:, None, :]
            left = _fused(q_job, _take(k_rows, rows), _take(v_rows, rows), mask, scale)
            part = _merge(part, left)
        blind = part[1].isneginf()
        result.index_copy_(0, jobs, part[0].masked_fill_(blind[..., None], torch.nan).to(q.dtype))
        lse.index_copy_(0, jobs, part[1])

    groups: list[Tensor] = []
    begin = 0
    while begin < len(order):
        width = int(tiles.listed[order[begin]]) + most_singles
        groups.append(order[begin : begin + max(1, _GATHERED // (dim * max(width, TILE)))])
        begin += len(groups[-1])
    _on_each_thread(run, groups)
    out.index_copy_(1, heads.long(), result.view(batch, len(heads), -1, dim)[:, :, :n_q])
    return (out, lse.view(batch, len(heads), -1)[..., :n_q].contiguous()) if return_lse else out


def _on_each_thread(run: Callable[[T], None], items: Iterable[T]) -> None:
    """Run every item, as many at a time as torch has threads, each on one thread alone.

    Torch by itself would split every small step over all threads and let each wait for the
    last: on a busy machine, or one of many cores, the waiting costs more than the work.
    """
    threads = torch.get_num_threads()

    def alone(item: T) -> None:
        with torch.inference_mode():
            run(item)

    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for _ in pool.map(alone, items):
                pass
    finally:
        # What a thread sets for itself is also what threads begun later would start from.
        torch.set_num_threads(threads)


def _output(q: Tensor, out: Tensor | None, heads: Tensor) -> Tensor:
    if out is None:
        if len(heads) != q.shape[1]:
            raise ValueError(
                f"index covers {len(heads)} of {q.shape[1]} query heads: give out= to fill "
                "the rows of some heads only"
            )
        return torch.empty_like(q)
    if out.shape != q.shape:
        raise ValueError(f"out must have the shape of q {list(q.shape)}, got {list(out.shape)}")
    return out


def _tiles(x: Tensor) -> Tensor:
    """``[B, H, N, D]`` as tiles ``[B * H * ceil(N / TILE), TILE, D]``, the last filled with 0."""
    whole = torch.nn.functional.pad(x, (0, 0, 0, -x.shape[2] % TILE))
    return whole.reshape(-1, TILE, x.shape[3])


def _padded(x: Tensor, value: int) -> Tensor:
    """One more column, contiguous."""
    return torch.nn.functional.pad(x, (0, 1), value=value).contiguous()


def _pick(table: Tensor, at: Tensor) -> Tensor:
    """Entries of the flattened table; several times faster than ``table[at]``."""
    return table.flatten().index_select(0, at.flatten()).view(at.shape)


def _take(rows: Tensor, at: Tensor) -> Tensor:
    """Rows ``[n, D]`` gathered to ``[J, W, D]``."""
    return rows.index_select(0, at.flatten()).view(*at.shape, rows.shape[1])


def _own_keys(
    q: Tensor, k: Tensor, v: Tensor, listed: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Causal attention of each tile ``[J, TILE, D]`` to itself, over its ``listed`` keys."""
    if listed is None or bool(listed.all()):
        return _fused(q, k, v, None, scale, is_causal=True)
    causal = torch.ones(TILE, TILE, dtype=torch.bool).tril()
    return _fused(q, k, v, causal & listed[:, None, :], scale)


def _fused(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, *, is_causal: bool = False
) -> tuple[Tensor, Tensor]:
    """Torch's fused CPU attention of a batch of tiles, with its log-sum-exp.

    Shapes: ``q [J, TILE, D]``, ``k, v [J, W, D]``, ``mask [J, 1 or TILE, W]`` bool; returns
    ``[J, TILE, D]`` and ``[J, TILE]``.
    """
    bias = None
    if mask is not None:
        bias = torch.zeros(mask.shape, dtype=q.dtype).masked_fill_(~mask, -torch.inf)[:, None]
    found = _flash(q[:, None], k[:, None], v[:, None], scale=scale, bias=bias, is_causal=is_causal)
    out, lse = found[0][:, 0], found[1][:, 0]
    if mask is not None:
        # The operator reports 0 for a row that sees no key.
        lse = lse.masked_fill(~mask.any(-1), -torch.inf)
    return out, lse


def _flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    bias: Tensor | None = None,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """Torch's fused CPU attention, its output as wide as its log-sum-exp.

    Called by its operator name because the public function keeps the log-sum-exp to itself.
    """
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # noqa: SLF001
    out, lse = attention(q, k, v, is_causal=is_causal, attn_mask=bias, scale=scale)
    return out.to(lse.dtype), lse


def _merge(one: tuple[Tensor, Tensor], two: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over two disjoint sets of keys, from the attention over each."""
    share = torch.sigmoid(two[1] - one[1])
    return torch.lerp(one[0], two[0], share[..., None]), torch.logaddexp(one[1], two[1])


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
