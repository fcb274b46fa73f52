"""The process that holds the model: one process start is one block of an experiment.

It runs what the parent lets it run and reports when. It neither reads energy nor writes the
run file; the parent does both, so that a killed worker loses nothing.
"""

import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from minference_green.breakdown import break_down
from minference_green.cell import Cell, repeats_for
from minference_green.channel import Channel, Message, die_with_parent
from minference_green.decide import decided
from minference_green.errors import GreenBenchError, UsageError
from minference_green.methods.auto import Auto
from minference_green.methods.backend import synchronize
from minference_green.methods.choose import method_from_name
from minference_green.methods.dense import BackendTimings, Dense, time_backends
from minference_green.methods.method import (
    PrefillMethod,
)
from minference_green.methods.official import check_shape
from minference_green.methods.sparse import SparsePrefill
from minference_green.model.attention import switched
from minference_green.model.decode import Decoder, RoomyCache
from minference_green.model.loading import LoadedModel, load
from minference_green.model.rest import fused, triton_pieces
from minference_green.observe import observe
from minference_green.results import Backends, Note, Phase, Skip
from minference_green.task import Task
from minference_green.torch_device import (
    describe_device,
    free_memory,
    peak_memory_bytes,
    reset_peak_memory,
    resolve_device,
)
from minference_green.workload import format_length


def main(read_fd: int, write_fd: int) -> int:
    """Serve one block over the channel; the exit code is 0 unless the parent went away."""

    def block(channel: Channel, task: Message, device: torch.device) -> None:
        serve(channel, Task.from_message(task), device)

    return work(read_fd, write_fd, block)


def work(read_fd: int, write_fd: int, job: Callable[[Channel, Message, torch.device], None]) -> int:
    """Do the parent's ``job`` on the device it names, and tell it of any error.

    The exit code is 0 unless the parent went away.
    """
    die_with_parent()
    with Channel(read_fd, write_fd) as channel:
        first = channel.receive()
        if first is not None and first["type"] == "wake":
            channel.send("awake")
            first = channel.receive()
        if first is None:
            return 1
        try:
            device = resolve_device(first["name"])
            answer = channel.ask("hello", device=describe_device(device))
            job(channel, answer["task"], device)
            channel.send("done")
        except GreenBenchError as error:
            channel.send("error", message=str(error), exit_code=int(error.exit_code))
        except (BrokenPipeError, EOFError):
            return 1
        except Exception as error:  # noqa: BLE001 - the last frame of a process must tell
            traceback.print_exc()  # to the worker's log, which the parent names
            channel.send("crash", message=f"{type(error).__name__}: {error}")
    return 0


def serve(channel: Channel, task: Task, device: torch.device) -> None:
    """Load, prepare every cell, observe, settle, measure: the block from start to end."""
    began = time.monotonic()
    model = load(
        task.workload.model,
        device=device,
        dtype=getattr(torch, task.workload.dtype),
        seed=task.workload.seed,
        allow_longer=task.allow_longer,
    )
    methods = methods_by_name(task.methods, task.options, model)
    with _rest(task, model) as rest:
        _serve(channel, task, model, methods, rest, began)


def _rest(task: Task, model: LoadedModel) -> AbstractContextManager[str]:
    """The model with everything but attention as asked for; says how it runs."""
    if task.rest == "stock":
        return nullcontext("stock")
    return fused(model.model, triton_pieces(model.model.device))


def _serve(
    channel: Channel,
    task: Task,
    model: LoadedModel,
    methods: dict[str, PrefillMethod],
    rest: str,
    began: float,
) -> None:
    device = model.model.device
    # Lengths the model refuses end the run before it has a file.
    prompts = {n: model.prompt(task.workload, n) for n in task.workload.context_lengths}
    if task.decode_tokens:
        RoomyCache(model.model, 0)  # as does a model that it refuses; allocates nothing
    loaded = time.monotonic()
    channel.ask("loaded", **identity(model, methods, rest), seconds=loaded - began)
    _note_dense_layers(channel, task, model)
    cells = _prepare(channel, task, model, methods, prompts)
    synchronize(device)
    channel.ask(
        "prepared", start=began, end=time.monotonic(), warmup_seconds=time.monotonic() - loaded
    )
    for length in task.workload.context_lengths:
        observe(channel, task, length, _arms(cells, length, methods), next(iter(methods)))
    _idle(channel, task, "before", device)
    for length in task.workload.context_lengths:
        arms = _arms(cells, length, methods)
        if not arms:
            continue
        if task.decode_tokens:
            _ready_to_decode(channel, task, length, arms)
        if length == task.workload.context_lengths[0]:
            _settle(channel, arms, task.warmup_seconds)
        _measure(channel, task, length, arms)
        for cell in arms.values():
            cell.decoder = None
        free_memory(device)
        if task.breakdown:
            break_down(channel, task, length, arms)
            free_memory(device)
    _idle(channel, task, "after", device)


