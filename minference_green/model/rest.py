"""The rest of a layer, all that is not attention, with its small steps fused.

Norms, the rotation of queries and keys, and the gate of an MLP are many passes over memory in
the stock modules, a quarter of the time of what is not attention. Here each becomes one kernel,
in every arm alike; matrix products stay the model's own modules. Instances are changed for as
long as the context lasts, no class and no module of transformers::

    norm       its forward                            -> rms_norm
    MLP        its forward                            -> gate, up, gated_silu, down
    attention  ``apply_rotary_pos_emb``, as its own forward knows it -> rotate

Whether a piece computes what the stock one does is tried on every kind of piece, not guessed
from its name.
"""

import types
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from minference_green.errors import UsageError

MLP_ROWS = 65536
"""Tokens that pass through an MLP at once: its inner tensors never hold more of a long prompt."""

_ROTARY = "apply_rotary_pos_emb"


@dataclass(frozen=True)
class Pieces:
    """The fused steps; signatures as in ``kernels/rest.py``."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    gated_silu: Callable[[Tensor, Tensor], Tensor]
    rotate: Callable[[Tensor, Tensor, Tensor], Tensor]


def triton_pieces(device: torch.device) -> Pieces:
    """The Triton kernels; raises ``UsageError`` where there is no CUDA device to run them."""
    if device.type != "cuda":
        raise UsageError(
            f"--rest fused needs a CUDA device, the model is on {device.type}; use --rest stock"
        )
    from minference_green.kernels import rest

    return Pieces(rest.rms_norm, rest.gated_silu, rest.rotate)


@contextmanager
def fused(model: PreTrainedModel, pieces: Pieces) -> Iterator[str]:
    """Let ``model`` run its norms, rotations and MLP gates by ``pieces``; undone on exit.

    Yields what was fused in words, such as ``32 MLPs, 65 norms, 32 rotations``; a piece of
    another formula or shape stays stock and is not counted. Raises ``UsageError`` if nothing
    of the model can be fused.
    """
    fits: dict[tuple[object, ...], bool] = {}
    changed: list[nn.Module] = []
    counts: Counter[str] = Counter()
    try:
        for module in model.modules():
            for name, piece_of in (("norms", _norm), ("MLPs", _mlp), ("rotations", _attention)):
                piece = piece_of(module, model, pieces)
                if piece is None:
                    continue
                shapes = tuple(p.shape for p in module.parameters())
                kind = (name, type(module), shapes)
                if kind not in fits:
                    fits[kind] = piece.agrees()
                if fits[kind]:
                    # An instance's own attribute comes before the method of its class.
                    module.forward = piece.forward
                    changed.append(module)
                    counts[name] += 1
        if not changed:
            raise UsageError(
                f"{type(model).__name__} has no norm, MLP or rotation that the fused kernels "
                "compute; use --rest stock"
            )
        yield ", ".join(f"{n} {name}" for name, n in sorted(counts.items()))
    finally:
        for module in changed:
            del module.forward


@dataclass(frozen=True)
class _Piece:
    """A module's forward with a step fused, and the same computation twice, to compare."""

    forward: Callable[..., Any]
    stock: Callable[[], tuple[Tensor, ...]]
    fused: Callable[[], tuple[Tensor, ...]]

    def agrees(self) -> bool:
        """Whether both compute the same up to a few roundings; not if one takes no such shape."""
        with torch.inference_mode():
            try:
                pairs = list(zip(self.stock(), self.fused(), strict=True))
            except (TypeError, ValueError):
                return False
            return all(
                got.shape == want.shape
                and _difference(got, want) <= 4 * torch.finfo(want.dtype).eps
                for want, got in pairs
            )


def _difference(got: Tensor, want: Tensor) -> float:
    """Relative root mean square."""
    error = (got.double() - want.double()).norm() / want.double().norm()
    return float(error)


def _norm(module: nn.Module, model: PreTrainedModel, pieces: Pieces) -> _Piece | None:  # noqa: ARG001
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", None)
    if not isinstance(weight, Tensor) or weight.ndim != 1 or not isinstance(eps, float):
        return None

    def forward(hidden_states: Tensor) -> Tensor:
        return pieces.rms_norm(hidden_states.contiguous(), weight, eps)

    x = _drawn((1, 3, len(weight)), weight)
    return _Piece(forward, lambda: (type(module).forward(module, x),), lambda: (forward(x),))


def _mlp(module: nn.Module, model: PreTrainedModel, pieces: Pieces) -> _Piece | None:  # noqa: ARG001
    parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    if not all(isinstance(part, nn.Linear) for part in parts):
        return None
    gate, up, down = (part for part in parts if isinstance(part, nn.Linear))

    def some(x: Tensor) -> Tensor:
        out: Tensor = down(pieces.gated_silu(gate(x), up(x)))
        return out

    def forward(x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) <= MLP_ROWS:
            return some(x)
        out = torch.empty_like(rows)
        for begin in range(0, len(rows), MLP_ROWS):
            out[begin : begin + MLP_ROWS] = some(rows[begin : begin + MLP_ROWS])
        return out.view(x.shape)

    x = _drawn((1, 3, gate.in_features), gate.weight)
    return _Piece(forward, lambda: (type(module).forward(module, x),), lambda: (forward(x),))


def _attention(module: nn.Module, model: PreTrainedModel, pieces: Pieces) -> _Piece | None:
    stock = type(module).forward
    angles = getattr(model.base_model, "rotary_emb", None)
    if not isinstance(stock, types.FunctionType) or _ROTARY not in stock.__code__.co_names:
        return None
    head_dim = getattr(module, "head_dim", None)
    if angles is None or not isinstance(head_dim, int):
        return None
    stock_rotary = stock.__globals__[_ROTARY]

    def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return pieces.rotate(q, cos, sin), pieces.rotate(k, cos, sin)

    own = types.FunctionType(
        stock.__code__,
        {**stock.__globals__, _ROTARY: rotary},
        stock.__name__,
        stock.__defaults__,
        stock.__closure__,
    )
    own.__kwdefaults__ = stock.__kwdefaults__
    weight = next(module.parameters())
    q, k = (_drawn((1, heads, 3, head_dim), weight) for heads in (2, 1))

    def cos_sin() -> tuple[Tensor, Tensor]:
        # From position 1 on: at 0 every rotation agrees.
        positions = torch.arange(1, 4, device=weight.device)[None]
        cos, sin = angles(q, positions)
        if cos.shape[-1] != head_dim:
            raise ValueError(f"turns {cos.shape[-1]} of a head's {head_dim} dimensions")
        return cos, sin

    return _Piece(
        types.MethodType(own, module),
        lambda: stock_rotary(q, k, *cos_sin()),
        lambda: rotary(q, k, *cos_sin()),
    )


def _drawn(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Normal numbers that no other generator notices."""
    draw = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=draw).to(device=like.device, dtype=like.dtype)
