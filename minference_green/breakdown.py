"""What the parts of a prefill cost, each replayed alone in a window of its own."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from minference_green.cell import Cell, repeats_for
from minference_green.channel import Channel
from minference_green.methods.method import PartedMethod, Parts, PrefillMethod
from minference_green.results import Note
from minference_green.task import Task
from minference_green.torch_device import free_memory
from minference_green.workload import format_length

REPLAYED_LAYERS = 4
"""Layers whose inputs a breakdown replays: their heads' patterns differ between layers, and
keeping all of them would not fit into memory at long context."""


class _Captures:
    """A method that remembers the inputs of some layers, evenly spread, and counts them all."""

    def __init__(self, method: PrefillMethod, layers: frozenset[int]) -> None:
        self._method, self._layers = method, layers
        self.name, self.parameters = method.name, method.parameters
        self.inputs: dict[int, tuple[Tensor, Tensor, Tensor, float]] = {}
        self.served = set[int]()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, layer: int) -> Tensor:
        self.served.add(layer)
        if layer in self._layers:
            self.inputs[layer] = (q, k, v, scale)
        return self._method.attend(q, k, v, scale=scale, layer=layer)


class _ReturnsQueries:
    """Attention that costs nothing: what is left is the rest of the model."""

    name = "none"
    parameters: Mapping[str, Any] = MappingProxyType({})

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, layer: int) -> Tensor:  # noqa: ARG002
        return q


def break_down(channel: Channel, task: Task, length: int, arms: dict[str, Cell]) -> None:
    """What estimate, index, attention and the rest of the model cost, each replayed alone.

    The attention's parts replay the queries, keys and values that this prompt has in
    ``REPLAYED_LAYERS`` layers, spread evenly from the first to the last. An arm that does not
    fit into memory beside its captures is noted.
    """
    for name, cell in arms.items():
        channel.ask("cell", step="breaking down", context_length=length, method=name)
        try:
            parts, layers, in_all = _replayable(cell)
            for part, step in parts.items():
                once = cell.repeat_step(1, step)
                repeats = repeats_for(task.window_seconds, once.seconds_each)
                channel.ask("ready", context_length=length, method=name)
                took = cell.repeat_step(repeats, step, task.window_seconds)
                channel.ask(
                    "replay",
                    context_length=length,
                    method=name,
                    part=part,
                    layers=[] if part == "rest" else layers,
                    layers_in_all=in_all,
                    **took._asdict(),
                )
        except torch.OutOfMemoryError as error:
            first_line = str(error).strip().splitlines()[0]
            text = f"{name} at {format_length(length)} not broken down: {first_line}"
            channel.ask("record", record=Note(message=text).model_dump(mode="json"))
        finally:
            free_memory(cell.ids.device)


@torch.inference_mode()
def _replayable(cell: Cell) -> tuple[dict[str, Callable[[], object]], list[int], int]:
    """The parts of one arm's prefill, the layers they replay, and how many it serves."""
    probe = _Captures(cell.method, frozenset())
    Cell(cell.model, probe, cell.dense, cell.ids).prefill()
    served = sorted(probe.served)
    count = min(REPLAYED_LAYERS, len(served))
    spread = {served[round(i * (len(served) - 1) / max(1, count - 1))] for i in range(count)}
    captures = _Captures(cell.method, frozenset(spread))
    Cell(cell.model, captures, cell.dense, cell.ids).prefill()
    steps: dict[str, list[Callable[[], object]]] = {}
    for layer, (q, k, v, scale) in captures.inputs.items():
        for part, step in _parts(cell.method, q, k, v, scale, layer).items():
            steps.setdefault(part, []).append(step)

    def each(calls: list[Callable[[], object]]) -> Callable[[], None]:
        def run() -> None:
            for call in calls:
                call()

        return run

    parts: dict[str, Callable[[], object]] = {part: each(calls) for part, calls in steps.items()}
    bare = Cell(cell.model, _ReturnsQueries(), cell.dense, cell.ids)
    parts["rest"] = bare.prefill
    return parts, sorted(captures.inputs), len(served)


def _parts(
    method: PrefillMethod, q: Tensor, k: Tensor, v: Tensor, scale: float, layer: int
) -> Parts:
    if isinstance(method, PartedMethod):
        return method.parts(q, k, v, scale=scale, layer=layer)
    return {"attention": lambda: method.attend(q, k, v, scale=scale, layer=layer)}
