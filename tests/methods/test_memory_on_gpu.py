"""What a layer of a million tokens and 32 heads holds beside its queries, keys and values."""

from collections.abc import Callable

import pytest
import torch

from minference_green.methods.estimator import LAST_ROWS, Estimator
from minference_green.methods.method import Parts
from minference_green.methods.patterns import HeadPattern, VerticalSlash
from minference_green.methods.sparse import SparsePrefill

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

TOKENS, HEADS, KV_HEADS, HEAD_DIM = 2**20, 32, 8, 128

# The shares of the published pattern file of Llama-3-8B.
SHARES = {(1000, 6096): 15, (30, 800): 9, (100, 800): 4, (3500, 100): 3, (500, 700): 1}
MIX = tuple(VerticalSlash(*sizes) for sizes, heads in SHARES.items() for _ in range(heads))

ESTIMATORS = {
    "last rows": LAST_ROWS,
    "spread": Estimator(rows=64, last=8, skip_forced=True),
}

Layer = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@pytest.fixture(scope="module")
def layer() -> Layer:
    g = torch.Generator("cuda").manual_seed(0)

    def draw(heads: int) -> torch.Tensor:
        # As a model lays them out.
        shape = 1, TOKENS, heads, HEAD_DIM
        x = torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_(generator=g)
        return x.transpose(1, 2)

    return draw(HEADS), draw(KV_HEADS), draw(KV_HEADS)


def steps(
    layer: Layer, patterns: HeadPattern | tuple[HeadPattern, ...], estimator: Estimator
) -> Parts:
    given = (patterns,) if isinstance(patterns, tuple) else patterns
    method = SparsePrefill("method", given, {}, estimator)
    return method.parts(*layer, scale=HEAD_DIM**-0.5, layer=0)


def held(step: Callable[[], object]) -> tuple[int, int]:
    """Bytes that a step holds at most, and that its result keeps."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    kept = torch.cuda.memory_allocated() - before
    del result
    return peak, kept


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_estimating_holds_at_most_300_mb(estimator: str, layer: Layer) -> None:
    peak, kept = held(steps(layer, MIX, ESTIMATORS[estimator])["estimate"])
    # Both results are a number a key and head.
    assert 2 * 4 * TOKENS * HEADS <= kept <= peak <= 300e6


@pytest.mark.parametrize(
    "patterns",
    [VerticalSlash(1000, 6096), VerticalSlash(30, 800), VerticalSlash(3500, 100), MIX],
    ids=["1000-6096", "30-800", "3500-100", "published mix"],
)
def test_an_index_keeps_at_most_64_mb(
    patterns: HeadPattern | tuple[HeadPattern, ...], layer: Layer
) -> None:
    _, kept = held(steps(layer, patterns, LAST_ROWS)["index"])
    columns = patterns.vertical_size if isinstance(patterns, VerticalSlash) else 3500
    assert 4 * HEADS * columns <= kept <= 64e6
