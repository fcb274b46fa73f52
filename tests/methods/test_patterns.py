"""Head patterns refuse sizes that mean nothing."""

from typing import Any

import pytest

from minference_green.errors import UsageError
from minference_green.methods.patterns import AShape, BlockSparse, Probed, VerticalSlash


def test_defaults_are_minferences() -> None:
    assert VerticalSlash() == VerticalSlash(1000, 6096)
    assert AShape() == AShape(128, 3968)
    assert BlockSparse() == BlockSparse(100)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (
            lambda: VerticalSlash(-1, 0),
            "vertical_size must be a whole number of at least 0, got -1",
        ),
        (lambda: VerticalSlash(0, 1.5), "slash_size must be a whole number of at least 0, got 1.5"),
        (lambda: VerticalSlash(True, 0), "vertical_size must be .* got True"),
        (lambda: AShape(0, 0), "n_local must be at least 1, so that a token sees itself, got 0"),
        (lambda: AShape("4", 1), "n_init must be .* got '4'"),
        (lambda: BlockSparse(0), "top_k must be a whole number of at least 1, got 0"),
        (lambda: Probed(0), "top_k must be a whole number of at least 1, got 0"),
        (lambda: Probed(1, 0), "rows must be a whole number of at least 1, got 0"),
        (lambda: Probed(1, 65), "rows must be at most 64, a tile, got 65"),
    ],
)
def test_a_size_that_is_no_size_is_refused_by_name(make: Any, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        make()


def test_the_least_sizes_are_accepted() -> None:
    assert VerticalSlash(0, 0).slash_size == AShape(0, 1).n_init == 0
    assert BlockSparse(1).top_k == 1
