"""How planted structure becomes weights: true projections, biases and RoPE, nothing else.

Write ``f`` for a pair of rotary dimensions, turning by ``theta_f`` per token. The key bias is a
constant ``w`` on the first half of every fast pair; a query bias of
``a_f / w * (cos(o theta_f), -sin(o theta_f))`` on its two halves then gives key ``j`` the logit
``sum_f a_f cos((i - j - o) theta_f)``, a peak at distance ``i - j = o``. Query biases are per
head, so heads that share a key head have their own offsets. Amplitudes ``a_f`` follow a bell
over ``log theta_f`` around a width ``W``: the peak falls off over about ``W`` tokens and its
side ripple is lower than any top-k budget of ``W / LOCAL_SHARE`` offsets reaches, so that a
budget fills with whole clusters instead of scattered offsets. Two peaks of one head (local
decay at 0 and one slash) are equally high.

Content enters where position cannot: the embedding sets a few reserved dimensions (the first
token, two marks, topics) that no layer writes, ``k_proj`` carries them to the slowest pairs,
which hardly turn within the model's longest prompt, and a query bias there says how much a head
cares. A large constant dimension keeps the residual's rms, and with it every planted logit,
nearly the same through all layers. All other weights are random and small in queries and keys
(noise), full-sized in values, outputs and MLP: what attention gathers is content, and missing
some of it changes the logits.

Limits: distances matter more than content in every head but the topic ones; each head has at
most two peaks; columns are equally strong; the random language model predicts nothing.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from minference_green.methods.patterns import AShape, VerticalSlash
from minference_green.model.planted import (
    MARK_EVERY,
    MARK_REMAINDER,
    Config,
    PlantedHead,
    Shape,
)

RECIPE = "planted-1"
"""Version of the weights; a change that moves any of them changes it."""

LOCAL_SHARE = 0.3
"""Width of a peak over the head's slash budget."""

_SPREAD = 1.2  # of the bell over log theta: narrower rings, wider sharpens the tip
_PEAK = 18.0  # logit of a peak above far keys: they are e^18 fewer than any prompt has tokens
_SINK_SHARE = 0.3  # mass of the first token over the mass of all peaks
_RARE_COLUMN = -1.0  # logit of a rare column over a peak's
_COLUMN_PROMPT = 8192  # tokens of the prompt whose common columns weigh as much as local decay
_TOPIC_GAIN = 3.0  # logit per unit of the two topics' inner product
_TOPIC_SINK = 12.0
_TOPIC_PARTICIPATION = 0.02

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
_SLOW_PAIRS = 5


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
    config, heads = shape.config, shape.heads[number]
    attention, mlp = layer.self_attn, layer.mlp
    seen = _before(number, config)
    profiles = [_profile(head, config) for head in heads]
    nn.init.ones_(layer.input_layernorm.weight)
    nn.init.ones_(layer.post_attention_layernorm.weight)

    _read(attention.q_proj, _NOISE, seen, draw)
    _read(attention.k_proj, _NOISE, seen, draw)
    _read(attention.v_proj, 1.0, seen, draw)
    _plant_keys(attention.k_proj, shape, seen)
    _plant_queries(attention.q_proj, heads, profiles, shape, seen)
    # Every head adds the same mean square, however widely it spreads its attention.
    each = _FROM_ATTENTION / config.num_hidden_layers / len(heads)
    _write(attention.o_proj, [each / profile.participation for profile in profiles], seen, draw)
    if number == 0 and _has_topics(shape):
        _plant_topic_means(attention, profiles[0], config, seen)

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
    weight[:, :, pairs - _SLOW_PAIRS :] = 0
    bias[:, 0, : pairs - _SLOW_PAIRS] = _KEY_BIAS
    # Marked keys are at no distance: without the ripple of far peaks they weigh as planned.
    # The first token has no content and attends to itself alone: its rms stays 1.
    weight[:, 0, : pairs - _SLOW_PAIRS, _FIRST] = -_KEY_BIAS / _MARK
    weight[:, 0, pairs - _FIRST_PAIR, _FIRST] = _KEY_MARK / _MARK
    weight[:, 0, : pairs - _SLOW_PAIRS, _COMMON] = -_KEY_BIAS / _MARK * seen.rms
    for marks, pair in _MARK_PAIR.items():
        weight[:, 0, pairs - pair, _MARK_DIM[marks]] = _KEY_MARK / _MARK * seen.rms
    if _has_topics(shape):
        for half, pair, dim in _topic_slots(pairs):
            weight[:, half, pair, dim] = seen.rms


def _plant_queries(
    q_proj: Any,
    heads: tuple[PlantedHead, ...],
    profiles: list["_Profile"],
    shape: Shape,
    seen: _Residual,
) -> None:
    config = shape.config
    head_dim = _head_dim(config)
    pairs, unit = head_dim // 2, math.sqrt(head_dim)
    weight = q_proj.weight.view(len(heads), 2, pairs, -1)
    bias = q_proj.bias.view(len(heads), 2, pairs)
    for number, (head, profile) in enumerate(zip(heads, profiles, strict=True)):
        weight[number, :, pairs - _SLOW_PAIRS :] = 0
        bias[number] = profile.query_bias.to(bias.device, bias.dtype)
        bias[number, 0, pairs - _FIRST_PAIR] = profile.first_logit * unit / _KEY_MARK
        if head.columns is not None:
            pair = pairs - _MARK_PAIR[head.columns]
            bias[number, 0, pair] = profile.column_logit * unit / _KEY_MARK
        if head.by_topic:
            for half, pair, dim in _topic_slots(pairs):
                weight[number, half, pair, dim] = _TOPIC_GAIN * unit * seen.rms