def methods_by_name(
    asked: Sequence[str], options: Mapping[str, Mapping[str, str]], model: LoadedModel
) -> dict[str, PrefillMethod]:
    """The arms by the name each gives itself, in the order asked for.

    Raises ``UsageError`` for a method or option that does not exist or does not fit the model.
    """
    strangers = options.keys() - set(asked)
    if strangers:
        raise UsageError(
            f"--method-option is given for {', '.join(sorted(strangers))}, "
            f"but the methods are {', '.join(asked)}"
        )
    methods: dict[str, PrefillMethod] = {}
    for name in asked:
        method = method_from_name(
            name,
            options.get(name, {}),
            patterns=model.patterns,
            probe_patterns=model.probe_patterns,
        )
        budgets = method.sparse if isinstance(method, Auto) else method
        if isinstance(budgets, SparsePrefill) and isinstance(budgets.patterns, tuple):
            config = model.model.config.get_text_config()
            check_shape(
                budgets.patterns,
                n_layers=config.num_hidden_layers,
                n_heads=config.num_attention_heads,
                source=f"the pattern file of {name}",
            )
        if method.name in methods:
            raise UsageError(
                f"two methods call themselves {method.name}; an arm needs its own name"
            )
        methods[method.name] = method
    return methods


def identity(
    model: LoadedModel, methods: Mapping[str, PrefillMethod], rest: str = "stock"
) -> dict[str, Any]:
    """What the parent needs to say what was measured."""
    return {
        "model": model.spec,
        "revision": model.revision,
        "weights": model.weights,
        "parameters": model.parameters,
        "rest": rest,
        "methods": [{"name": m.name, "parameters": dict(m.parameters)} for m in methods.values()],
    }


def _note_dense_layers(channel: Channel, task: Task, model: LoadedModel) -> None:
    """Say which layers no method reaches; once a run."""
    if task.block > 0:
        return
    with switched(model.model, Dense(), dense=Dense()) as state:
        own = Counter(state.dense_layers.values())
    for reason, layers in own.items():
        note = Note(message=f"{layers} layers run dense in every arm: {reason}")
        channel.ask("record", record=note.model_dump(mode="json"))


def _prepare(
    channel: Channel,
    task: Task,
    model: LoadedModel,
    methods: dict[str, PrefillMethod],
    prompts: dict[int, Tensor],
) -> dict[tuple[int, str], Cell]:
    """Compile and warm every arm at every length once; a cell that does not fit is skipped."""
    cells: dict[tuple[int, str], Cell] = {}
    compiled: set[str] = set()
    for length, ids in prompts.items():
        try:
            dense = _choose_dense(channel, task, model, ids, methods)
        except torch.OutOfMemoryError as error:
            for name in methods:
                _skip(channel, task, length, name, error)
            free_memory(ids.device)
            continue
        for name, method in methods.items():
            if (length, name) in task.excluded:
                continue
            channel.ask("cell", step="preparing", context_length=length, method=name)
            try:
                cell = Cell(model, dense if isinstance(method, Dense) else method, dense, ids)
                if isinstance(method, Auto):
                    cell.method = decided(channel, task, method, cell)
                if task.decode_tokens:
                    cell.decoder = _decoder(cell, task)
                if name not in compiled:
                    cell.repeat(1)
                    compiled.add(name)
                cell.seconds = cell.repeat(1).seconds_each  # how many fit a window
                cell.decoder = None  # its memory is another cell's until this one is measured
            except torch.OutOfMemoryError as error:
                _skip(channel, task, length, name, error)
                continue
            finally:
                free_memory(ids.device)
            cells[length, name] = cell
    return cells


def _decoder(cell: Cell, task: Task) -> Decoder:
    batch, length = cell.ids.shape
    return Decoder(cell.model.model, batch=batch, length=length, tokens=task.decode_tokens)


def _ready_to_decode(channel: Channel, task: Task, length: int, arms: dict[str, Cell]) -> None:
    """Give the arms of a length a decoder that they share, capture it, and time each arm's.

    They can share it because decode is dense in every arm, by the same kernel.
    """
    first, *_ = arms
    channel.ask("cell", step="capturing decode of", context_length=length, method=first)
    decoder = _decoder(arms[first], task)
    for cell in arms.values():
        cell.decoder = decoder
    refusal = arms[first].capture()
    if refusal and task.block == 0:
        text = (
            f"decode at {format_length(length)} runs without CUDA graphs, so the GPU waits for "
            f"Python at every token and its joules wander: {refusal}"
        )
        channel.ask("record", record=Note(message=text).model_dump(mode="json"))
    for cell in arms.values():
        cell.decode_seconds = cell.decode(1, lambda: None).seconds_each


class TimesBackends:
    """Dense attention that times every backend on the first layer's own inputs."""

    name = "dense"
    parameters: Mapping[str, Any] = MappingProxyType({})

    def __init__(self) -> None:
        self.timings: BackendTimings | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, layer: int) -> Tensor:
        """See :class:`methods.method.PrefillMethod`; ``timings`` are set after the first call."""
        if self.timings is None:
            self.timings = time_backends(q, k, v, scale=scale)
        return Dense(self.timings.fastest).attend(q, k, v, scale=scale, layer=layer)


