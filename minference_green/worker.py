"""The process that holds the model: one process start is one block of an experiment.

It runs what the parent lets it run and reports when. It neither reads energy nor writes the
run file; the parent does both, so that a killed worker loses nothing.
"""

import gc
import math
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor

from minference_green.channel import Channel, die_with_parent
from minference_green.errors import GreenBenchError, UsageError
from minference_green.methods.choose import method_from_name
from minference_green.methods.dense import BackendTimings, Dense, time_backends
from minference_green.methods.method import (
    PartedMethod,
    Parts,
    PrefillMethod,
    ProfiledMethod,
)
from minference_green.methods.official import check_shape
from minference_green.methods.sparse import SparsePrefill
from minference_green.model.attention import switched
from minference_green.model.loading import LoadedModel, load
from minference_green.results import Backends, Note, Observation, Phase, Skip
from minference_green.workload import Workload, format_length

SAMPLED_POSITIONS = 256
"""Prompt positions whose most likely next token is compared with the reference arm's."""

REPLAYED_LAYERS = 4
"""Layers whose inputs a breakdown replays: their heads' patterns differ between layers, and
keeping all of them would not fit into memory at long context."""

DENSITY_WARNING = 0.8
"""Above this a sparse method computes nearly everything and is a dense one with overhead."""


@dataclass(frozen=True)
class Task:
    """What the parent asks of one worker."""

    block: int
    workload: Workload
    methods: tuple[str, ...]
    options: dict[str, dict[str, str]]
    allow_longer: bool
    window_seconds: float
    warmup_seconds: float
    decode_tokens: int
    breakdown: bool
    idle_seconds: float
    backends: dict[int, str]
    """Dense backend already chosen, by context length."""
    observed: tuple[tuple[int, str], ...]
    """Cells whose observation is on file."""
    excluded: tuple[tuple[int, str], ...]
    """Cells not to run: an earlier worker died in them."""

    @classmethod
    def from_message(cls, fields: dict[str, Any]) -> "Task":
        """Rebuild from JSON."""
        workload = dict(fields["workload"])
        workload["context_lengths"] = tuple(workload["context_lengths"])
        return cls(
            block=fields["block"],
            workload=Workload(**workload),
            methods=tuple(fields["methods"]),
            options=fields["options"],
            allow_longer=fields["allow_longer"],
            window_seconds=fields["window_seconds"],
            warmup_seconds=fields["warmup_seconds"],
            decode_tokens=fields["decode_tokens"],
            breakdown=fields["breakdown"],
            idle_seconds=fields["idle_seconds"],
            backends={int(k): v for k, v in fields["backends"].items()},
            observed=tuple((n, m) for n, m in fields["observed"]),
            excluded=tuple((n, m) for n, m in fields["excluded"]),
        )


Interval = tuple[float, float, float | None]
"""Monotonic start and end, and seconds by device events; null on a CPU."""


class Cache(Protocol):
    """What is used of a model's cache."""

    def crop(self, max_length: int) -> None:
        """Shorten by ``-max_length`` tokens."""


class Cell:
    """One arm at one context length, ready to prefill."""

    def __init__(
        self, model: LoadedModel, method: PrefillMethod, dense: Dense, ids: Tensor
    ) -> None:
        self.model, self.method, self.dense, self.ids = model, method, dense, ids
        self.seconds = 0.0
        self.decode_seconds = 0.0

    @torch.inference_mode()
    def prefill(self, keep: int | Tensor = 1) -> Tensor:
        """Logits ``[B, kept, vocabulary]`` of one prefill that fills a fresh cache."""
        with switched(self.model.model, self.method, dense=self.dense):
            return self._forward(keep)

    def _forward(self, keep: int | Tensor) -> Tensor:
        out = self.model.model(input_ids=self.ids, use_cache=True, logits_to_keep=keep)
        logits: Tensor = out.logits
        return logits

    @torch.inference_mode()
    def repeat(self, times: int) -> Interval:
        """Prefill ``times`` times."""
        with switched(self.model.model, self.method, dense=self.dense):
            return self._timed(times, lambda: self._forward(1))

    @torch.inference_mode()
    def decode(self, times: int, tokens: int, ready: Callable[[], object]) -> Interval:
        """Generate ``tokens`` greedily over one prompt's cache, ``times`` times.

        The prefill, which produces the first of them, is done before ``ready`` is called, and
        the interval begins after it. Each repeat begins again at the prompt's end. Attention is
        dense over the cache that the method's prefill left.
        """
        with switched(self.model.model, self.method, dense=self.dense):
            cache, first = self._prefilled()
            synchronize(self.ids.device)
            ready()

            def once() -> None:
                self._generate(cache, first, tokens)
                cache.crop(1 - tokens)

            return self._timed(times, once)

    @torch.inference_mode()
    def request(self, times: int, tokens: int) -> Interval:
        """Prefill and generate ``tokens``, ``times`` times, each with a cache of its own."""
        with switched(self.model.model, self.method, dense=self.dense):
            return self._timed(times, lambda: self._generate(*self._prefilled(), tokens))

    def _prefilled(self) -> tuple[Cache, Tensor]:
        """The cache of one prefill, and the token it produced for each sequence."""
        out = self.model.model(input_ids=self.ids, use_cache=True, logits_to_keep=1)
        return out.past_key_values, out.logits[:, -1:].argmax(-1)

    def _generate(self, cache: Cache, token: Tensor, tokens: int) -> None:
        for _ in range(tokens - 1):
            out = self.model.model(
                input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1
            )
            token = out.logits[:, -1:].argmax(-1)

    @torch.inference_mode()
    def repeat_step(self, times: int, step: Callable[[], object]) -> Interval:
        """Repeat anything on the model's device."""
        return self._timed(times, step)

    def _timed(self, times: int, step: Callable[[], object]) -> Interval:
        synchronize(self.ids.device)
        marks = _events(self.ids.device)
        start = time.monotonic()
        if marks:
            marks[0].record()
        for _ in range(times):
            step()
        if marks:
            marks[1].record()
        synchronize(self.ids.device)
        end = time.monotonic()
        return start, end, marks[0].elapsed_time(marks[1]) / 1e3 if marks else None


