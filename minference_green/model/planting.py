"""How planted structure becomes weights: true projections, biases and RoPE, nothing else.

Position: query and key biases make every head peak at its own distances; see ``peaks``. The key
bias is the same for all heads of a group, query biases are per head.

Content, where position cannot help: the embedding sets a few reserved dimensions (first token,
two marks, topics) that no layer writes. ``k_proj`` carries them to the slowest rotary pairs,
which hardly turn within the longest prompt, and a query bias there says how much a head cares.
Marked keys lose the bias of position, so that they weigh the same from any distance. In a
shape with topic heads, the first head averages the topics of a token's neighbours, and topic
heads of later layers compare that mean: neighbours share it, so it comes in blocks.

What attention gathers: values are random projections of the embedding's content, and each head
adds the same mean square to the residual, in dimensions that values do not read. Missing some
of it changes the logits in proportion. Queries and keys also carry a little random content
(noise). A large constant dimension keeps the residual's rms, and with it every planted logit,
nearly the same in all layers.

Measured (float32, seed 0) on 48 heads of ``llama-3-8b``, 32 at the longest prompt, in a model
narrowed to 512: weighted by the shares of their budgets they have a density of 0.54 at 8,192
tokens, 0.17 at 32,768 and 0.055 at 131,072, and each budget keeps at least 0.94 of its head's
mass in the last 64 rows. ``tiny`` has a density of 0.158 at 4,096 and 0.089 at 8,192, and its
last logits differ from dense by 3.3 % and 4.3 %.

Limits: distance matters more than content in all but topic heads; a head has at most two peaks
and one strength of columns; layers hand nothing on to later values, so that errors add up but
do not compound; the language is random and predicts nothing.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from minference_green.methods.patterns import AShape, VerticalSlash
from minference_green.model.peaks import PEAK, SLOW_PAIRS, peak, query_bias
from minference_green.model.planted import (
    MARK_EVERY,
    MARK_REMAINDER,
    Config,
    Marks,
    PlantedHead,
    Shape,
)

RECIPE = "planted-1"
"""Version of the weights; a change that moves any of them changes it."""

# Width of a peak over the head's budget of distances, and spread of the bell over log theta:
# a narrow bell has a flat top, a wide one a sharp tip and less ripple far away.
_SLASH_WIDTH, _SLASH_SPREAD = 0.3, 1.2
_WINDOW_WIDTH, _WINDOW_SPREAD = 1.0, 0.8
_FIRST_SHARE = 0.3  # mass of the first token over the mass of all peaks
# Logit of a rare column above a peak's. No recent key is at a peak for all rows, so that already
# 0 would outrank them; the rest is for tokens whose residual is larger than foreseen.
_RARE_COLUMN = 0.5
_COLUMN_PROMPT = 8192  # tokens of the prompt whose common columns weigh as much as local decay
_TOPIC_PREFERENCE = 5.0  # logit per unit of the topic a head looks for
_TOPIC_GAIN = 0.7  # logit per unit of the two topics' inner product
_TOPIC_SINK = 14.0
_TOPIC_PARTICIPATION = 0.008  # as found at 8,192 tokens

_KEY_BIAS = 6.0  # per fast pair, so that query biases are of the same size
_KEY_MARK = 12.0  # of a marked key on its slow pair
_NOISE = 0.05  # rms of the random part of queries and keys

# Mean squares over the hidden size: the embedding's content, and what all layers add.
_CONTENT = 0.2
_FROM_ATTENTION = 0.2
_FROM_MLP = 0.1
_LOGIT_RMS = 3.0
_SILU_MEAN_SQUARE = 0.355  # of silu(g) u for standard normal g and u

# Hidden dimensions the embedding sets; only the topic means are written by a layer.
_CONSTANT, _FIRST, _COMMON, _RARE = range(4)
_TOPICS = slice(4, 8)
_TOPIC_MEANS = slice(8, 12)
_RESERVED = 16
_MARK = 4.0
_MARK_DIM = {"common": _COMMON, "rare": _RARE}

# Pairs of rotary dimensions counted from the slowest.
_FIRST_PAIR = 1
_MARK_PAIR = {"common": 2, "rare": 3}
_TOPIC_PAIRS = (4, 5)


def plant(shape: Shape, *, device: torch.device, dtype: torch.dtype, seed: int) -> PreTrainedModel:
    """The model of ``shape`` with weights drawn on ``device``, in evaluation mode.

    ``seed`` draws the random part; the structure is the same for every seed. CPU and CUDA
    generators differ, so the random part is repeatable per kind of device. Memory beyond the
    weights is a few rows.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape.config, dtype=dtype)
    model.to_empty(device=device)
    # to_empty leaves buffers undefined, and this one is in no checkpoint.
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(shape.config).to(device)
    draw = torch.Generator(device=device).manual_seed(seed)
    with torch.no_grad():
        _embedding(model.model.embed_tokens.weight, shape, draw)
        for number, layer in enumerate(model.model.layers):
            _layer(layer, shape, number, draw)
        nn.init.ones_(model.model.norm.weight)
        end = _before(shape.config.num_hidden_layers, shape.config)
        _read(model.lm_head, _LOGIT_RMS, end, draw, also_written=True)
    planted: PreTrainedModel = model.eval()
    return planted


