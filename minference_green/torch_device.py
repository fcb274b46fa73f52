"""The torch device a run is on: which, what it is, and its memory."""

import gc
from typing import Any

import torch

from minference_green.errors import UsageError


def resolve_device(name: str) -> torch.device:
    """The torch device ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` means here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(
            f"--device {name!r} is not a device; use auto, cpu, cuda or cuda:N"
        ) from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name!r} is not supported; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UsageError(
                f"--device {name} asks for a GPU, but torch {torch.__version__} sees none; "
                "install a CUDA build of torch or use --device cpu"
            )
        index = device.index or 0
        if index >= torch.cuda.device_count():
            raise UsageError(
                f"--device {name}: this machine has {torch.cuda.device_count()} GPU(s)"
            )
        return torch.device("cuda", index)
    return device


def describe_device(device: torch.device) -> dict[str, Any]:
    """What the parent needs to choose a meter."""
    if device.type == "cpu":
        return {"kind": "cpu"}
    properties = torch.cuda.get_device_properties(device)
    return {
        "kind": "gpu",
        "uuid": f"GPU-{properties.uuid}",
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
    }


def free_memory(device: torch.device) -> None:
    """Give back what nothing refers to, so that one cell's memory does not crowd the next."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def reset_peak_memory(device: torch.device) -> None:
    """Begin to look for the most memory allocated from here on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_bytes(device: torch.device) -> int | None:
    """Most memory allocated since the reset; the CPU's allocator does not tell."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