def _events(device: torch.device) -> tuple[torch.cuda.Event, torch.cuda.Event] | None:
    if device.type != "cuda":
        return None
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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


def main(read_fd: int, write_fd: int) -> int:
    """Serve one block over the channel; the exit code is 0 unless the parent went away."""
    die_with_parent()
    with Channel(read_fd, write_fd) as channel:
        first = channel.receive()
        if first is None:
            return 1
        try:
            device = resolve_device(first["name"])
            answer = channel.ask("hello", device=describe_device(device))
            serve(channel, Task.from_message(answer["task"]), device)
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
    methods = _methods(task, model)
    # Lengths the model refuses end the run before it has a file.
    prompts = {n: model.prompt(task.workload, n) for n in task.workload.context_lengths}
    loaded = time.monotonic()
    channel.ask("loaded", **_identity(model, methods), seconds=loaded - began)
    _note_dense_layers(channel, task, model)
    cells = _prepare(channel, task, model, methods, prompts)
    synchronize(device)
    channel.ask(
        "prepared", start=began, end=time.monotonic(), warmup_seconds=time.monotonic() - loaded
    )
    for length in task.workload.context_lengths:
        _observe(channel, task, length, _arms(cells, length, methods))
    _idle(channel, task, "before", device)
    for length in task.workload.context_lengths:
        arms = _arms(cells, length, methods)
        if not arms:
            continue
        if length == task.workload.context_lengths[0]:
            _settle(channel, arms, task.warmup_seconds)
        _measure(channel, task, length, arms)
        _free(device)
        if task.breakdown:
            _break_down(channel, task, length, arms)
            _free(device)
    _idle(channel, task, "after", device)


def _methods(task: Task, model: LoadedModel) -> dict[str, PrefillMethod]:
    """The arms by the name each gives itself, in the order asked for."""
    strangers = task.options.keys() - set(task.methods)
    if strangers:
        raise UsageError(
            f"--method-option is given for {', '.join(sorted(strangers))}, "
            f"but the methods are {', '.join(task.methods)}"
        )
    methods: dict[str, PrefillMethod] = {}
    for asked in task.methods:
        method = method_from_name(asked, task.options.get(asked, {}), patterns=model.patterns)
        if isinstance(method, SparsePrefill) and isinstance(method.patterns, tuple):
            config = model.model.config.get_text_config()
            check_shape(
                method.patterns,
                n_layers=config.num_hidden_layers,
                n_heads=config.num_attention_heads,
                source=f"the pattern file of {asked}",
            )
        if method.name in methods:
            raise UsageError(
                f"two methods call themselves {method.name}; an arm needs its own name"
            )
        methods[method.name] = method
    return methods


def _identity(model: LoadedModel, methods: dict[str, PrefillMethod]) -> dict[str, Any]:
    return {
        "model": model.spec,
        "revision": model.revision,
        "weights": model.weights,
        "parameters": model.parameters,
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
            _free(ids.device)
            continue
        for name, method in methods.items():
            if (length, name) in task.excluded:
                continue
            channel.ask("cell", step="preparing", context_length=length, method=name)
            arm = dense if isinstance(method, Dense) else method
            cell = Cell(model, arm, dense, ids)
            try:
                if name not in compiled:
                    cell.repeat(1)
                    compiled.add(name)
                start, end, _ = cell.repeat(1)  # how many fit a window
                cell.seconds = end - start
                if task.decode_tokens:
                    start, end, _ = cell.decode(1, task.decode_tokens, lambda: None)
                    cell.decode_seconds = end - start
            except torch.OutOfMemoryError as error:
                _skip(channel, task, length, name, error)
                continue
            finally:
                _free(ids.device)
            cells[length, name] = cell
    return cells


class _TimesBackends:
    """Dense attention that times every backend on the first layer's own inputs."""

    name = "dense"
    parameters: Mapping[str, Any] = MappingProxyType({})

    def __init__(self) -> None:
        self.timings: BackendTimings | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, layer: int) -> Tensor:
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
    probe = _TimesBackends()
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


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


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


