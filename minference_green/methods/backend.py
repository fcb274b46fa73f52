"""The one place that chooses between the Triton kernels and the CPU path."""

import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from minference_green.errors import UsageError
from minference_green.kernels import cpu, selection
from minference_green.kernels.index import BlockIndex

T = TypeVar("T")


@dataclass(frozen=True)
class Kernels:
    """The kernels a sparse method is made of; the same signatures on every device."""

    row_scores: Callable[..., tuple[Tensor, Tensor]]
    block_means: Callable[[Tensor], Tensor]
    tile_shares: Callable[..., Tensor]
    shares_of: Callable[[Tensor, range], Callable[..., Tensor]]
    """``tile_shares`` for many calls over the keys of some KV heads."""
    listed_index: Callable[..., BlockIndex]
    chosen_bands: Callable[..., tuple[Tensor, Tensor]]
    cut_pieces: Callable[[Tensor, int], Tensor]
    band_attention: Callable[..., Any]
    block_attention: Callable[..., Any]


def kernels_for(device: torch.device) -> Kernels:
    """The kernels of a device; imports Triton on the first CUDA device only.

    Raises ``UsageError`` for another device type, or if Triton is missing.
    """
    match device.type:
        case "cpu":
            return Kernels(
                row_scores=cpu.row_scores,
                block_means=cpu.block_means,
                tile_shares=cpu.tile_shares,
                shares_of=cpu.shares_of,
                listed_index=selection.listed_index,
                chosen_bands=selection.chosen_bands,
                cut_pieces=cpu.cut_pieces,
                band_attention=cpu.band_attention,
                block_attention=cpu.block_attention,
            )
        case "cuda":
            return _triton_kernels()
        case other:
            raise UsageError(f"no sparse kernels for device {other!r}; use a cuda or cpu device")


def _triton_kernels() -> Kernels:
    if importlib.util.find_spec("triton") is None:
        raise UsageError(
            "sparse prefill on a GPU needs Triton, which is not installed; "
            "install it with: pip install triton"
        )
    from minference_green.kernels import (
        best_blocks,
        block_sparse,
        cut,
        estimate,
        probe,
        top,
        vertical_slash,
    )

    return Kernels(
        row_scores=estimate.row_scores,
        block_means=estimate.block_means,
        tile_shares=probe.tile_shares,
        shares_of=probe.shares_of,
        listed_index=best_blocks.listed_index,
        chosen_bands=top.chosen_bands,
        cut_pieces=cut.cut_pieces,
        band_attention=vertical_slash.band_attention,
        block_attention=block_sparse.block_attention,
    )


def timed(device: torch.device, step: Callable[[], T]) -> tuple[T, float]:
    """What a step returns, and its seconds between synchronisations."""
    synchronize(device)
    began = time.perf_counter()
    result = step()
    synchronize(device)
    return result, time.perf_counter() - began


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
