"""Dense causal attention: the baseline every saving is measured against.

Which of PyTorch's kernels is fastest depends on GPU, shape and dtype, and PyTorch's own choice
is not always it. So each is timed on the run's own shapes and the fastest, by time and never
by name, is the baseline.
"""

import math
import statistics
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from minference_green.errors import UsageError
from minference_green.methods.backend import synchronize
from minference_green.methods.method import LayerProfile

BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
"""Kernels of PyTorch's scaled dot product attention, by the names reports use."""

_CPU_BACKENDS = ("flash", "math")

_ONE_QUERY = [BACKENDS[name] for name in BACKENDS if name != "cudnn"]
"""For one query over a cache: flash splits the keys. cuDNN would plan anew at every length."""

_REFUSALS = ("No available kernel", "No viable backend")
"""How PyTorch says, on CUDA and elsewhere, that the one backend allowed takes no such inputs."""

_HOPELESS = 5.0
"""A backend whose first call takes this many times the fastest median is not called again."""

_MOST_CALLS = 9
_MEASURED_SECONDS = 0.5
"""A backend is timed by the median of up to 9 calls, and no new one begins after 0.5 s."""


@dataclass(frozen=True)
class Dense:
    """Full causal attention by a named backend; ``None`` leaves the choice to PyTorch."""

    backend: str | None = None

    def __post_init__(self) -> None:
        if self.backend is not None and self.backend not in BACKENDS:
            raise UsageError(
                f"{self.backend!r} is not a dense backend; choose from {', '.join(BACKENDS)}"
            )

    @property
    def name(self) -> str:
        """One word, shown in reports."""
        return "dense"

    @property
    def parameters(self) -> Mapping[str, Any]:
        """The backend asked for; ``None`` if PyTorch chose."""
        return {"backend": self.backend}

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, layer: int) -> Tensor:  # noqa: ARG002
        """Causal attention of queries that are the last of the keys' positions.

        Shapes: ``q [B, Hq, n_q, D]``, ``k, v [B, Hkv, n_k, D]``; returns ``[B, Hq, n_q, D]``.
        The named backend serves whole prompts; a continuation (``n_q < n_k``), which some
        backends have no causal form for, is left to PyTorch's choice. Raises ``UsageError``
        if the backend refuses the inputs.
        """
        if q.shape[2] < k.shape[2]:
            return _continue(q, k, v, scale)
        if self.backend is None:
            return _prefill(q, k, v, scale)
        if self.backend == "efficient":  # has no grouped form
            group = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        try:
            with sdpa_kernel(BACKENDS[self.backend]):
                return _prefill(q, k, v, scale)
        except RuntimeError as error:
            if not str(error).startswith(_REFUSALS):
                raise
            raise UsageError(
                f"the dense backend {self.backend} refuses q {list(q.shape)} and k "
                f"{list(k.shape)} in {q.dtype} on this {q.device.type} device; "
                f"choose another of {', '.join(BACKENDS)}"
            ) from error

    def profile(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, layer: int) -> LayerProfile:
        """As :meth:`attend`; dense computes every causal pair and estimates nothing."""
        synchronize(q.device)
        began = time.perf_counter()
        out = self.attend(q, k, v, scale=scale, layer=layer)
        synchronize(q.device)
        seconds = time.perf_counter() - began
        return LayerProfile(out, torch.ones(q.shape[1], dtype=torch.float64), 0.0, 0.0, seconds)


@dataclass(frozen=True)
class BackendTimings:
    """Every dense backend's time on given inputs."""

    seconds: dict[str, float | None]
    """Median seconds per call; ``None`` where the backend refuses."""
    reasons: dict[str, str]
    """Why a backend refuses, in words."""

    @property
    def fastest(self) -> str:
        """The backend with the least time; raises ``UsageError`` if all refuse."""
        timed = {name: t for name, t in self.seconds.items() if t is not None}
        if not timed:
            why = "; ".join(f"{name}: {reason}" for name, reason in self.reasons.items())
            raise UsageError(f"no dense attention kernel takes these inputs: {why}")
        return min(timed, key=lambda name: timed[name])


def time_backends(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> BackendTimings:
    """Time every dense backend of the device on causal attention of these inputs.

    Shapes: ``q [B, Hq, N, D]``, ``k, v [B, Hkv, N, D]``. Per backend one call to warm up, then
    the median of 1 to 9 calls; one that is hopelessly slow keeps the time of its first call.
    """
    seconds: dict[str, float | None] = {}
    reasons: dict[str, str] = {}
    for name in BACKENDS if q.device.type == "cuda" else _CPU_BACKENDS:
        seconds[name] = None
        if name == "math" and (reason := _too_large(q, free_bytes(q.device))):
            reasons[name] = reason
            continue
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                best = min((t for t in seconds.values() if t is not None), default=math.inf)
                seconds[name] = _median_seconds(Dense(name), q, k, v, scale, _HOPELESS * best)
            except (UsageError, RuntimeError) as error:
                # PyTorch gives its reasons as warnings, the error only says that it stops.
                parts = [str(w.message).split(" (Triggered internally")[0] for w in said]
                reasons[name] = " ".join(parts) or str(error).splitlines()[0]
    return BackendTimings(seconds, reasons)


def _median_seconds(
    dense: Dense, q: Tensor, k: Tensor, v: Tensor, scale: float, hopeless_seconds: float
) -> float:
    first = dense.profile(q, k, v, scale=scale, layer=0).attend_seconds
    if first > hopeless_seconds:
        return first
    calls: list[float] = []
    while not calls or (len(calls) < _MOST_CALLS and sum(calls) < _MEASURED_SECONDS):
        calls.append(dense.profile(q, k, v, scale=scale, layer=0).attend_seconds)
    return statistics.median(calls)


def _too_large(q: Tensor, free_bytes: int) -> str | None:
    """Why the backend that writes all scores to memory must not be tried, if so."""
    # Scores, mask and probabilities, in fp32 for every dtype that is not wider.
    needed = 3 * q.shape[0] * q.shape[1] * q.shape[2] ** 2 * max(4, q.element_size())
    if needed <= free_bytes // 2:
        return None
    return f"would hold {needed / 2**30:.1f} GiB of scores, {free_bytes / 2**30:.1f} GiB are free"


def free_bytes(device: torch.device) -> int:
    """Memory of the device that nothing uses yet."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)


def _prefill(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)


@dataclass(frozen=True)
class DenseAgain(Dense):
    """The same under another name: a second arm that shows how far equal arms come apart."""

    @property
    def name(self) -> str:
        """One word, shown in reports."""
        return "dense-again"


def _continue(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention aligned at the last row and column."""
    n_q, n_k = q.shape[2], k.shape[2]
    grouped = q.shape[1] != k.shape[1]
    mask: Tensor | None = None
    if n_q > 1:
        if q.device.type == "cuda":
            # Asks a kernel for its own alignment, without a mask of n_q x n_k in memory.
            # Imported here because it brings the compiler along, two seconds of it.
            from torch.nn.attention.bias import causal_lower_right

            mask = causal_lower_right(n_q, n_k)
        else:
            mask = torch.ones(n_q, n_k, dtype=torch.bool).tril(n_k - n_q)
    elif q.device.type == "cuda":
        with sdpa_kernel(_ONE_QUERY):
            return scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=grouped)
    return scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=grouped)
