"""Position ids that jump, so that a short row teaches a long range.

Trained at its own length only, a model with rotary positions retrieves nothing at twice it. Rows
whose positions leap forward show the rotation of far distances without their tokens.
"""

import torch
from torch import Tensor

LONGEST = 2_000_000
MOST_JUMPS = 15
PLAIN = 0.25
"""Share of rows without a jump."""


def jumping_positions(
    rows: int, length: int, generator: torch.Generator, far: float = 0.0
) -> Tensor:
    """Increasing position ids, int64 ``[rows, length]``.

    1 to ``MOST_JUMPS`` leaps a row at random places, their sum log-uniform up to
    ``LONGEST``; a quarter of the rows has none. In a share ``far`` of the rows the sum is
    uniform instead, since few of the log-uniform reach the last half.
    """
    plain, total, count = torch.rand(3, rows, 1, generator=generator)
    taken = torch.arange(MOST_JUMPS) < 1 + (count * MOST_JUMPS).long()
    share = torch.rand(rows, MOST_JUMPS, generator=generator) * taken * (plain >= PLAIN)
    room = max(1, LONGEST - length)
    leap = room**total
    if far:
        leap = leap.where(torch.rand(rows, 1, generator=generator) >= far, room * total)
    leaps = share / share.sum(1, keepdim=True).clamp(min=1e-9) * leap
    places = torch.randint(min(1, length - 1), length, (rows, MOST_JUMPS), generator=generator)
    steps = torch.ones(rows, length, dtype=torch.int64).scatter_add_(1, places, leaps.long())
    steps[:, 0] = 0
    return steps.cumsum(1)
