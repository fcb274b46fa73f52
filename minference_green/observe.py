"""What an arm computes and what its output loses; outside energy windows."""

from statistics import fmean

import torch
from torch import Tensor

from minference_green.cell import Cell
from minference_green.channel import Channel
from minference_green.methods.method import ProfiledMethod
from minference_green.results import Note, Observation
from minference_green.task import Task
from minference_green.torch_device import free_memory
from minference_green.workload import format_length

SAMPLED_POSITIONS = 256
"""Prompt positions whose most likely next token is compared with the reference arm's."""

DENSITY_WARNING = 0.8
"""Above this a sparse method computes nearly everything and is a dense one with overhead."""


class _Profiling:
    """A method that runs its ``profile`` and keeps the accounts, layer by layer."""

    def __init__(self, method: ProfiledMethod) -> None:
        self._method = method
        self.name, self.parameters = method.name, method.parameters
        self.density: dict[int, tuple[float, ...]] = {}
        self.steps = [0.0, 0.0, 0.0]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, layer: int) -> Tensor:
        account = self._method.profile(q, k, v, scale=scale, layer=layer)
        self.density[layer] = tuple(account.density.tolist())
        seconds = (account.estimate_seconds, account.index_seconds, account.attend_seconds)
        self.steps = [total + step for total, step in zip(self.steps, seconds, strict=True)]
        return account.out


def observe(channel: Channel, task: Task, length: int, arms: dict[str, Cell]) -> None:
    """Density, time of the steps, and output error against the first arm; unmetered."""
    missing = [name for name in arms if (length, name) not in task.observed]
    reference: tuple[Tensor, Tensor] | None = None
    for order, (name, cell) in enumerate(arms.items()):
        if name not in missing and (order > 0 or not missing):
            continue
        positions = sampled_positions(length, cell.ids.device)
        profiling = _Profiling(cell.method) if isinstance(cell.method, ProfiledMethod) else None
        probe = Cell(cell.model, profiling or cell.method, cell.dense, cell.ids)
        try:
            logits = probe.prefill(positions)
        except torch.OutOfMemoryError as error:
            first_line = str(error).strip().splitlines()[0]
            note = Note(message=f"{name} at {format_length(length)} not observed: {first_line}")
            channel.ask("record", record=note.model_dump(mode="json"))
            continue
        finally:
            free_memory(cell.ids.device)
        last, top1 = logits[:, -1].float(), logits.argmax(-1)
        if order == 0:
            reference = (last, top1)
        if name not in missing:
            continue
        record = _observation(task.block, length, name, profiling)
        if order > 0 and reference is not None:
            record = record.model_copy(
                update={
                    "logits_relative_error": float(
                        (last - reference[0]).norm() / reference[0].norm()
                    ),
                    "top1_agreement": float((top1 == reference[1]).double().mean()),
                    "sampled_positions": int(top1.numel()),
                }
            )
        channel.ask("record", record=record.model_dump(mode="json"))


def _observation(block: int, length: int, name: str, profiling: _Profiling | None) -> Observation:
    if profiling is None:
        return Observation(
            block=block,
            context_length=length,
            method=name,
            density=None,
            density_reason="the method has no profile(), so it does not tell what it computes",
        )
    density = fmean(d for layer in profiling.density.values() for d in layer)
    notes: tuple[str, ...] = ()
    if density > DENSITY_WARNING and name not in ("dense", "dense-again"):
        notes = (
            f"density {density:.2f} at {format_length(length)}: these budgets leave almost "
            "nothing out; use smaller budgets or a pattern file made for this model",
        )
    return Observation(
        block=block,
        context_length=length,
        method=name,
        density=density,
        density_by_layer=tuple(profiling.density[layer] for layer in sorted(profiling.density)),
        estimate_seconds=profiling.steps[0],
        index_seconds=profiling.steps[1],
        attend_seconds=profiling.steps[2],
        notes=notes,
    )


def sampled_positions(length: int, device: torch.device) -> Tensor:
    """Positions spread evenly over the prompt, the last one always among them."""
    count = min(SAMPLED_POSITIONS, length)
    return (
        torch.linspace(length / count, length, count, dtype=torch.float64)
        .round()
        .long()
        .sub(1)
        .to(device)
    )
