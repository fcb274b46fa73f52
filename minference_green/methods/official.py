"""Pattern files: a JSON list of layers, each ``{head: [pattern, a, b, score]}``.

MInference's format, and one pattern more of our own.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minference_green.errors import UsageError
from minference_green.methods.patterns import (
    AShape,
    BlockSparse,
    HeadPattern,
    Patterns,
    Probed,
    VerticalSlash,
)

_FIXED_TOP_K = 100
"""The format has no place for a block-sparse head's budget; MInference always takes 100."""


@dataclass(frozen=True)
class PatternFile:
    """What a pattern file says: per layer and query head the pattern and its search score."""

    patterns: Patterns
    scores: tuple[tuple[float, ...], ...]


def read_patterns(path: Path) -> PatternFile:
    """Read a pattern file of MInference (``*_best_pattern*.json``), or one with probed heads.

    Patterns are ``vertical_and_slash`` (vertical, slash), ``stream_llm`` (n_init, n_local),
    ``block_sparse`` (both sizes unused, 100 blocks), and ``probed`` (top_k, rows), which
    MInference does not know. Raises ``UsageError`` naming the file,
    the layer, the head and what is wrong.
    """
    try:
        layers = json.loads(path.read_bytes(), object_pairs_hook=_unrepeated)
    except OSError as error:
        raise UsageError(f"cannot read pattern file {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"pattern file {path} is not JSON: {error}") from error
    if not isinstance(layers, list) or not layers:
        raise UsageError(f"pattern file {path} must hold a list with one object per layer")
    parsed = [_read_layer(entry, f"{path}: layer {n}") for n, entry in enumerate(layers)]
    for n, layer in enumerate(parsed):
        if len(layer) != len(parsed[0]):
            raise UsageError(
                f"{path}: layer {n} has {len(layer)} heads, layer 0 has {len(parsed[0])}"
            )
    return PatternFile(
        patterns=tuple(tuple(pattern for pattern, _ in layer) for layer in parsed),
        scores=tuple(tuple(score for _, score in layer) for layer in parsed),
    )


def write_patterns(path: Path, file: PatternFile) -> None:
    """Write a pattern file that :func:`read_patterns` reads, and MInference if none is probed.

    Raises ``UsageError`` for a block-sparse head whose budget is not the format's 100, or if
    the file cannot be written.
    """
    layers = [
        {
            str(head): [*_official(pattern, f"layer {n}, head {head}"), score]
            for head, (pattern, score) in enumerate(zip(patterns, scores, strict=True))
        }
        for n, (patterns, scores) in enumerate(zip(file.patterns, file.scores, strict=True))
    ]
    try:
        path.write_text(json.dumps(layers, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write pattern file {path}: {error.strerror}") from error


def check_shape(patterns: Patterns, *, n_layers: int, n_heads: int, source: str) -> None:
    """Raise ``UsageError`` unless ``patterns`` from ``source`` fit a model's layers and heads."""
    found = (len(patterns), len(patterns[0]))
    if found != (n_layers, n_heads):
        raise UsageError(
            f"{source} is for {found[0]} layers of {found[1]} heads, the model has {n_layers} "
            f"layers of {n_heads} query heads; use the file made for this model"
        )


def _read_layer(entry: Any, where: str) -> list[tuple[HeadPattern, float]]:
    if not isinstance(entry, dict) or not entry:
        raise UsageError(f"{where} must be an object with one entry per head")
    expected = {str(head) for head in range(len(entry))}
    if entry.keys() != expected:
        wrong = sorted(entry.keys() - expected)[0]
        raise UsageError(
            f"{where} must name its heads 0 to {len(entry) - 1}, each once, but has {wrong!r}"
        )
    return [_read_head(entry[str(h)], f"{where}, head {h}") for h in range(len(entry))]


def _read_head(entry: Any, where: str) -> tuple[HeadPattern, float]:
    if not isinstance(entry, list) or len(entry) != 4:
        raise UsageError(f"{where} must be [pattern, size, size, score], got {entry!r}")
    kind, a, b, score = entry
    if isinstance(score, bool) or not isinstance(score, int | float):
        raise UsageError(f"{where}: the score must be a number, got {score!r}")
    try:
        match kind:
            case "vertical_and_slash":
                return VerticalSlash(a, b), score
            case "stream_llm":
                return AShape(a, b), score
            case "block_sparse":
                return BlockSparse(_FIXED_TOP_K), score
            case "probed":
                return Probed(a, b), score
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from error
    raise UsageError(
        f"{where}: pattern {kind!r} is not one of vertical_and_slash, stream_llm, block_sparse, "
        "probed"
    )


def _official(pattern: HeadPattern, where: str) -> tuple[str, int, int]:
    match pattern:
        case VerticalSlash(vertical_size, slash_size):
            return "vertical_and_slash", vertical_size, slash_size
        case AShape(n_init, n_local):
            return "stream_llm", n_init, n_local
        case BlockSparse(top_k):
            if top_k != _FIXED_TOP_K:
                raise UsageError(
                    f"{where}: a pattern file of MInference cannot hold top_k = {top_k}; "
                    f"its block-sparse heads always take {_FIXED_TOP_K} blocks"
                )
            return "block_sparse", top_k, 0
        case Probed(top_k, rows):
            return "probed", top_k, rows


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys occur once; JSON itself would silently keep the last."""
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {repeated!r} occurs twice in one object")
    return found
