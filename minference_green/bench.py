"""The measuring loop: blocks of interleaved windows, each on disk before the next begins.

The parent that runs here never imports torch. Per block it starts one worker process that
holds the model; the meters, the run file and Ctrl-C belong to the parent.
"""

import secrets
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from shlex import quote
from typing import Literal, Protocol

from pydantic import Field

import minference_green
from minference_green.carbon import terms
from minference_green.channel import Message, WorkerProcess
from minference_green.errors import (
    ExitCode,
    GreenBenchError,
    NotComparableError,
    UsageError,
)
from minference_green.journal import Journal, Record, Seal, stored_request
from minference_green.parent import (
    LOG_NAME,
    Cell,
    Metering,
    changes,
    converse,
    failure,
    fingerprint_of,
    gpus_of,
    killed_in,
    new_journal,
    terminate_as_interrupt,
    timestamp,
)
from minference_green.results import (
    EVENT,
    FILE_NAME,
    Backends,
    BlockDone,
    Decision,
    Event,
    Extension,
    Header,
    Idle,
    MethodSpec,
    Observation,
    Plan,
    Reading,
    Replay,
    Run,
    Setup,
    Skip,
    Window,
    load,
)
from minference_green.validity import distrusted, doubts
from minference_green.workload import SYNTHETIC, Workload, format_length

IDLE_SECONDS = {"gpu": 2.0, "cpu": 0.5}
"""Longest idle interval before and after a block."""

AHEAD = 6
"""Most workers started together. Loading libraries is most of what a short block costs; workers
that load them side by side, before any of their blocks begins, disturb none and then sleep."""


class Grid(Record):
    """Where the electricity comes from; the arguments of ``carbon.terms``."""

    country: str | None = None
    region: str | None = None
    cloud: str | None = None
    intensity: float | None = None
    intensity_source: str | None = None
    pue: float = 1.0
    embodied_g_per_second: float | None = None
    """For everything reserved, in place of the default per GPU."""
    embodied_source: str | None = None


class Request(Record):
    """Everything a run was asked to do; stored in its header so that it can be resumed.

    What is ``None``, ``auto`` or empty is decided by :func:`resolve` once the device is known.
    """

    model: str = "embedded"
    methods: tuple[str, ...] = ("dense", "minference")
    """The first is the reference of every comparison."""
    options: dict[str, dict[str, str]] = Field(default_factory=dict)
    """Method name to option name to value, as typed."""
    context_lengths: tuple[int, ...] = ()
    batch: int = 1
    dtype: str = "auto"
    seed: int = 0
    prompt: str = SYNTHETIC
    prompt_sha256: str | None = None
    blocks: int | None = None
    window_seconds: float | None = None
    warmup_seconds: float | None = None
    decode_tokens: int = 0
    breakdown: bool = False
    grid: Grid = Grid()
    device: str = "auto"
    meter: str = "auto"
    allow_shared: bool = False
    allow_longer: bool = False
    rest: Literal["stock", "fused"] = "stock"
    """Everything of the model but attention: as transformers runs it, or its small steps fused."""
    command: tuple[str, ...] = ()


def resolve(request: Request, kind: str) -> tuple[Workload, Plan]:
    """What a request means on a ``gpu`` or a ``cpu``.

    On a CPU one length and three blocks of short windows give a first answer within a
    minute, marked ``quick``. On a GPU 5 s windows resolve a 100 ms counter to under 0.1 %.
    Raises ``UsageError`` for a prompt in which no method has anything to choose.
    """
    gpu = kind == "gpu"
    lengths = request.context_lengths or ((32 * 1024, 128 * 1024) if gpu else (8 * 1024,))
    if min(lengths) < 2:
        raise UsageError(
            f"a context length of {min(lengths)} leaves nothing to compare: a first token has only "
            "itself to attend to, so every method runs dense; give 2 tokens or more"
        )
    workload = Workload(
        model=request.model,
        context_lengths=tuple(sorted(set(lengths))),
        batch=request.batch,
        dtype=("bfloat16" if gpu else "float32") if request.dtype == "auto" else request.dtype,
        seed=request.seed,
        prompt=request.prompt,
        prompt_sha256=request.prompt_sha256,
    )
    plan = Plan(
        blocks=request.blocks or (6 if gpu else 3),
        window_seconds=request.window_seconds or (5.0 if gpu else 2.0),
        warmup_seconds=(
            (120.0 if gpu else 5.0) if request.warmup_seconds is None else request.warmup_seconds
        ),
        quick=not gpu,
        decode_tokens=request.decode_tokens,
    )
    return workload, plan