def _plant_topic_means(
    attention: Any, profile: "_Profile", config: Config, seen: _Residual
) -> None:
    """The first head of layer 0 gathers its neighbours' topics and writes their mean."""
    head_dim = _head_dim(config)
    n_topics = _TOPICS.stop - _TOPICS.start
    values = slice(head_dim - n_topics, head_dim)
    eye = torch.eye(n_topics, device=attention.v_proj.weight.device)
    attention.v_proj.weight[values] = 0
    attention.v_proj.weight[values, _TOPICS] = eye * seen.rms
    attention.o_proj.weight[_TOPIC_MEANS, values] = eye / math.sqrt(profile.participation)


@dataclass(frozen=True)
class _Profile:
    """One head's planted logits, as numbers to write into its query bias."""

    query_bias: Tensor
    """Fast pairs' bias ``[2, pairs]``."""
    first_logit: float
    column_logit: float
    participation: float
    """Expected sum of squared attention weights of a row far into the prompt."""


def _profile(head: PlantedHead, config: Config) -> _Profile:
    head_dim = _head_dim(config)
    pairs = head_dim // 2
    if head.by_topic:
        return _Profile(torch.zeros(2, pairs), _TOPIC_SINK, 0.0, _TOPIC_PARTICIPATION)
    width = LOCAL_SHARE * _slash_budget(head)
    theta = _theta(config)
    amplitude = _bell(theta, width)
    near = torch.arange(math.ceil(8 * width))
    decay = torch.exp(_PEAK * (_kernel(theta, amplitude, near) / amplitude.sum() - 1))
    # A peak inside the prompt has two flanks, local decay has one.
    flanks = 2 * len(head.offsets) - 1
    peaks, squares = flanks * float(decay.sum()), flanks * float(decay.square().sum())
    mass, column = (1 + _SINK_SHARE) * peaks, 0.0
    if head.columns == "common":
        n_columns = _COLUMN_PROMPT / MARK_EVERY["common"]
        column = math.log(peaks / n_columns)
        mass, squares = mass + peaks, squares + peaks**2 / n_columns
    elif head.columns == "rare":
        column = _RARE_COLUMN
    return _Profile(
        query_bias=_query_bias(theta, amplitude, head.offsets, head_dim),
        first_logit=_PEAK + math.log(_SINK_SHARE * peaks),
        column_logit=_PEAK + column,
        participation=squares / mass**2,
    )


def _query_bias(
    theta: Tensor, amplitude: Tensor, offsets: tuple[int, ...], head_dim: int
) -> Tensor:
    """Bias ``[2, pairs]`` that peaks at every offset, each at the logit ``_PEAK``."""
    distance = torch.tensor(offsets)
    # Every peak stands on the other's ripple; with two of them the sum is the same at both.
    height = _kernel(theta, amplitude, distance - distance[0]).sum()
    turned = (distance[:, None] * theta).double()
    waves = torch.stack([turned.cos().sum(0), -turned.sin().sum(0)])
    return waves * amplitude * (_PEAK / height * math.sqrt(head_dim) / _KEY_BIAS)


def _bell(theta: Tensor, width: float) -> Tensor:
    """Amplitude of every pair: a bell over the logarithm of wavelength, none on slow pairs."""
    amplitude = torch.exp(-(torch.log(theta * width) ** 2) / (2 * _SPREAD**2))
    # A pair that hardly turns within the peak's reach would only lift the background.
    amplitude[theta * width < 1 / 30] = 0
    amplitude[-_SLOW_PAIRS:] = 0
    return amplitude


def _kernel(theta: Tensor, amplitude: Tensor, distance: Tensor) -> Tensor:
    """``sum_f a_f cos(distance theta_f)`` for every distance."""
    return (distance[:, None] * theta).cos() @ amplitude


def _theta(config: Config) -> Tensor:
    head_dim = _head_dim(config)
    rope: Any = config.rope_parameters
    return float(rope["rope_theta"]) ** (
        -torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    )


def _head_dim(config: Config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _slash_budget(head: PlantedHead) -> int:
    match head.pattern:
        case VerticalSlash(slash_size=size) | AShape(n_local=size):
            return size
    raise ValueError(f"{head.pattern} has no local decay; plant it by topic")


def _has_topics(shape: Shape) -> bool:
    return any(head.by_topic for layer in shape.heads for head in layer)


def _topic_slots(pairs: int) -> list[tuple[int, int, int]]:
    """(half, pair, hidden dimension) that carries each component of the topic mean."""
    slots = [(half, pairs - pair) for pair in _TOPIC_PAIRS for half in (0, 1)]
    dims = range(_TOPIC_MEANS.start, _TOPIC_MEANS.stop)
    return [(half, pair, dim) for (half, pair), dim in zip(slots, dims, strict=True)]
