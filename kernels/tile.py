"""What the attention kernels share: the online-softmax step, tile loads, argument checks."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = 1.4426950408889634
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)

HEAD_DIMS = (64, 96, 128, 256)
DTYPES = (torch.bfloat16, torch.float16)


@triton.jit
def load_tile(
    ptr, stride, row, n_rows, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr,
    BOUNDED: tl.constexpr,
):  # fmt: skip
    """``ROWS`` rows of one head from any start; as :func:`load_rows`."""
    return load_rows(
        ptr, stride, row + tl.arange(0, ROWS), n_rows, HEAD_DIM, DIM, BOUNDED
    )  # fmt: skip


@triton.jit
def load_rows(
    ptr, stride, rows, n_rows, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, BOUNDED: tl.constexpr
):  # fmt: skip
    """Some rows of one head, ``[len(rows), DIM]``; zero past ``HEAD_DIM``.

    ``BOUNDED``: rows below 0 or from ``n_rows`` on are zero and not read.
    """
    dims = tl.arange(0, DIM)
    at = ptr + rows[:, None].to(tl.int64) * stride + dims[None, :]
    if BOUNDED:
        inside = ((rows >= 0) & (rows < n_rows))[:, None] & (dims < HEAD_DIM)[None, :]
        return tl.load(at, inside, 0.0)
    if HEAD_DIM == DIM:
        return tl.load(at)
    return tl.load(at, (dims < HEAD_DIM)[None, :], 0.0)


@triton.jit
def attend_tile(acc, row_max, row_sum, q, k, v, qk_scale, visible, MASKED: tl.constexpr):
    """One online-softmax step over a key tile; ``qk_scale`` is the scale times log2(e).

    A row that has seen nothing yet keeps a maximum of -inf and a sum of 0.
    """
    logits = tl.dot(q, tl.trans(k))
    if MASKED:
        logits = tl.where(visible, logits, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(logits, 1) * qk_scale)
    anchor = new_max
    if MASKED:
        # -inf minus -inf would make a row that sees nothing in its first tile NaN for ever.
        anchor = tl.where(new_max == float("-inf"), 0.0, new_max)
    weights = tl.exp2(logits * qk_scale - anchor[:, None])
    shrink = tl.exp2(row_max - anchor)
    row_sum = row_sum * shrink + tl.sum(weights, 1)
    acc = acc * shrink[:, None]
    acc = tl.dot(weights.to(v.dtype), v, acc)
    return acc, new_max, row_sum


@triton.jit
def store_rows(
    acc, row_max, row_sum, out_ptr, stride, lse_ptr, row, n_rows,
    HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, HAS_LSE: tl.constexpr,
):  # fmt: skip
    """Normalise and write ``ROWS`` rows of the output, and their natural log-sum-exp."""
    rows = row + tl.arange(0, ROWS)
    dims = tl.arange(0, DIM)
    at = rows[:, None].to(tl.int64) * stride + dims[None, :]
    kept = (rows[:, None] < n_rows) & (dims[None, :] < HEAD_DIM)
    out = acc / row_sum[:, None]
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), kept)
    if HAS_LSE:
        lse = (row_max + tl.log2(row_sum)) * LN_2
        tl.store(lse_ptr + rows, lse, rows < n_rows)


@triton.jit(do_not_specialize=("n", "first", "step", "n_limits"))
def _count_kernel(rows_ptr, counts_ptr, n, first, step, n_limits, BLOCK: tl.constexpr):
    """Binary search of one ascending row, ``BLOCK`` limits at a time."""
    row = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    limit = first + step * i
    low = tl.zeros([BLOCK], tl.int32)
    high = low + n
    width = n
    while width > 0:
        middle = (low + high) // 2
        searching = low < high
        value = tl.load(rows_ptr + row * n + middle, searching, 0)
        below = searching & (value < limit)
        low = tl.where(below, middle + 1, low)
        high = tl.where(searching & (value >= limit), middle, high)
        width = width // 2
    tl.store(counts_ptr + row * n_limits + i, low, i < n_limits)


def count_below(rows: Tensor, first: int, step: int, n_limits: int) -> Tensor:
    """How many entries of each ascending row lie below ``first + step * i``.

    Shapes: ``rows [B, H, S]`` int32; returns int32 ``[B, H, n_limits]``.
    """
    batch, heads, n = rows.shape
    counts = torch.empty(batch, heads, n_limits, dtype=torch.int32, device=rows.device)
    block = 128
    _count_kernel[(triton.cdiv(n_limits, block), batch * heads)](
        rows, counts, n, first, step, n_limits, BLOCK=block, num_warps=4
    )
    return counts


def padded(head_dim: int) -> int:
    """Head dimension as a kernel sees it: the next power of two, filled with zeros."""
    return int(triton.next_power_of_2(head_dim))


def check_tensors(**tensors: Tensor) -> None:
    """Check what every kernel assumes of ``[B, H, N, D]`` tensors.

    Raises ``ValueError`` naming tensor and value.
    """
    first_name, first = next(iter(tensors.items()))
    interpreted = bool(triton.knobs.runtime.interpret)
    for name, x in tensors.items():
        if x.ndim != 4:
            raise ValueError(f"{name} must be [B, H, N, D], got shape {tuple(x.shape)}")
        if x.device != first.device or (x.device.type != "cuda" and not interpreted):
            raise ValueError(
                f"{name} must be on one CUDA device with {first_name}, got {x.device} and "
                f"{first.device}; on a CPU use minference_green.kernels.cpu"
            )
        if x.dtype not in (*DTYPES, *((torch.float32,) if interpreted else ())):
            raise ValueError(f"{name} must be bfloat16 or float16, got {x.dtype}")
        if x.dtype != first.dtype:
            raise ValueError(f"{name} must have the dtype of {first_name}, got {x.dtype}")
        if x.shape[3] not in HEAD_DIMS:
            raise ValueError(f"head_dim of {name} must be one of {HEAD_DIMS}, got {x.shape[3]}")
        if x.shape[3] != first.shape[3] or x.shape[0] != first.shape[0]:
            raise ValueError(
                f"{name} must agree with {first_name} in batch and head_dim, "
                f"got {tuple(x.shape)} and {tuple(first.shape)}"
            )
        if min(x.shape) < 1:
            raise ValueError(f"{name} must not be empty, got shape {tuple(x.shape)}")
        if x.stride(3) != 1:
            raise ValueError(
                f"{name} must have a contiguous last dimension, got strides {x.stride()}; "
                "call .contiguous()"
            )


def check_attention(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, heads: Tensor, n_k: int, scale: float
) -> Tensor:
    """Check the arguments of an attention kernel; returns ``out``, allocated if ``None``.

    Raises ``ValueError`` naming argument and value.
    """
    check_tensors(q=q, k=k, v=v)
    check_grouped(q, k)
    if k.shape != v.shape:
        raise ValueError(f"k and v must have one shape, got {tuple(k.shape)}, {tuple(v.shape)}")
    if k.shape[2] != n_k:
        raise ValueError(f"index was built for n_k = {n_k}, got k with {k.shape[2]} rows")
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")
    if out is None:
        if len(heads) != q.shape[1]:
            raise ValueError(
                f"index covers {len(heads)} of {q.shape[1]} query heads: give out= to fill "
                "the rows of some heads only"
            )
        return torch.empty_like(q)
    check_tensors(q=q, out=out)
    if out.shape != q.shape:
        raise ValueError(f"out must have the shape of q {tuple(q.shape)}, got {tuple(out.shape)}")
    return out


def check_grouped(q: Tensor, k: Tensor) -> None:
    """Check that query heads share KV heads evenly and queries are the last positions."""
    if q.shape[1] % k.shape[1]:
        raise ValueError(
            f"query heads must be a multiple of KV heads, got {q.shape[1]} and {k.shape[1]}"
        )
    if q.shape[2] > k.shape[2]:
        raise ValueError(f"queries are the last of the keys, got {q.shape[2]} for {k.shape[2]}")


def check_index(name: str, x: Tensor, shape: tuple[int | None, ...], like: Tensor) -> None:
    """Check dtype, device, layout and shape (``None`` = any) of one tensor of an index."""
    if x.dtype != torch.int32 or x.device != like.device or not x.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous int32 on {like.device}, got {x.dtype} on {x.device} "
            f"with strides {x.stride()}"
        )
    if x.ndim != len(shape) or any(
        want not in (None, got) for want, got in zip(shape, x.shape, strict=True)
    ):
        raise ValueError(f"{name} must have shape {shape}, got {tuple(x.shape)}")


def new_lse(q: Tensor, heads: Tensor, wanted: bool) -> Tensor:
    """Memory for the log-sum-exp; one number that is never written where it is not wanted."""
    shape = (q.shape[0], len(heads), q.shape[2]) if wanted else (1,)
    return torch.empty(shape, dtype=torch.float32, device=q.device)


def launch_options(head_dim: int, device: torch.device) -> dict[str, Any]:
    """Warps and pipeline stages of the attention kernels, two programs on a multiprocessor."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    # Three stages of 32 KiB beside the queries still leave room for a second program on Hopper.
    stages = 3 if capability == (9, 0) and head_dim <= 128 else 2
    return {"num_warps": 8 if head_dim > 128 else 4, "num_stages": stages}