class Progress(Protocol):
    """Where a run tells how far it is."""

    def block(self, number: int, of: int, windows: int, window_seconds: float) -> None:
        """A block begins, with that many windows of about that length."""

    def say(self, message: str) -> None:
        """What is happening now."""

    def advance(self) -> None:
        """One window is on disk."""


class InterruptedRunError(GreenBenchError):
    """The user stopped the run; what is finished is on disk."""

    exit_code = ExitCode.INTERRUPTED

    def __init__(self, directory: Path, run: Sequence[Event], *, started: bool) -> None:
        go_on = (
            "finished windows are kept. Go on with: "
            f"green-bench run --resume {directory.name} "
            f"--output {quote(str(directory.parent))}"
            if started
            else "nothing had been measured yet"
        )
        super().__init__(f"interrupted; {go_on}")
        self.directory = directory
        self.has_windows = any(isinstance(e, Window) for e in run)


def run(request: Request, output: Path, progress: Progress) -> Path:
    """Measure ``request`` into a new directory under ``output``; returns that directory.

    Raises ``UsageError`` for what cannot be run, ``MeasurementError`` for what cannot be
    measured, ``InterruptedRunError`` on Ctrl-C; windows finished by then are on disk.
    """
    resolve(request, "gpu")  # what cannot be compared cannot be on any device
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    directory = output / f"{stamp}-{secrets.token_hex(2)}"
    with new_journal(directory / FILE_NAME) as journal:
        _Experiment(request, directory, journal, None, progress).run()
    return directory


def resume(directory: Path, progress: Progress) -> Path:
    """Go on with an unfinished run until it has all its blocks; returns ``directory``.

    Raises as :func:`run` does, and ``NotComparableError`` where machine, model or code are not
    what the run began with.
    """
    _continue(directory, progress, None)
    return directory


def extend(directory: Path, blocks: int, reason: str, progress: Progress) -> Path:
    """Give a run more blocks, ``blocks`` in all; ``reason`` goes into its file.

    Raises as :func:`resume` does, and ``UsageError`` if the run already plans more.
    """
    _continue(directory, progress, (blocks, reason))
    return directory


def _continue(directory: Path, progress: Progress, extension: tuple[int, str] | None) -> None:
    if not (directory / FILE_NAME).is_file():
        raise UsageError(
            f"there is no run at {directory}; give the ID and the --output of an interrupted run"
        )
    with Journal(directory / FILE_NAME) as journal:
        so_far = load(directory)
        request = stored_request(Request, so_far.header.request, so_far.header.version)
        experiment = _Experiment(request, directory, journal, so_far, progress)
        if extension:
            experiment.extend(*extension)
        experiment.run()


