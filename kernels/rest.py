"""What lies between a decoder layer's matrix products, each in one read and one write.

Stock modules do a norm in six passes over memory, a rotation in five and the gate of an MLP in
two. Here each is one kernel that computes in fp32 and rounds where it stores.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minference_green.kernels import tile

NORM_ELEMENTS = 2048
"""Least elements of one program: narrow rows, as of a norm per head, share it."""

GATE_ELEMENTS = 4096
ROTATED_ROWS = 16


@triton.jit(do_not_specialize=("n_rows",))
def _norm_kernel(
    x_ptr, weight_ptr, out_ptr, n_rows, eps,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    dims = tl.arange(0, PADDED)
    inside = (row < n_rows)[:, None] & (dims < WIDTH)[None, :]
    at = row[:, None] * WIDTH + dims[None, :]
    x = tl.load(x_ptr + at, inside, 0.0).to(tl.float32)
    normed = x * tl.rsqrt(tl.sum(x * x, 1) / WIDTH + eps)[:, None]
    weight = tl.load(weight_ptr + dims, dims < WIDTH, 0.0).to(tl.float32)
    # Rounded before the weight, as the stock norm does.
    rounded = normed.to(out_ptr.dtype.element_ty).to(tl.float32)
    out = rounded * weight[None, :]
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), inside)


@triton.jit(do_not_specialize=("n",))
def _gate_kernel(gate_ptr, up_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_ptr + at, at < n, 0.0).to(tl.float32)
    up = tl.load(up_ptr + at, at < n, 0.0).to(tl.float32)
    out = gate / (1 + tl.exp(-gate)) * up
    tl.store(gate_ptr + at, out.to(gate_ptr.dtype.element_ty), at < n)


@triton.jit(do_not_specialize=("n", "n_heads"))
def _rotate_kernel(
    x_ptr, cos_ptr, sin_ptr, out_ptr,
    x_batch: tl.int64, x_head: tl.int64, x_row: tl.int64,
    out_batch: tl.int64, out_head: tl.int64, out_row: tl.int64,
    cos_batch: tl.int64, cos_row: tl.int64, sin_batch: tl.int64, sin_row: tl.int64,
    n, n_heads, HALF: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """All heads of some rows, so that their angles are read once."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    b = tl.program_id(1).to(tl.int64)
    dims = tl.arange(0, PADDED)
    inside = (row < n)[:, None] & (dims < HALF)[None, :]
    row = row[:, None].to(tl.int64)
    cos_at = cos_ptr + b * cos_batch + row * cos_row + dims[None, :]
    sin_at = sin_ptr + b * sin_batch + row * sin_row + dims[None, :]
    first_cos = tl.load(cos_at, inside, 0.0).to(tl.float32)
    second_cos = tl.load(cos_at + HALF, inside, 0.0).to(tl.float32)
    first_sin = tl.load(sin_at, inside, 0.0).to(tl.float32)
    second_sin = tl.load(sin_at + HALF, inside, 0.0).to(tl.float32)
    x_at = x_ptr + b * x_batch + row * x_row + dims[None, :]
    out_at = out_ptr + b * out_batch + row * out_row + dims[None, :]
    for _ in range(n_heads):
        first = tl.load(x_at, inside, 0.0).to(tl.float32)
        second = tl.load(x_at + HALF, inside, 0.0).to(tl.float32)
        kind = out_ptr.dtype.element_ty
        tl.store(out_at, (first * first_cos - second * first_sin).to(kind), inside)
        tl.store(out_at + HALF, (second * second_cos + first * second_sin).to(kind), inside)
        x_at += x_head
        out_at += out_head


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``weight * x / sqrt(mean(x^2) + eps)`` over the last dimension (Zhang, Sennrich 2019).

    Shapes: ``x [..., W]``, ``weight [W]``; returns ``[..., W]``. Raises ``ValueError`` with the
    value on a dtype, device or layout that does not fit.
    """
    _check(x=x, weight=weight)
    width = x.shape[-1]
    if weight.shape != (width,):
        raise ValueError(f"weight must have shape ({width},), got {tuple(weight.shape)}")
    out = torch.empty_like(x)
    padded = triton.next_power_of_2(width)
    rows = max(1, NORM_ELEMENTS // padded)
    n_rows = x.numel() // width
    _norm_kernel[(triton.cdiv(n_rows, rows),)](
        x, weight, out, n_rows, eps, WIDTH=width, PADDED=padded, ROWS=rows,
        num_warps=min(16, max(4, padded // 512)),
    )  # fmt: skip
    return out


def gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up`` (Shazeer 2020), written over ``gate``, which is returned.

    Shapes: both ``[..., W]``. Raises ``ValueError`` as :func:`rms_norm` does.
    """
    _check(gate=gate, up=up)
    if gate.shape != up.shape:
        raise ValueError(f"gate and up must agree, got {tuple(gate.shape)} and {tuple(up.shape)}")
    n = gate.numel()
    _gate_kernel[(triton.cdiv(n, GATE_ELEMENTS),)](gate, up, n, BLOCK=GATE_ELEMENTS, num_warps=8)
    return gate


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of halves: ``x * cos + (-second half, first half) * sin``.

    Shapes: ``x [B, H, N, D]`` of any strides with a contiguous last dimension, ``cos, sin``
    ``[B or 1, N, D]`` of x's dtype; returns ``[B, H, N, D]`` in x's memory layout. Raises
    ``ValueError`` as :func:`rms_norm` does.
    """
    tile.check_tensors(x=x)
    batch, n_heads, n, head_dim = x.shape
    angles = (cos.expand(batch, *cos.shape[1:]), sin.expand(batch, *sin.shape[1:]))
    for name, angle in zip(("cos", "sin"), angles, strict=True):
        if angle.shape != (batch, n, head_dim) or angle.dtype != x.dtype or angle.stride(2) != 1:
            raise ValueError(
                f"{name} must be {x.dtype} {(batch, n, head_dim)} with a contiguous last "
                f"dimension, got {angle.dtype} {tuple(angle.shape)}"
            )
    out = torch.empty_like(x)
    half = head_dim // 2
    _rotate_kernel[(triton.cdiv(n, ROTATED_ROWS), batch)](
        x, *angles, out, *x.stride()[:3], *out.stride()[:3],
        *angles[0].stride()[:2], *angles[1].stride()[:2],
        n, n_heads, HALF=half, PADDED=tile.padded(half), ROWS=ROTATED_ROWS, num_warps=4,
    )  # fmt: skip
    return out


def _check(**tensors: Tensor) -> None:
    """Check what the kernels over whole rows assume; ``ValueError`` names tensor and value."""
    first_name, first = next(iter(tensors.items()))
    interpreted = bool(triton.knobs.runtime.interpret)
    for name, x in tensors.items():
        if x.device != first.device or (x.device.type != "cuda" and not interpreted):
            raise ValueError(
                f"{name} must be on one CUDA device with {first_name}, got {x.device} and "
                f"{first.device}"
            )
        if x.dtype not in (*tile.DTYPES, *((torch.float32,) if interpreted else ())):
            raise ValueError(f"{name} must be bfloat16 or float16, got {x.dtype}")
        if x.dtype != first.dtype:
            raise ValueError(f"{name} must have the dtype of {first_name}, got {x.dtype}")
        if x.numel() == 0 or not x.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous and not empty, got shape {tuple(x.shape)} with "
                f"strides {x.stride()}"
            )