def _choose_dense(
    channel: Channel,
    task: Task,
    model: LoadedModel,
    ids: Tensor,
    methods: Mapping[str, PrefillMethod],
) -> Dense:
    """The dense kernel of this length: the user's, the one on file, or the fastest now."""
    length = ids.shape[1]
    for method in methods.values():
        if isinstance(method, Dense) and method.backend is not None:
            return method
    if length in task.backends:
        return Dense(task.backends[length])
    probe = TimesBackends()
    Cell(model, probe, Dense(), ids).prefill()
    assert probe.timings is not None
    record = Backends(
        block=task.block,
        context_length=length,
        dtype=task.workload.dtype,
        seconds=probe.timings.seconds,
        reasons=probe.timings.reasons,
        chosen=probe.timings.fastest,
    )
    channel.ask("record", record=record.model_dump(mode="json"))
    return Dense(probe.timings.fastest)


def _skip(channel: Channel, task: Task, length: int, name: str, error: BaseException) -> None:
    first_line = str(error).strip().splitlines()[0]
    record = Skip(
        block=task.block,
        context_length=length,
        method=name,
        reason=f"out of memory at {format_length(length)}: {first_line}",
    )
    channel.ask("record", record=record.model_dump(mode="json"))


def _arms(
    cells: dict[tuple[int, str], Cell], length: int, methods: dict[str, PrefillMethod]
) -> dict[str, Cell]:
    """The cells of one length that are to be measured, in the order of the methods."""
    return {name: cells[length, name] for name in methods if (length, name) in cells}


def _idle(channel: Channel, task: Task, when: str, device: torch.device) -> None:
    synchronize(device)
    channel.ask("ready")
    start = time.monotonic()
    time.sleep(task.idle_seconds)
    channel.ask("idle", when=when, start=start, end=time.monotonic())


def _settle(channel: Channel, arms: dict[str, Cell], limit_seconds: float) -> None:
    """Run the arms in turn until three rounds agree in time and temperature, or the limit.

    Where three rounds cannot fit there is nothing to tell a warm arm by, and none is run.
    """
    if 3 * sum(cell.seconds for cell in arms.values()) > limit_seconds:
        return
    deadline = time.monotonic() + limit_seconds
    rounds: list[tuple[float, float | None]] = []
    while time.monotonic() + sum(c.seconds for c in arms.values()) <= deadline:
        took = 0.0
        for cell in arms.values():
            cell.seconds = cell.repeat(1).seconds_each
            took += cell.seconds
        rounds.append((took, channel.ask("temperature")["celsius"]))
        if settled(rounds):
            return


def settled(rounds: Sequence[tuple[float, float | None]]) -> bool:
    """Whether the last three (seconds, temperature) differ by under 0.5 % and 1 degree."""
    if len(rounds) < 3:
        return False
    seconds = [r[0] for r in rounds[-3:]]
    celsius = [r[1] for r in rounds[-3:] if r[1] is not None]
    steady = max(seconds) - min(seconds) < 0.005 * min(seconds)
    return steady and (not celsius or max(celsius) - min(celsius) <= 1.0)


def window_order(
    methods: Sequence[str], block: int, phases: Sequence[Phase] = ("prefill",)
) -> list[tuple[Phase, str]]:
    """ABBA for two arms, there and back for more; the starting arm rotates with the block.

    There and back gives every arm in every phase the same mean position, so a linear drift
    cancels: between the arms, and between a request and its parts.
    """
    shift = block % len(methods)
    forth = [(phase, name) for phase in phases for name in (*methods[shift:], *methods[:shift])]
    return forth + forth[::-1]


def _measure(channel: Channel, task: Task, length: int, arms: dict[str, Cell]) -> None:
    phases: tuple[Phase, ...] = ("prefill",)
    if task.decode_tokens:
        phases = ("prefill", "decode", "request")
    generated = max(0, task.decode_tokens - 1)
    for order, (phase, name) in enumerate(window_order(list(arms), task.block, phases)):
        cell = arms[name]
        channel.ask("cell", step=f"measuring {phase} of", context_length=length, method=name)
        batch, prompt = cell.ids.shape

        def ready(name: str = name, cell: Cell = cell) -> None:
            channel.ask("ready", context_length=length, method=name)
            reset_peak_memory(cell.ids.device)

        match phase:
            case "prefill":
                repeats = repeats_for(task.window_seconds, cell.seconds)
                ready()
                took = cell.repeat(repeats, task.window_seconds)
                cell.seconds = took.seconds_each
                tokens = prompt
            case "decode":
                repeats = repeats_for(task.window_seconds, cell.decode_seconds)
                took = cell.decode(repeats, ready, task.window_seconds)
                tokens = generated
            case "request":
                repeats = repeats_for(task.window_seconds, cell.seconds + cell.decode_seconds)
                ready()
                took = cell.request(repeats, task.window_seconds)
                tokens = prompt + generated
        channel.ask(
            "window",
            context_length=length,
            method=name,
            phase=phase,
            order=order,
            tokens=took.repeats * batch * tokens,
            **took._asdict(),
            peak_memory_bytes=peak_memory_bytes(cell.ids.device),
        )


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
