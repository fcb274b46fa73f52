"""Head patterns: what one attention head computes; all but ``Probed`` are MInference's."""

from dataclasses import asdict, dataclass

from minference_green.errors import UsageError
from minference_green.kernels.index import TILE


@dataclass(frozen=True)
class VerticalSlash:
    """The columns and diagonals that carry most of the last rows' attention."""

    vertical_size: int = 1000
    slash_size: int = 6096

    def __post_init__(self) -> None:
        _check_sizes(self, least=0)


@dataclass(frozen=True)
class AShape:
    """The first ``n_init`` keys and a local window of ``n_local`` (StreamingLLM)."""

    n_init: int = 128
    n_local: int = 3968

    def __post_init__(self) -> None:
        _check_sizes(self, least=0)
        if self.n_local == 0:
            raise UsageError("n_local must be at least 1, so that a token sees itself, got 0")


@dataclass(frozen=True)
class BlockSparse:
    """The ``top_k`` key blocks per query block by mean-pooled score."""

    top_k: int = 100

    def __post_init__(self) -> None:
        _check_sizes(self, least=1)


@dataclass(frozen=True)
class Probed:
    """The ``top_k`` key tiles per query tile that one of ``rows`` of its rows attends to most.

    The rows are spread evenly over the query tile and see every key before them; each rates a
    key tile by the largest logit it has there. That is rows / 64 of the head's dense products of
    queries and keys, which a GPU takes in 8 bits, twice as fast.
    """

    top_k: int = 16
    rows: int = 8

    def __post_init__(self) -> None:
        _check_sizes(self, least=1)
        if self.rows > TILE:
            raise UsageError(f"rows must be at most {TILE}, a tile, got {self.rows}")


HeadPattern = VerticalSlash | AShape | BlockSparse | Probed

Patterns = tuple[tuple[HeadPattern, ...], ...]
"""One pattern per layer and query head."""


def _check_sizes(pattern: HeadPattern, *, least: int) -> None:
    """Raise ``UsageError`` naming the first size that is not a whole number of tokens."""
    for name, value in asdict(pattern).items():
        if type(value) is not int or value < least:
            raise UsageError(f"{name} must be a whole number of at least {least}, got {value!r}")
