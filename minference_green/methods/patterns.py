"""Head patterns: what one attention head computes, as MInference names it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class VerticalSlash:
    """The columns and diagonals that carry most of the last rows' attention."""

    vertical_size: int = 1000
    slash_size: int = 6096


@dataclass(frozen=True)
class AShape:
    """The first ``n_init`` keys and a local window of ``n_local`` (StreamingLLM)."""

    n_init: int = 128
    n_local: int = 3968


@dataclass(frozen=True)
class BlockSparse:
    """The ``top_k`` key blocks per query block by mean-pooled score."""

    top_k: int = 100


HeadPattern = VerticalSlash | AShape | BlockSparse

Patterns = tuple[tuple[HeadPattern, ...], ...]
"""One pattern per layer and query head."""