def _arms(
    cells: dict[tuple[int, str], Cell], length: int, methods: dict[str, PrefillMethod]
) -> dict[str, Cell]:
    """The cells of one length that are to be measured, in the order of the methods."""
    return {name: cells[length, name] for name in methods if (length, name) in cells}


def _observe(channel: Channel, task: Task, length: int, arms: dict[str, Cell]) -> None:
    """Density, time of the steps, and output error against the first arm; unmetered."""
    missing = [name for name in arms if (length, name) not in task.observed]
    reference: tuple[Tensor, Tensor] | None = None
    for order, (name, cell) in enumerate(arms.items()):
        if name not in missing and (order > 0 or not missing):
            continue
        positions = _sampled_positions(length, cell.ids.device)
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
            _free(cell.ids.device)
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


def _sampled_positions(length: int, device: torch.device) -> Tensor:
    """Positions spread evenly over the prompt, the last one always among them."""
    count = min(SAMPLED_POSITIONS, length)
    return (
        torch.linspace(length / count, length, count, dtype=torch.float64)
        .round()
        .long()
        .sub(1)
        .to(device)
    )


def _idle(channel: Channel, task: Task, when: str, device: torch.device) -> None:
    synchronize(device)
    channel.ask("ready")
    start = time.monotonic()
    time.sleep(task.idle_seconds)
    channel.ask("idle", when=when, start=start, end=time.monotonic())


def _settle(channel: Channel, arms: dict[str, Cell], limit_seconds: float) -> None:
    """Run the arms in turn until three rounds agree in time and temperature, or the limit."""
    deadline = time.monotonic() + limit_seconds
    rounds: list[tuple[float, float | None]] = []
    while time.monotonic() + sum(c.seconds for c in arms.values()) <= deadline:
        took = 0.0
        for cell in arms.values():
            start, end, _ = cell.repeat(1)
            cell.seconds = end - start
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
            _reset_peak_memory(cell.ids.device)

        match phase:
            case "prefill":
                repeats = _repeats(task, cell.seconds)
                ready()
                start, end, device_seconds = cell.repeat(repeats)
                cell.seconds = (end - start) / repeats
                tokens = prompt
            case "decode":
                repeats = _repeats(task, cell.decode_seconds)
                start, end, device_seconds = cell.decode(repeats, task.decode_tokens, ready)
                tokens = generated
            case "request":
                repeats = _repeats(task, cell.seconds + cell.decode_seconds)
                ready()
                start, end, device_seconds = cell.request(repeats, task.decode_tokens)
                tokens = prompt + generated
        channel.ask(
            "window",
            context_length=length,
            method=name,
            phase=phase,
            order=order,
            repeats=repeats,
            tokens=repeats * batch * tokens,
            start=start,
            end=end,
            device_seconds=device_seconds,
            peak_memory_bytes=_peak_memory_bytes(cell.ids.device),
        )


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


def _break_down(channel: Channel, task: Task, length: int, arms: dict[str, Cell]) -> None:
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
                start, end, _ = cell.repeat_step(1, step)
                repeats = _repeats(task, end - start)
                channel.ask("ready", context_length=length, method=name)
                start, end, device_seconds = cell.repeat_step(repeats, step)
                channel.ask(
                    "replay",
                    context_length=length,
                    method=name,
                    part=part,
                    layers=[] if part == "rest" else layers,
                    layers_in_all=in_all,
                    repeats=repeats,
                    start=start,
                    end=end,
                    device_seconds=device_seconds,
                )
        except torch.OutOfMemoryError as error:
            first_line = str(error).strip().splitlines()[0]
            text = f"{name} at {format_length(length)} not broken down: {first_line}"
            channel.ask("record", record=Note(message=text).model_dump(mode="json"))
        finally:
            _free(cell.ids.device)


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


def _repeats(task: Task, seconds: float) -> int:
    """How often to repeat what takes ``seconds``, so that a window is filled."""
    # A twentieth more than asked, so that a slightly faster repeat is not a short window.
    return max(1, math.ceil(1.05 * task.window_seconds / seconds))


def _reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak_memory_bytes(device: torch.device) -> int | None:
    """Most memory allocated since the reset; the CPU's allocator does not tell."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
