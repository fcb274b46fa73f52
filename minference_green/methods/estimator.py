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

    Of ``rows`` rows the ``last`` are the prompt's last ones, the others lie in the middles of
    equal shares of the rest.

    ``skip_forced`` counts no mass on the diagonals that are always kept for columns, nor on
    the columns that are always kept for slashes. ``normalise`` is ``raw`` for sums of mass, or
    ``tile`` for sums over the number of rows that could add to them, at least 8: the first
    prefers what keeps most mass per chosen entry, the second per computed tile.
    """

    rows: int = TILE
    last: int = TILE
    normalise: str = "raw"
    skip_forced: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.rows <= TILE:
            raise UsageError(f"rows must be between 1 and {TILE}, got {self.rows}")
        if not 1 <= self.last <= self.rows:
            raise UsageError(f"last must be between 1 and rows = {self.rows}, got {self.last}")
        if self.normalise not in NORMALISE:
            raise UsageError(
                f"normalise must be one of {', '.join(NORMALISE)}, got {self.normalise!r}"
            )

    @property
    def skips(self) -> dict[str, int]:
        """What is not counted, as keyword arguments of the kernels."""
        offsets, columns = (FORCED_OFFSETS, FORCED_COLUMNS) if self.skip_forced else (0, 0)
        return {"skip_offsets": offsets, "skip_columns": columns}

    def rows_of(self, n: int) -> list[int]:
        """The ascending rows that speak for a prompt of ``n``; all of a shorter one."""
        if n <= self.rows:
            return list(range(n))
        count, rest = self.rows - self.last, n - self.last
        middles = [(2 * r + 1) * rest // (2 * count) for r in range(count)]
        return [*middles, *range(rest, n)]

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
