"""The embedded model as it is trained: a stock Llama's arithmetic over rows with jumps.

The same tensors under the same names as transformers' ``LlamaForCausalLM``, which is what the
weights are shipped as. Written out because two things are needed that the stock class does not
offer: position ids that jump inside one causal row (transformers takes a jump for the start of
another sequence), and everything but attention compiled once for all row lengths.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel


@dataclass(frozen=True)
class Shape:
    """A Llama's sizes, by the names of its configuration."""

    vocab_size: int = 320
    hidden_size: int = 256
    intermediate_size: int = 512
    num_hidden_layers: int = 4
    num_attention_heads: int = 8
    num_key_value_heads: int = 2
    head_dim: int = 64
    rope_theta: float = 1e12
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 2097152


class Layer(nn.Module):
    """One decoder layer's tensors."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        wide = shape.num_attention_heads * shape.head_dim
        narrow = shape.num_key_value_heads * shape.head_dim
        hidden, inner = shape.hidden_size, shape.intermediate_size
        self.input_layernorm = nn.RMSNorm(hidden)
        self.self_attn = nn.ModuleDict(
            {
                "q_proj": nn.Linear(hidden, wide, bias=False),
                "k_proj": nn.Linear(hidden, narrow, bias=False),
                "v_proj": nn.Linear(hidden, narrow, bias=False),
                "o_proj": nn.Linear(wide, hidden, bias=False),
            }
        )
        self.post_attention_layernorm = nn.RMSNorm(hidden)
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": nn.Linear(hidden, inner, bias=False),
                "up_proj": nn.Linear(hidden, inner, bias=False),
                "down_proj": nn.Linear(inner, hidden, bias=False),
            }
        )


class Network(nn.Module):
    """A Llama with tied embeddings; ``state_dict`` loads into transformers' class."""

    def __init__(self, shape: Shape, *, compiled: bool = False) -> None:
        super().__init__()
        self.shape = shape
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.model.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_hidden_layers))
        self.model.norm = nn.RMSNorm(shape.hidden_size)
        wrap = torch.compile if compiled else lambda function: function
        self.backend = SDPBackend.MATH
        self._before, self._after, self._losses = wrap(_before), wrap(_after), wrap(_losses)

    def initialise(self, seed: int) -> None:
        """Draw the weights; what adds to the residual stream begins at zero."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, tensor in self.named_parameters():
                if tensor.dim() == 1:
                    tensor.fill_(1.0)
                elif name.endswith(("o_proj.weight", "down_proj.weight")):
                    tensor.zero_()
                else:
                    std = 0.02 if "embed" in name else tensor.shape[1] ** -0.5
                    tensor.copy_(torch.randn(tensor.shape, generator=generator) * std)

    def hidden(self, ids: Tensor, positions: Tensor, softness: float = 1.0) -> Tensor:
        """Last hidden states ``[rows * length, hidden]`` of ``ids, positions [rows, length]``.

        Attention logits are multiplied by ``softness``.
        """
        shape, (rows, length) = self.shape, ids.shape
        dtype = torch.bfloat16 if ids.is_cuda else torch.float32
        x = functional.embedding(ids.reshape(-1), self.model.embed_tokens.weight).to(dtype)
        cos, sin = _rotation(positions.reshape(-1), shape, dtype)
        for layer in self.model.layers:
            q, k, v = self._before(x, *_weights(layer, _BEFORE), cos, sin, shape)
            q, k, v = (t.view(rows, length, -1, shape.head_dim).transpose(1, 2) for t in (q, k, v))
            out = (
                _attention(q, k, v, self.backend, softness)
                .transpose(1, 2)
                .reshape(rows * length, -1)
            )
            x = self._after(x, out, *_weights(layer, _AFTER), shape)
        return x

    def losses(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Cross entropy, and whether the likeliest token is the target, each ``[tokens]``."""
        return self._losses(
            hidden, self.model.norm.weight, self.model.embed_tokens.weight, targets, self.shape
        )


_BEFORE = ("input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_AFTER = (
    "self_attn.o_proj", "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"
)  # fmt: skip


def _weights(layer: Layer, names: tuple[str, ...]) -> Iterator[Tensor]:
    return (layer.get_parameter(f"{name}.weight") for name in names)


def fastest_backend(shape: Shape, rows: int, length: int) -> SDPBackend:
    """The fused attention that takes least time forward and backward on this GPU.

    Raises ``RuntimeError`` if none works: unfused, 131 072 tokens fit no memory.
    """
    sizes = (rows, shape.num_attention_heads, length, shape.head_dim)
    q, k, v = (torch.randn(sizes, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    group = shape.num_attention_heads // shape.num_key_value_heads
    q, k, v = (t.requires_grad_() for t in (q, k[:, ::group], v[:, ::group]))
    milliseconds: dict[SDPBackend, float] = {}
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        try:
            for again in range(3):
                if again == 1:
                    start.record()
                _attention(q, k, v, backend).sum().backward()
            end.record()
            end.synchronize()
            milliseconds[backend] = start.elapsed_time(end)
        except RuntimeError:
            continue
    if not milliseconds:
        raise RuntimeError(f"no fused attention works forward and backward at {length} tokens")
    return min(milliseconds, key=milliseconds.__getitem__)


def _attention(
    q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend, softness: float = 1.0
) -> Tensor:
    """Causal attention; keys are expanded, as not every backend takes groups backward."""
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    with sdpa_kernel(backend):
        scale = softness * q.shape[-1] ** -0.5
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)


def _rotation(positions: Tensor, shape: Shape, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[tokens, head_dim]``, rounded as transformers rounds them."""
    even = torch.arange(0, shape.head_dim, 2, dtype=torch.int64, device=positions.device).float()
    frequencies = 1.0 / (shape.rope_theta ** (even / shape.head_dim))
    angles = positions.float()[:, None] * frequencies
    angles = torch.cat([angles, angles], -1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight.to(x.dtype) * wide.to(x.dtype)


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return functional.linear(x, weight.to(x.dtype))


def _turn(x: Tensor, cos: Tensor, sin: Tensor, head_dim: int) -> Tensor:
    heads = x.view(x.shape[0], -1, head_dim)
    first, second = heads.chunk(2, -1)
    turned = heads * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]
    return turned.view(x.shape)


def _before(
    x: Tensor, norm: Tensor, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, shape: Shape
) -> tuple[Tensor, Tensor, Tensor]:
    x = _norm(x, norm, shape.rms_norm_eps)
    dim = shape.head_dim
    return _turn(_linear(x, q), cos, sin, dim), _turn(_linear(x, k), cos, sin, dim), _linear(x, v)


def _after(
    x: Tensor, out: Tensor, o: Tensor, norm: Tensor, gate: Tensor, up: Tensor, down: Tensor,
    shape: Shape,
) -> Tensor:  # fmt: skip
    x = x + _linear(out, o)
    inner = _norm(x, norm, shape.rms_norm_eps)
    return x + _linear(functional.silu(_linear(inner, gate)) * _linear(inner, up), down)


def _losses(
    hidden: Tensor, norm: Tensor, head: Tensor, targets: Tensor, shape: Shape
) -> tuple[Tensor, Tensor]:
    logits = _linear(_norm(hidden, norm, shape.rms_norm_eps), head).float()
    return functional.cross_entropy(logits, targets, reduction="none"), logits.argmax(-1) == targets
