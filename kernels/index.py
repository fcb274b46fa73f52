"""What an estimator hands to a kernel: which (query, key) pairs are computed.

Both index types are data. The Triton kernels, the CPU path and the oracles all read
the same fields, and :meth:`mask` is the definition they are tested against.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

TILE = 64
"""Query rows and key columns of a tile: fixed, so that an index means the same everywhere."""

PIECE = 16
"""Keys of a piece: bands are cut to whole pieces, ``TILE // PIECE`` of which fill a tile."""

NONE = 2**31 - 1
"""Padding of index rows: larger than any position, so that rows stay sorted."""


@dataclass(frozen=True)
class BandIndex:
    """Verticals and slashes of some heads, in O(tokens) numbers per head.

    For a query tile whose first absolute row is ``r0``, a key column left of the tile is
    written as ``e = r0 - 1 - j >= 0``. A slash then covers the same ``e`` for every query
    tile, so one sorted list of pieces per head serves all of them and is merely
    truncated at ``e = r0 - 1`` (column 0). Key ``j`` is visible to query ``i`` iff
    ``j <= i`` and one of

    * ``j >= r0`` (the query tile itself),
    * ``p <= e < p + PIECE`` for some ``p`` in ``pieces``,
    * ``j`` is in ``columns``.

    Shapes: ``heads [H]``, ``pieces [B, H, P]``, ``columns [B, H, V]``, all int32. Rows of the
    last two are strictly ascending, then padded with ``NONE``; the pieces of a row are
    disjoint, and those that follow each other without a gap, a run, are ``TILE`` keys or more,
    as the band of a single slash is.
    """

    heads: Tensor
    pieces: Tensor
    columns: Tensor
    n_k: int

    def mask(self, n_q: int, n_k: int) -> Tensor:
        """Visible pairs as bool ``[B, H, n_q, n_k]``; queries are the last ``n_q`` positions.

        Raises ``ValueError`` if ``n_k`` is not the length the index was built for.
        """
        _check_lengths(n_q, n_k, self.n_k)
        return self.visible(torch.arange(n_k - n_q, n_k), 0, n_k, n_q)

    def visible(self, rows: Tensor, begin: int, end: int, n_q: int) -> Tensor:
        """The part of :meth:`mask` of some rows and the keys ``begin`` to ``end``.

        Shapes: ``rows [R]`` absolute positions, any order; returns bool ``[B, H, R, end - begin]``.
        """
        device = self.pieces.device
        banded = self.banded()
        is_column = _membership(self.columns, self.n_k)[:, :, begin:end]
        i = rows.to(device)
        j = torch.arange(begin, end, device=device)
        r0 = i - (i - (self.n_k - n_q)) % TILE
        e = r0[:, None] - 1 - j[None, :]
        in_band = banded[:, :, e.clamp(min=0)] & (e >= 0)
        visible = (e < 0) | in_band | is_column[:, :, None, :]
        return visible & (j[None, :] <= i[:, None])

    def visible_pairs(self, n_q: int) -> Tensor:
        """Number of visible pairs, int64 ``[B, H]``, without building the mask."""
        rows = (self.n_k - self._first_rows(n_q)).clamp(max=TILE)
        return (rows * self._visible_left(n_q) + rows * (rows + 1) // 2).sum(-1)

    def whole_rows(self, n_q: int) -> Tensor:
        """Leading rows that see every key up to themselves, in whole query tiles: ``[B, H]``."""
        whole = self._visible_left(n_q) == self._first_rows(n_q)
        return _leading_rows(whole, n_q)

    def _first_rows(self, n_q: int) -> Tensor:
        return _first_rows(n_q, self.n_k, self.pieces.device)

    def _visible_left(self, n_q: int) -> Tensor:
        """Number of keys visible left of each query tile, int64 ``[B, H, M]``."""
        _check_lengths(n_q, self.n_k, self.n_k)
        banded = self.banded()
        banded_below = torch.nn.functional.pad(banded.long().cumsum(-1), (1, 0))
        r0 = self._first_rows(n_q)
        left = banded_below[:, :, r0]
        batch, n_heads, n_columns = self.columns.shape
        # Columns not under a band, a bounded slab of query tiles at a time.
        slab = max(1, 2**24 // max(1, n_columns * batch * n_heads))
        column = self.columns.long()[:, :, None, :]
        flat = banded[:, :, None, :]
        for begin in range(0, len(r0), slab):
            e = r0[begin : begin + slab, None] - 1 - column
            covered = flat.expand(-1, -1, e.shape[2], -1).gather(3, e.clamp(0, self.n_k - 1))
            left[:, :, begin : begin + slab] += ((e >= 0) & ~covered).sum(-1)
        return left

    def density(self, n_q: int) -> Tensor:
        """Visible over causal pairs, float64 ``[B, H]``, at most 1."""
        return self.visible_pairs(n_q).double() / causal_pairs(n_q, self.n_k)

    def banded(self) -> Tensor:
        """Whether a distance ``e`` lies in a stored piece: bool ``[B, H, n_k]``."""
        e = self.pieces.long()[..., None] + torch.arange(PIECE, device=self.pieces.device)
        return _membership(e.flatten(-2), self.n_k)


@dataclass(frozen=True)
class BlockIndex:
    """Per query tile a list of key tiles, as compressed rows.

    Key ``j`` is visible to the query at absolute row ``i`` iff ``j <= i`` and
    ``j // TILE`` is listed for the query tile ``(i - q_offset) // TILE``, where
    ``q_offset = n_k - n_q``.

    Shapes: ``heads [H]``, ``starts [B, H, M + 1]``, ``blocks [B, H, C]``, all int32, with
    ``M = ceil(n_q / TILE)``. The list of query tile ``m`` is
    ``blocks[starts[m]:starts[m + 1]]``, strictly ascending.
    """

    heads: Tensor
    starts: Tensor
    blocks: Tensor
    n_q: int
    n_k: int

    def mask(self, n_q: int, n_k: int) -> Tensor:
        """Visible pairs as bool ``[B, H, n_q, n_k]``.

        Raises ``ValueError`` if the lengths are not those the index was built for.
        """
        _check_lengths(n_q, n_k, self.n_k)
        return self.visible(torch.arange(n_k - n_q, n_k), 0, n_k, n_q)

    def visible(self, rows: Tensor, begin: int, end: int, n_q: int) -> Tensor:
        """The part of :meth:`mask` of some rows and the keys ``begin`` to ``end``.

        Shapes: ``rows [R]`` absolute positions, any order; returns bool ``[B, H, R, end - begin]``.
        """
        self._check_queries(n_q)
        device = self.blocks.device
        i = rows.to(device)
        j = torch.arange(begin, end, device=device)
        # (query tile, key tile) as one number: ascending along the entries, so it can be searched.
        n_blocks, tile = -(-self.n_k // TILE), self._tile_of_entry()
        unused = tile == self.starts.shape[-1] - 1
        cells = (tile * n_blocks + self.blocks.long()).masked_fill(unused, NONE * n_blocks)
        key_tiles = torch.arange(begin // TILE, -(-end // TILE), device=device)
        asked = (i - (self.n_k - n_q))[:, None] // TILE * n_blocks + key_tiles
        asked = asked.expand(*cells.shape[:2], -1, -1).flatten(2).contiguous()
        at = torch.searchsorted(cells, asked).clamp(max=cells.shape[2] - 1)
        listed = (cells.gather(2, at) == asked).view(*cells.shape[:2], len(i), len(key_tiles))
        seen: Tensor = listed[..., j // TILE - begin // TILE]
        return seen & (j[None, :] <= i[:, None])

    def visible_pairs(self, n_q: int) -> Tensor:
        """Number of visible pairs, int64 ``[B, H]``, without building the mask."""
        self._check_queries(n_q)
        tile = self._tile_of_entry()
        valid = tile < self.starts.shape[-1] - 1
        r0 = self.n_k - self.n_q + tile.clamp(max=self.starts.shape[-1] - 2) * TILE
        rows = (self.n_k - r0).clamp(max=TILE)
        first = self.blocks.long() * TILE
        width = (self.n_k - first).clamp(0, TILE)

        def seen_up_to(row: Tensor) -> Tensor:
            # Row r sees min(width, r - first + 1) keys of the block, at least 0: a ramp, summed.
            reach = (row - first + 1).clamp(min=0)
            ramp = torch.minimum(reach, width)
            return ramp * (ramp + 1) // 2 + (reach - ramp) * width

        return ((seen_up_to(r0 + rows - 1) - seen_up_to(r0 - 1)) * valid).sum(-1)

    def density(self, n_q: int) -> Tensor:
        """Visible over causal pairs, float64 ``[B, H]``, at most 1."""
        return self.visible_pairs(n_q).double() / causal_pairs(n_q, self.n_k)

    def _tile_of_entry(self) -> Tensor:
        """Query tile each entry of ``blocks`` belongs to; ``M`` for unused capacity."""
        entry = torch.arange(self.blocks.shape[-1], device=self.blocks.device)
        entry = entry.expand(self.blocks.shape).contiguous()
        return torch.searchsorted(self.starts[..., 1:].long().contiguous(), entry, right=True)

    def whole_rows(self, n_q: int) -> Tensor:
        """Leading rows that see every key up to themselves, in whole query tiles: ``[B, H]``."""
        self._check_queries(n_q)
        r0 = _first_rows(n_q, self.n_k, self.blocks.device)
        reach = ((r0 + TILE).clamp(max=self.n_k) - 1) // TILE
        tile = self._tile_of_entry()
        at = tile.clamp(max=len(r0) - 1)
        counts = (tile < len(r0)) & (self.blocks <= reach[at])
        listed = torch.zeros(*tile.shape[:2], len(r0), dtype=torch.int64, device=tile.device)
        listed.scatter_add_(2, at, counts.long())
        return _leading_rows(listed == reach + 1, n_q)

    def _check_queries(self, n_q: int) -> None:
        if n_q != self.n_q:
            raise ValueError(f"index was built for n_q = {self.n_q}, got {n_q}")


@dataclass(frozen=True)
class PartedIndex:
    """A whole prompt in parts, each with a :class:`BandIndex` over the keys up to its end.

    A part serves the rows from where the part before it ends to its own ``n_k``. All parts but
    the last end at whole query tiles, and all list the same heads.
    """

    parts: tuple[BandIndex, ...]

    @property
    def heads(self) -> Tensor:
        """Query heads, ``[H]`` int32."""
        return self.parts[0].heads

    @property
    def n_k(self) -> int:
        """Keys, and queries, of the whole prompt."""
        return self.parts[-1].n_k

    def served(self) -> list[tuple[int, int, BandIndex]]:
        """First row of each part, the row after its last, and its index."""
        ends = [part.n_k for part in self.parts]
        return list(zip([0, *ends[:-1]], ends, self.parts, strict=True))

    def mask(self, n_q: int, n_k: int) -> Tensor:
        """Visible pairs as bool ``[B, H, n_q, n_k]``.

        Raises ``ValueError`` if the lengths are not the prompt's.
        """
        _check_lengths(n_q, n_k, self.n_k)
        return self.visible(torch.arange(n_k), 0, n_k, n_q)

    def visible(self, rows: Tensor, begin: int, end: int, n_q: int) -> Tensor:
        """As :meth:`BandIndex.visible`, each row by its part's index."""
        self._check_whole(n_q)
        shape = (*self.parts[0].columns.shape[:2], len(rows), end - begin)
        seen = torch.zeros(shape, dtype=torch.bool, device=self.heads.device)
        for first, past, part in self.served():
            at = ((rows >= first) & (rows < past)).nonzero()[:, 0]
            stop = min(end, past)
            if len(at) and stop > begin:
                own = part.visible(rows[at], begin, stop, past - first)
                seen[:, :, at.to(seen.device), : stop - begin] = own
        return seen

    def visible_pairs(self, n_q: int) -> Tensor:
        """Number of visible pairs, int64 ``[B, H]``, without building the mask."""
        self._check_whole(n_q)
        pairs = [part.visible_pairs(past - first) for first, past, part in self.served()]
        return torch.stack(pairs).sum(0)

    def density(self, n_q: int) -> Tensor:
        """Visible over causal pairs, float64 ``[B, H]``, at most 1."""
        return self.visible_pairs(n_q).double() / causal_pairs(n_q, self.n_k)

    def whole_rows(self, n_q: int) -> Tensor:
        """Leading rows that see every key up to themselves, in whole query tiles: ``[B, H]``."""
        self._check_whole(n_q)
        rows = torch.zeros(self.parts[0].columns.shape[:2], dtype=torch.int64)
        rows = rows.to(self.heads.device)
        for first, past, part in self.served():
            rows += torch.where(rows == first, part.whole_rows(past - first), 0)
        return rows

    def _check_whole(self, n_q: int) -> None:
        if n_q != self.n_k:
            raise ValueError(f"index was built for a whole prompt of {self.n_k}, got n_q = {n_q}")


def room_for_pieces(n_offsets: int, n_k: int) -> int:
    """The most pieces that the bands of so many slashes of a prompt can need."""
    return min(n_offsets * (TILE // PIECE + 1), max(-(-n_k // PIECE), TILE // PIECE))


Index = BandIndex | BlockIndex | PartedIndex
"""Any index type; all tell their heads, mask, visible pairs and density."""


def causal_pairs(n_q: int, n_k: int) -> int:
    """Number of (query, key) pairs a dense causal prefill computes."""
    return n_q * (n_k - n_q) + n_q * (n_q + 1) // 2


def _check_lengths(n_q: int, n_k: int, built_for: int) -> None:
    if n_k != built_for:
        raise ValueError(f"index was built for n_k = {built_for}, got {n_k}")
    if not 1 <= n_q <= n_k:
        raise ValueError(f"n_q must be between 1 and n_k = {n_k}, got {n_q}")


def _first_rows(n_q: int, n_k: int, device: torch.device) -> Tensor:
    """First absolute row of each query tile."""
    return torch.arange(n_k - n_q, n_k, TILE, device=device)


def _leading_rows(whole: Tensor, n_q: int) -> Tensor:
    """Rows of the query tiles ``[B, H, M]`` that are whole without a gap, int64 ``[B, H]``."""
    return (whole.long().cumprod(-1).sum(-1) * TILE).clamp(max=n_q)


def _membership(positions: Tensor, n: int) -> Tensor:
    """Bool ``[..., n]`` that is true at the listed positions; those >= n are padding."""
    member = torch.zeros(*positions.shape[:-1], n + 1, dtype=torch.bool, device=positions.device)
    member.scatter_(-1, positions.long().clamp(max=n), True)
    return member[..., :-1]