class _Experiment:
    """One run in progress: what the file holds so far, and the conversation with a worker."""

    def __init__(
        self,
        request: Request,
        directory: Path,
        journal: Journal,
        so_far: Run | None,
        progress: Progress,
    ) -> None:
        self.request = request
        self.directory = directory
        self.journal = journal
        self.header = so_far.header if so_far else None
        self.blocks_planned = so_far.blocks_planned if so_far else 0
        self.events: list[Event] = list(so_far.events) if so_far else []
        self.progress = progress
        self.metering = Metering(request.meter, allow_shared=request.allow_shared)
        self.waiting: list[WorkerProcess] = []
        """Workers of the next blocks: started, and asleep."""

    def run(self) -> None:
        """Every block still missing, each in a worker of its own."""
        try:
            with terminate_as_interrupt():
                while self.blocks_missing != 0:
                    self._run_block()
            if not (self.events and isinstance(self.events[-1], Seal)):
                self.events.append(self.journal.seal())
        except KeyboardInterrupt:
            started = self.header is not None
            raise InterruptedRunError(self.directory, self.events, started=started) from None
        finally:
            for worker in self.waiting:
                worker.discard()
            self.metering.close()

    def extend(self, blocks: int, reason: str) -> None:
        """Plan ``blocks`` in all from here on."""
        if blocks < self.blocks_planned:
            raise UsageError(
                f"run {self.directory.name} already plans {self.blocks_planned} blocks; "
                f"it cannot be extended to {blocks}"
            )
        if blocks > self.blocks_planned:
            self.record(Extension(blocks=blocks, created_at=timestamp(), reason=reason))
            self.blocks_planned = blocks

    @property
    def blocks_missing(self) -> int | None:
        """Blocks still to measure; unknown until the first worker has named its device."""
        if self.header is None:
            return None
        return max(0, self.blocks_planned - self.blocks_done)

    @property
    def blocks_done(self) -> int:
        """Blocks whose worker finished."""
        return sum(isinstance(e, BlockDone) for e in self.events)

    def _run_block(self) -> None:
        # A block cut short is measured anew under its number; readers take its last start.
        block = self.blocks_done
        worker = self._next_worker(block)
        conversation = _Conversation(self, block, worker)
        try:
            converse(worker, self.request.device, conversation.answer)
        except (EOFError, BrokenPipeError):
            self.record(killed_in(conversation.cell, block, worker))
        finally:
            worker.stop()
        self.record(BlockDone(block=block))

    def _next_worker(self, block: int) -> WorkerProcess:
        """The next block's process; until a device is known, as many as were asked for."""
        if not self.waiting:
            count = min(self.blocks_missing or self.request.blocks or 1, AHEAD)
            self.progress.say(f"starting {count} process{'es' if count > 1 else ''}")
            for _ in range(count):
                worker = WorkerProcess("minference_green.worker", self.directory / LOG_NAME)
                self.waiting.append(worker)
            for worker in self.waiting:
                if not worker.awake():
                    self.record(killed_in(None, block, worker))
        return self.waiting.pop(0)

    def record(self, event: Event) -> None:
        """Put a record on disk and in memory."""
        # Memory first: Ctrl-C while the disk is being waited for must not forget a window that
        # is on it already.
        self.events.append(event)
        self.journal.append(event)

    def task(self, block: int, kind: str) -> Message:
        """What a worker is asked to do, with what earlier blocks settled."""
        request, events = self.request, self.events
        if self.header is None:
            workload, plan = resolve(request, kind)
        else:
            workload, plan = self.header.workload, self.header.plan
        phases = 3 if plan.decode_tokens else 1
        windows = 2 * phases * len(workload.context_lengths) * len(request.methods)
        planned = plan.blocks if self.header is None else self.blocks_planned
        self.progress.block(block + 1, planned, windows, plan.window_seconds)
        return {
            "block": block,
            "workload": asdict(workload),
            "methods": request.methods,
            "options": request.options,
            "allow_longer": request.allow_longer,
            "rest": request.rest,
            "window_seconds": plan.window_seconds,
            "warmup_seconds": plan.warmup_seconds,
            "decode_tokens": plan.decode_tokens,
            "breakdown": request.breakdown and block == 0,
            "idle_seconds": min(IDLE_SECONDS[kind], plan.window_seconds),
            "backends": {e.context_length: e.chosen for e in events if isinstance(e, Backends)},
            "decisions": [e.model_dump(mode="json") for e in events if isinstance(e, Decision)],
            "observed": [
                (e.context_length, e.method) for e in events if isinstance(e, Observation)
            ],
            "excluded": [(e.context_length, e.method) for e in events if isinstance(e, Skip)],
        }

    @property
    def distrusted(self) -> dict[str, str]:
        """Why readings of a device are disputed; from the header, so that it can be checked."""
        return distrusted(self.header.fingerprint) if self.header else {}

    def identify(self, device: Message, loaded: Message) -> None:
        """Write the header, or refuse to go on with a run whose ground has changed."""
        workload, plan = resolve(self.request, device["kind"])
        found = fingerprint_of(device, loaded, workload, self.metering)
        if self.header is None:
            self.header = Header(
                run_id=self.directory.name,
                created_at=timestamp(),
                version=minference_green.__version__,
                command=self.request.command,
                fingerprint=found,
                workload=workload,
                methods=tuple(MethodSpec(**m) for m in loaded["methods"]),
                plan=plan,
                carbon=terms(**self.request.grid.model_dump(), gpus=len(gpus_of(device))),
                energy=self.metering.description,
                request=self.request.model_dump(mode="json"),
            )
            self.journal.append(self.header)
            self.blocks_planned = plan.blocks
        elif changed := changes(self.header.fingerprint, found):
            raise NotComparableError(
                f"run {self.header.run_id} cannot go on here: {'; '.join(changed)}. "
                "Start a new run, or return to what was."
            )


