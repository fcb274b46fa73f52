"""MInference's pattern files: read, written, and refused with the place that is wrong."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from minference_green.errors import UsageError
from minference_green.methods.official import (
    PatternFile,
    check_shape,
    read_patterns,
    write_patterns,
)
from minference_green.methods.patterns import AShape, BlockSparse, Probed, VerticalSlash

LAYERS: list[dict[str, list[Any]]] = [
    {
        "0": ["vertical_and_slash", 1000, 6096, 0.3332791030406952],
        "1": ["stream_llm", 128, 3968, 1.0],
    },
    {
        "0": ["block_sparse", 100, 0, 0.1 + 0.2],
        "1": ["vertical_and_slash", 22032, 18532, 0],
    },
]


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def to_file(content: Any) -> Path:
        path = tmp_path / "best_pattern.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return to_file


def test_every_pattern_of_the_format_is_read(write: Any) -> None:
    file = read_patterns(write(LAYERS))
    assert file.patterns == (
        (VerticalSlash(1000, 6096), AShape(128, 3968)),
        (BlockSparse(100), VerticalSlash(22032, 18532)),
    )
    assert file.scores == ((0.3332791030406952, 1.0), (0.1 + 0.2, 0))


def test_the_sizes_of_a_block_sparse_head_are_ignored_as_minference_does(write: Any) -> None:
    assert read_patterns(write([{"0": ["block_sparse", 1000, 1, 0.5]}])).patterns == (
        (BlockSparse(100),),
    )


def test_a_file_goes_round_exactly(write: Any, tmp_path: Path) -> None:
    file = read_patterns(write(LAYERS))
    again = tmp_path / "again.json"
    write_patterns(again, file)
    assert read_patterns(again) == file
    assert json.loads(again.read_text()) == LAYERS


def test_a_file_with_probed_heads_goes_round_too(write: Any, tmp_path: Path) -> None:
    layers = [{"0": ["probed", 8, 4, 0.25], "1": ["stream_llm", 64, 128, 0]}]
    file = read_patterns(write(layers))
    assert file.patterns == ((Probed(8, 4), AShape(64, 128)),)
    again = tmp_path / "again.json"
    write_patterns(again, file)
    assert json.loads(again.read_text()) == layers


def test_heads_may_stand_in_any_order(write: Any) -> None:
    backwards = [dict(reversed(layer.items())) for layer in LAYERS]
    assert read_patterns(write(backwards)) == read_patterns(write(LAYERS))


def with_head(entry: Any) -> list[Any]:
    """Two good layers, of which layer 1, head 1 is replaced."""
    return [LAYERS[0], {**LAYERS[1], "1": entry}]


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("[{", "is not JSON"),
        ('[{"0": ["stream_llm", 1, 2, 0.5], "0": ["stream_llm", 1, 2, 0.5]}]', "'0' occurs twice"),
        ("[" * 100_000, "is not JSON"),
        ({}, "must hold a list with one object per layer"),
        ([], "must hold a list with one object per layer"),
        ([LAYERS[0], []], "layer 1 must be an object with one entry per head"),
        ([LAYERS[0], {}], "layer 1 must be an object with one entry per head"),
        ([LAYERS[0], {"0": LAYERS[0]["0"]}], "layer 1 has 1 heads, layer 0 has 2"),
        ([{"0": LAYERS[0]["0"], "2": LAYERS[0]["1"]}], "layer 0 must name its heads 0 to 1"),
        ([{"0": LAYERS[0]["0"], "01": LAYERS[0]["1"]}], "but has '01'"),
        (with_head("dense"), "layer 1, head 1 must be [pattern, size, size, score], got 'dense'"),
        (with_head(["stream_llm", 1, 2]), "layer 1, head 1 must be [pattern, size, size, score]"),
        (
            with_head(["flex_vertical_and_slash", 1, 2, 0.5]),
            "layer 1, head 1: pattern 'flex_vertical_and_slash' is not one of vertical_and_slash",
        ),
        (
            with_head(["vertical_and_slash", -3, 2, 0.5]),
            "layer 1, head 1: vertical_size must be a whole number of at least 0, got -3",
        ),
        (
            with_head(["vertical_and_slash", 3, 2.0, 0.5]),
            "layer 1, head 1: slash_size must be a whole number of at least 0, got 2.0",
        ),
        (with_head(["stream_llm", 1, 0, 0.5]), "layer 1, head 1: n_local must be at least 1"),
        (with_head(["stream_llm", 1, 2, "0.5"]), "head 1: the score must be a number, got '0.5'"),
        (with_head(["stream_llm", 1, 2, True]), "head 1: the score must be a number, got True"),
        (with_head(["stream_llm", 1, 2, None]), "head 1: the score must be a number, got None"),
    ],
)
def test_a_malformed_file_is_refused_with_file_place_and_reason(
    content: Any, what: str, write: Any
) -> None:
    path = write(content)
    with pytest.raises(UsageError, match=re.escape(what)) as caught:
        read_patterns(path)
    assert str(path) in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    missing = tmp_path / "missing.json"
    with pytest.raises(UsageError, match=r"cannot read pattern file .*missing\.json: No such file"):
        read_patterns(missing)
    with pytest.raises(UsageError, match=r"cannot write pattern file .*patterns\.json: No such"):
        write_patterns(missing / "patterns.json", PatternFile(((AShape(),),), ((1.0,),)))


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "binary.json"
    path.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(UsageError, match="is not JSON"):
        read_patterns(path)


def test_a_budget_the_format_cannot_hold_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "patterns.json"
    with pytest.raises(UsageError, match=r"layer 0, head 1: .* cannot hold top_k = 50"):
        write_patterns(path, PatternFile(((AShape(), BlockSparse(50)),), ((1.0, 1.0),)))
    assert not path.exists()


def test_patterns_must_fit_the_model() -> None:
    patterns = ((AShape(),) * 4,) * 2
    check_shape(patterns, n_layers=2, n_heads=4, source="a.json")
    for layers, heads in ((3, 4), (2, 8)):
        with pytest.raises(UsageError, match=r"a\.json is for 2 layers of 4 heads, the model has"):
            check_shape(patterns, n_layers=layers, n_heads=heads, source="a.json")
