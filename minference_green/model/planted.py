"""What the planted models attend to: shapes, heads, and the pattern file each carries.

A planted model has the stock class and shape of a published one and invented weights. Its
attention has the structure that sparse methods exploit, so that density and speed measured on
it mean something without a download. Its text does not.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import count
from types import MappingProxyType
from typing import Literal

from transformers import LlamaConfig, Qwen2Config

from minference_green.methods.patterns import (
    AShape,
    BlockSparse,
    HeadPattern,
    Patterns,
    VerticalSlash,
)

Config = LlamaConfig | Qwen2Config

Marks = Literal["common", "rare"]

MARK_EVERY: Mapping[Marks, int] = MappingProxyType({"common": 64, "rare": 2048})
"""One token number in this many carries the mark; a rare token carries both."""

MARK_REMAINDER = 7
"""Token ``t`` carries a mark if ``t % MARK_EVERY[mark]`` is this."""

_GOLDEN = (math.sqrt(5) - 1) / 2
_SILVER = math.sqrt(2) - 1


@dataclass(frozen=True)
class PlantedHead:
    """What one query head attends to, beside the first token, and the pattern that serves it."""

    pattern: HeadPattern
    offsets: tuple[int, ...] = (0,)
    """Distances of its peaks; 0 is local decay."""
    columns: Marks | None = None
    """Marked tokens it attends to from everywhere."""
    by_topic: bool = False
    """It attends where the running mean of the tokens' topics resembles its own."""


@dataclass(frozen=True)
class Shape:
    """A planted model: the configuration of its stock class and the heads planted in it."""

    config: Config
    heads: tuple[tuple[PlantedHead, ...], ...]
    """One entry per layer and query head."""

    @property
    def patterns(self) -> Patterns:
        """The pattern file the model carries."""
        return tuple(tuple(head.pattern for head in layer) for layer in self.heads)


@dataclass(frozen=True)
class _Kind:
    """One kind of vertical-slash head and its share of all heads."""

    share: float
    vertical_size: int
    slash_size: int
    columns: Marks | None
    slash: bool = field(kw_only=True, default=True)


_PUBLISHED_MIX = (
    _Kind(0.46, 1000, 6096, "rare"),
    _Kind(0.27, 30, 800, None),
    _Kind(0.15, 100, 800, "rare"),
    _Kind(0.09, 3500, 100, "common", slash=False),
    _Kind(0.03, 500, 700, "rare"),
)
"""Budgets and shares of MInference's pattern file for Llama-3-8B-Instruct-262k."""

_TINY_MIX = (
    _Kind(0.46, 64, 192, "rare"),
    _Kind(0.27, 30, 160, None),
    _Kind(0.15, 50, 160, "rare"),
    _Kind(0.09, 300, 100, "common", slash=False),
    _Kind(0.03, 60, 140, "rare"),
)
"""The same shares with budgets for prompts of a few thousand tokens."""


def llama_3_8b() -> Shape:
    """Llama-3-8B as Gradient published it for 1,048,576 tokens."""
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=1048576,
        rope_parameters={"rope_type": "default", "rope_theta": 3580165449.0},
        attention_bias=True,
        bos_token_id=128000,
        eos_token_id=128001,
        tie_word_embeddings=False,
    )
    return Shape(config, _mixed(config, _PUBLISHED_MIX, (512, 32768), {}))


def qwen2_5_7b() -> Shape:
    """Qwen2.5-7B; the mix of heads is Llama-3-8B's, since none is published for it."""
    config = Qwen2Config(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        max_position_embeddings=131072,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        bos_token_id=151643,
        eos_token_id=151643,
        tie_word_embeddings=False,
        use_sliding_window=False,
    )
    return Shape(config, _mixed(config, _PUBLISHED_MIX, (512, 32768), {}))


def tiny() -> Shape:
    """A CPU-sized Llama with every pattern: A-shape and block heads beside the mix."""
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=131072,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        attention_bias=True,
        bos_token_id=4095,
        eos_token_id=4095,
        tie_word_embeddings=False,
    )
    wide = PlantedHead(AShape(n_init=16, n_local=512))
    local = PlantedHead(AShape(n_init=16, n_local=256))
    topic = PlantedHead(BlockSparse(top_k=8), offsets=(), by_topic=True)
    special = {(0, 0): wide, (1, 0): topic, (2, 0): topic, (2, 4): local}
    return Shape(config, _mixed(config, _TINY_MIX, (200, 3000), special))


SHAPES = MappingProxyType({"llama-3-8b": llama_3_8b, "qwen2.5-7b": qwen2_5_7b, "tiny": tiny})
"""Planted shapes by the name after ``planted:``."""


def _mixed(
    config: Config,
    mix: tuple[_Kind, ...],
    offsets: tuple[int, int],
    special: Mapping[tuple[int, int], PlantedHead],
) -> tuple[tuple[PlantedHead, ...], ...]:
    """Heads of every layer: kinds in their shares, slashes even in the logarithm of distance.

    Multiples of an irrational number spread evenly, so that shares hold in every stretch of
    layers and no random generator is part of the recipe.
    """
    numbers = count()
    return tuple(
        tuple(
            special.get((layer, head)) or _head(mix, offsets, next(numbers))
            for head in range(config.num_attention_heads)
        )
        for layer in range(config.num_hidden_layers)
    )


def _head(mix: tuple[_Kind, ...], offsets: tuple[int, int], number: int) -> PlantedHead:
    place = number * _GOLDEN % 1
    below = 0.0
    for kind in mix:
        below += kind.share
        if place < below:
            break
    near, far = offsets
    slash = round(near * (far / near) ** (number * _SILVER % 1))
    return PlantedHead(
        VerticalSlash(kind.vertical_size, kind.slash_size),
        offsets=(0, slash) if kind.slash else (0,),
        columns=kind.columns,
    )