class _Conversation:
    """Answers one worker: when it may run, and what its intervals cost."""

    def __init__(self, experiment: _Experiment, block: int, worker: WorkerProcess) -> None:
        self.experiment, self.block, self.worker = experiment, block, worker
        self.metering = experiment.metering
        self.cell: Cell | None = None
        self.device: Message = {}
        self.load_seconds = 0.0

    def answer(self, message: Message) -> Message:
        """What the worker gets back for a message."""
        experiment = self.experiment
        match message["type"]:
            case "hello":
                self.device = message["device"]
                self.metering.open(self.device)
                self.metering.begin()
                return {"task": experiment.task(self.block, self.device["kind"])}
            case "loaded":
                self.load_seconds = message["seconds"]
                experiment.identify(self.device, message)
            case "cell":
                self.cell = (message["context_length"], message["method"])
                length = format_length(message["context_length"])
                experiment.progress.say(f"{message['step']} {message['method']} at {length}")
            case "prepared":
                experiment.record(
                    Setup(
                        block=self.block,
                        load_seconds=self.load_seconds,
                        warmup_seconds=message["warmup_seconds"],
                        readings=self._end(message),
                    )
                )
            case "record":
                experiment.record(EVENT.validate_python(message["record"]))
            case "temperature":
                return {"celsius": self._temperature()}
            case "ready":
                self.metering.begin()
            case "idle":
                experiment.record(
                    Idle(
                        block=self.block,
                        when=message["when"],
                        seconds=message["end"] - message["start"],
                        readings=self._end(message),
                    )
                )
            case "window":
                experiment.record(self._window(message))
                experiment.progress.advance()
            case "replay":
                experiment.record(self._replay(message))
            case "error" | "crash":
                raise failure(message, self.worker.log)
            case unknown:
                raise AssertionError(unknown)
        return {}

    def _end(self, message: Message) -> tuple[Reading, ...]:
        return self._disputed(self.metering.end(message["start"], message["end"]))

    def _disputed(self, readings: tuple[Reading, ...]) -> tuple[Reading, ...]:
        """Readings, those of distrusted devices marked."""
        disputed = {"disputed": True}
        return tuple(
            r.model_copy(update=disputed) if r.device in self.experiment.distrusted else r
            for r in readings
        )

    def _temperature(self) -> float | None:
        known = [s.temperature_celsius for s in self.metering.state()]
        return max((t for t in known if t is not None), default=None)

    def _replay(self, message: Message) -> Replay:
        readings = self._end(message)
        start, end = message["start"], message["end"]
        valid, reasons = doubts(
            end - start,
            message["device_seconds"],
            readings,
            self.metering.before,
            self.metering.state(),
            self.experiment.distrusted,
        )
        return Replay(
            block=self.block,
            context_length=message["context_length"],
            method=message["method"],
            part=message["part"],
            layers=message["layers"],
            layers_in_all=message["layers_in_all"],
            repeats=message["repeats"],
            start_seconds=start,
            end_seconds=end,
            readings=readings,
            valid=valid,
            reasons=reasons,
        )

    def _window(self, message: Message) -> Window:
        """The window as a record; one whose energy cannot be read is kept as invalid.

        The second such window in a row ends the run.
        """
        now = datetime.now(UTC)
        read, unread = self.metering.end_or_reason(message["start"], message["end"])
        readings = self._disputed(read)
        after = self.metering.state()
        seconds = message["end"] - message["start"]
        valid, reasons = doubts(
            seconds,
            message["device_seconds"],
            readings,
            self.metering.before,
            after,
            self.experiment.distrusted,
        )
        return Window(
            block=self.block,
            order=message["order"],
            context_length=message["context_length"],
            method=message["method"],
            phase=message["phase"],
            repeats=message["repeats"],
            tokens=message["tokens"],
            start_seconds=message["start"],
            end_seconds=message["end"],
            device_seconds=message["device_seconds"],
            peak_memory_bytes=message["peak_memory_bytes"],
            started_at=(now - timedelta(seconds=seconds)).isoformat(timespec="seconds"),
            readings=readings,
            before=self.metering.before,
            after=after,
            valid=valid and not unread,
            reasons=(*unread, *reasons),
        )
