"""Head patterns: what one attention head computes, as MInference names it."""

from dataclasses import asdict, dataclass

from minference_green.errors import UsageError


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


HeadPattern = VerticalSlash | AShape | BlockSparse

Patterns = tuple[tuple[HeadPattern, ...], ...]
"""One pattern per layer and query head."""


def _check_sizes(pattern: HeadPattern, *, least: int) -> None:
    """Raise ``UsageError`` naming the first size that is not a whole number of tokens."""
    for name, value in asdict(pattern).items():
        if type(value) is not int or value < least:
            raise UsageError(f"{name} must be a whole number of at least {least}, got {value!r}")
