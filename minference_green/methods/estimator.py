"""Which query rows choose a head's columns and slashes, and how their masses are added up."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minference_green.errors import UsageError
from minference_green.kernels.index import TILE
from minference_green.kernels.selection import FORCED_COLUMNS, FORCED_OFFSETS, to_device

_LEAST_ROWS = 8
"""Masses are averaged over at least so many rows: a few rows alone must not win with one entry."""

NORMALISE = ("raw", "tile")


@dataclass(frozen=True)
class Estimator:
    """Where vertical-slash scores come from; as it stands, the prompt's last 64 rows.

    Of each of ``segments`` equal parts of the prompt it takes ``rows`` rows: the part's
    ``last`` ones, the others from the middles of equal shares of the rest. A part has its own
    index, of the same budgets, over the keys up to its end: with s of them the rows are s times
    as many and speak for their own part, and estimating costs (s + 1) / 2 times as much.

    ``skip_forced`` counts no mass on the diagonals that are always kept for columns, nor on
    the columns that are always kept for slashes. ``normalise`` is ``raw`` for sums of mass, or
    ``tile`` for sums over the number of rows that could add to them, at least 8: the first
    prefers what keeps most mass per chosen entry, the second per computed tile.
    """

    rows: int = TILE
    last: int = TILE
    segments: int = 1
    normalise: str = "raw"
    skip_forced: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.rows <= TILE:
            raise UsageError(f"rows must be between 1 and {TILE}, got {self.rows}")
        if not 1 <= self.last <= self.rows:
            raise UsageError(f"last must be between 1 and rows = {self.rows}, got {self.last}")
        if self.segments < 1:
            raise UsageError(f"segments must be at least 1, got {self.segments}")
        if self.normalise not in NORMALISE:
            raise UsageError(
                f"normalise must be one of {', '.join(NORMALISE)}, got {self.normalise!r}"
            )

    @property
    def skips(self) -> dict[str, int]:
        """What is not counted, as keyword arguments of the kernels."""
        offsets, columns = (FORCED_OFFSETS, FORCED_COLUMNS) if self.skip_forced else (0, 0)
        return {"skip_offsets": offsets, "skip_columns": columns}

    def parts(self, n: int) -> list[tuple[int, int]]:
        """First row of each part of a prompt of ``n``, and the row after its last.

        Parts are of whole tiles; a prompt of fewer tiles than segments has a part for each.
        """
        tiles = -(-n // TILE)
        parts = min(self.segments, tiles)
        bounds = [tiles * part // parts * TILE for part in range(parts)]
        return list(zip(bounds, [*bounds[1:], n], strict=True))

    def rows_of(self, begin: int, end: int) -> list[int]:
        """The ascending rows that speak for those from ``begin`` to before ``end``."""
        if end - begin <= self.rows:
            return list(range(begin, end))
        count, rest = self.rows - self.last, end - begin - self.last
        middles = [begin + (2 * r + 1) * rest // (2 * count) for r in range(count)]
        return [*middles, *range(end - self.last, end)]

    def weigh(self, columns: Tensor, slashes: Tensor, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Scores to choose by, from the rows' sums of mass, both ``[B, H, n_k]``."""
        if self.normalise == "raw":
            return columns, slashes
        # A row can add to column j from distance skip_offsets on: it is j + skip_offsets or later.
        reach = torch.arange(columns.shape[2], dtype=torch.int32, device=columns.device)
        listed = to_device(rows, columns.device)

        def possible(skipped: int) -> Tensor:
            return (len(rows) - torch.searchsorted(listed, reach + skipped)).clamp(min=_LEAST_ROWS)

        skips = self.skips
        return (
            columns / possible(skips["skip_offsets"]),
            slashes / possible(skips["skip_columns"]),
        )


LAST_ROWS = Estimator()
"""MInference's: the prompt's last 64 rows, all of their mass."""