@dataclass(frozen=True)
class _Residual:
    """The residual stream before a layer, as its norm sees it.

    Reserved dimensions have mean square 1 over the hidden size, content ``_CONTENT``, and what
    layers have written so far ``written``.
    """

    hidden_size: int
    written: float

    @property
    def rms(self) -> float:
        return math.sqrt(1 + _CONTENT + self.written)

    @property
    def content_dims(self) -> slice:
        """The embedding's content, which no layer writes: what queries, keys and values read."""
        return slice(_RESERVED, self.hidden_size // 2)

    @property
    def written_dims(self) -> slice:
        """What layers write, and MLPs and the head read beside the content."""
        return slice(self.hidden_size // 2, self.hidden_size)


def _before(layer: int, config: Config) -> _Residual:
    """The residual before a layer: what layers write adds up evenly."""
    share = layer / config.num_hidden_layers
    return _Residual(config.hidden_size, share * (_FROM_ATTENTION + _FROM_MLP))


def _embedding(weight: Tensor, shape: Shape, draw: torch.Generator) -> None:
    """Content, marks, and a constant that brings the reserved mean square to exactly 1."""
    hidden_size, first = shape.config.hidden_size, shape.config.bos_token_id
    content = weight[:, _before(0, shape.config).content_dims]
    weight.zero_()
    content.normal_(0, math.sqrt(_CONTENT * hidden_size / content.shape[1]), generator=draw)
    weight[first] = 0  # its value is then zero: attention to it adds nothing
    reserved = torch.zeros(len(weight), _RESERVED, device=weight.device)
    token = torch.arange(len(weight), device=weight.device)
    for marks, every in MARK_EVERY.items():
        reserved[token % every == MARK_REMAINDER, _MARK_DIM[marks]] = _MARK
    if _has_topics(shape):
        reserved[:, _TOPICS].normal_(generator=draw)
    reserved[first] = 0
    reserved[first, _FIRST] = _MARK
    reserved[:, _CONSTANT] = (hidden_size - reserved.square().sum(-1)).sqrt()
    weight[:, :_RESERVED] = reserved


def _layer(layer: Any, shape: Shape, number: int, draw: torch.Generator) -> None:
    config = shape.config
    attention, mlp = layer.self_attn, layer.mlp
    seen = _before(number, config)
    heads = [_head(head, config) for head in shape.heads[number]]
    nn.init.ones_(layer.input_layernorm.weight)
    nn.init.ones_(layer.post_attention_layernorm.weight)

    _read(attention.q_proj, _NOISE, seen, draw)
    _read(attention.k_proj, _NOISE, seen, draw)
    _read(attention.v_proj, 1.0, seen, draw)
    _plant_keys(attention.k_proj, shape, seen)
    _plant_queries(attention.q_proj, heads, shape, seen)
    # Every head adds the same mean square, however widely it spreads its attention.
    each = _FROM_ATTENTION / config.num_hidden_layers / len(heads)
    _write(attention.o_proj, [each / head.participation for head in heads], seen, draw)
    if number == 0 and _has_topics(shape):
        _plant_topic_means(attention, heads[0], _head_dim(config), seen)

    seen = replace(seen, written=seen.written + _FROM_ATTENTION / config.num_hidden_layers)
    _read(mlp.gate_proj, 1.0, seen, draw, also_written=True)
    _read(mlp.up_proj, 1.0, seen, draw, also_written=True)
    _write(mlp.down_proj, [_FROM_MLP / config.num_hidden_layers / _SILU_MEAN_SQUARE], seen, draw)


def _read(
    linear: Any, rms: float, seen: _Residual, draw: torch.Generator, *, also_written: bool = False
) -> None:
    """Random weights that read content, or all but the reserved; each output has ``rms``."""
    mean_square = _CONTENT + (seen.written if also_written else 0.0)
    std = rms * seen.rms / math.sqrt(mean_square * seen.hidden_size)
    linear.weight.zero_()
    linear.weight[:, seen.content_dims].normal_(0, std, generator=draw)
    if also_written:
        linear.weight[:, seen.written_dims].normal_(0, std, generator=draw)
    if linear.bias is not None:
        linear.bias.zero_()


def _write(linear: Any, gains: list[float], seen: _Residual, draw: torch.Generator) -> None:
    """Random weights into the written dimensions.

    Per equal part of the inputs: the mean square it adds to the residual when its own is 1.
    """
    linear.weight.zero_()
    rows = linear.weight[seen.written_dims]
    for part, gain in zip(rows.chunk(len(gains), dim=1), gains, strict=True):
        std = math.sqrt(gain * seen.hidden_size / part.numel())
        part.normal_(0, std, generator=draw)
    if linear.bias is not None:
        linear.bias.zero_()


def _plant_keys(k_proj: Any, shape: Shape, seen: _Residual) -> None:
    """The same for every key head: a constant on fast pairs, marks and topics on slow ones."""
    config = shape.config
    pairs = _head_dim(config) // 2
    weight = k_proj.weight.view(config.num_key_value_heads, 2, pairs, -1)
    bias = k_proj.bias.view(config.num_key_value_heads, 2, pairs)
    weight[:, :, pairs - SLOW_PAIRS :] = 0
    bias[:, 0, : pairs - SLOW_PAIRS] = _KEY_BIAS
    # Marked keys are at no distance: without the ripple of far peaks they weigh as planned.
    # The first token has no content and attends to itself alone: its rms stays 1.
    weight[:, 0, : pairs - SLOW_PAIRS, _FIRST] = -_KEY_BIAS / _MARK
    weight[:, 0, pairs - _FIRST_PAIR, _FIRST] = _KEY_MARK / _MARK
    weight[:, 0, : pairs - SLOW_PAIRS, _COMMON] = -_KEY_BIAS / _MARK * seen.rms
    for marks, pair in _MARK_PAIR.items():
        weight[:, 0, pairs - pair, _MARK_DIM[marks]] = _KEY_MARK / _MARK * seen.rms
    if _has_topics(shape):
        for half, pair, dim in _topic_slots(pairs):
            weight[:, half, pair, dim] = seen.rms


def _plant_queries(q_proj: Any, heads: list["_Head"], shape: Shape, seen: _Residual) -> None:
    """Per head: where its peaks are, and how much it cares for marks and topics."""
    pairs = _head_dim(shape.config) // 2
    weight = q_proj.weight.view(len(heads), 2, pairs, -1)
    weight[:, :, pairs - SLOW_PAIRS :] = 0
    bias = torch.zeros(len(heads), 2, pairs, dtype=torch.float64)
    for number, head in enumerate(heads):
        bias[number] = head.peaks
        bias[number, 0, pairs - _FIRST_PAIR] = head.first / _KEY_MARK
        for marks, logit in head.columns.items():
            bias[number, 0, pairs - _MARK_PAIR[marks]] = logit / _KEY_MARK
        if head.by_topic:
            for half, pair, dim in _topic_slots(pairs):
                weight[number, half, pair, dim] = _TOPIC_GAIN * seen.rms
            half, pair, _ = _topic_slots(pairs)[0]
            bias[number, half, pair] = _TOPIC_PREFERENCE
    # Logits are divided by the square root of the head's width.
    bias *= math.sqrt(2 * pairs)
    weight[:, :, pairs - SLOW_PAIRS :] *= math.sqrt(2 * pairs)
    q_proj.bias.copy_(bias.flatten())


def _plant_topic_means(attention: Any, first: "_Head", head_dim: int, seen: _Residual) -> None:
    """The first head of layer 0 gathers its neighbours' topics and writes their mean."""
    n_topics = _TOPICS.stop - _TOPICS.start
    values = slice(head_dim - n_topics, head_dim)
    eye = torch.eye(n_topics, device=attention.v_proj.weight.device)
    attention.v_proj.weight[values] = 0
    attention.v_proj.weight[values, _TOPICS] = eye * seen.rms
    attention.o_proj.weight[_TOPIC_MEANS, values] = eye / math.sqrt(first.participation)


@dataclass(frozen=True)
class _Head:
    """A planted head in numbers: logits, before the division by the root of the width."""

    peaks: Tensor
    """Query bias of its peaks, ``[2, pairs]``."""
    first: float
    columns: Mapping[Marks, float]
    by_topic: bool
    participation: float
    """Expected sum of squared attention weights of a row, the first token's left out."""


def _head(head: PlantedHead, config: Config) -> _Head:
    head_dim = _head_dim(config)
    if head.by_topic:
        return _Head(
            peaks=torch.zeros(2, head_dim // 2),
            first=_TOPIC_SINK,
            columns={},
            by_topic=True,
            participation=_TOPIC_PARTICIPATION,
        )
    rope: Any = config.rope_parameters
    shape = peak(rope["rope_theta"], head_dim, *_width_and_spread(head))
    # A peak inside the prompt has two flanks, local decay has one.
    flanks = 2 * len(head.offsets) - 1
    peaks, squares = flanks * shape.mass, flanks * shape.squares
    mass = (1 + _FIRST_SHARE) * peaks
    columns: dict[Marks, float] = {}
    if head.columns == "rare":
        columns["rare"] = PEAK + _RARE_COLUMN
    elif head.columns == "common":
        number = _COLUMN_PROMPT / MARK_EVERY["common"]
        columns["common"] = PEAK + math.log(peaks / number)
        mass, squares = mass + peaks, squares + peaks**2 / number
    return _Head(
        peaks=query_bias(shape, head.offsets, key_bias=_KEY_BIAS),
        first=PEAK + math.log(_FIRST_SHARE * peaks),
        columns=columns,
        by_topic=False,
        participation=squares / mass**2,
    )


def _width_and_spread(head: PlantedHead) -> tuple[float, float]:
    match head.pattern:
        case VerticalSlash(slash_size=size):
            return _SLASH_WIDTH * size, _SLASH_SPREAD
        case AShape(n_local=size):
            return _WINDOW_WIDTH * size, _WINDOW_SPREAD
    raise ValueError(f"{head.pattern} has no distances to peak at; plant it by topic")


def _head_dim(config: Config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _has_topics(shape: Shape) -> bool:
    return any(head.by_topic for layer in shape.heads for head in layer)


def _topic_slots(pairs: int) -> list[tuple[int, int, int]]:
    """(half, pair, hidden dimension) that carries each component of the topic mean."""
    slots = [(half, pairs - pair) for pair in _TOPIC_PAIRS for half in (0, 1)]
    dims = range(_TOPIC_MEANS.start, _TOPIC_MEANS.stop)
    return [(half, pair, dim) for (half, pair), dim in zip(slots, dims, strict=True)]
