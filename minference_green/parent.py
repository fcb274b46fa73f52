"""What a parent process needs around a worker that it measures.

Its journal, its energy sources, the conversation with the worker and how that can end; the
identity of what is measured, and interruption.
"""

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from minference_green import fingerprint
from minference_green.channel import Message, WorkerProcess
from minference_green.diagnosis import Diagnosis, cache_directory, stored
from minference_green.errors import ExitCode, GreenBenchError, MeasurementError
from minference_green.journal import Journal
from minference_green.meters.choose import open_meters
from minference_green.meters.meter import Meter
from minference_green.results import (
    Device,
    DeviceState,
    DoctorMark,
    Fingerprint,
    Reading,
    Skip,
)
from minference_green.workload import Workload, format_length

LOG_NAME = "worker.log"
"""What workers printed, beside the journal."""

Cell = tuple[int, str]
"""Context length and method a worker is busy with."""


class WorkerError(GreenBenchError):
    """An error the worker met, with its own exit code."""

    def __init__(self, message: str, exit_code: ExitCode) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@contextmanager
def new_journal(file: Path) -> Iterator[Journal]:
    """A journal in a new directory, for a job to begin in.

    The first thing on disk: an unwritable place is found before minutes of work. Of a job that
    ends in an error before its first record nothing is left behind, but a traceback.
    """
    with Journal(file) as journal:
        try:
            yield journal
        except GreenBenchError:
            _remove_if_empty(file)
            raise


def _remove_if_empty(file: Path) -> None:
    directory, log = file.parent, file.parent / LOG_NAME
    if file.stat().st_size > 0 or (log.exists() and "Traceback" in log.read_text()):
        return
    for path in directory.iterdir():
        path.unlink()
    directory.rmdir()


class Metering:
    """The energy sources of a job: opened once, for the device that its workers use."""

    def __init__(self, meter: str, *, allow_shared: bool) -> None:
        self.meters: list[Meter] = []
        self.diagnoses: list[Diagnosis] = []
        """What the doctor last found of the devices read."""
        self.before: tuple[DeviceState, ...] = ()
        """State of the devices at the last beginning."""
        self._meter, self._allow_shared = meter, allow_shared
        self._unread = False

    def open(self, device: Message) -> None:
        """Be ready for a new worker on ``device``."""
        self._unread = False
        if not self.meters:
            self.meters = open_meters(
                self._meter, gpu_uuids=gpus_of(device), allow_shared=self._allow_shared
            )
            self.diagnoses = diagnoses_of(self.meters)

    def close(self) -> None:
        """Let go of every source."""
        for meter in self.meters:
            meter.close()

    @property
    def description(self) -> str:
        """In words: how energy is obtained."""
        return "; ".join(m.description for m in self.meters) or "not measured"

    def state(self) -> tuple[DeviceState, ...]:
        """State of every device now."""
        return tuple(s for m in self.meters for s in m.state())

    def begin(self) -> None:
        """Begin an interval."""
        self.before = self.state()
        for meter in self.meters:
            meter.begin()

    def end(self, start: float, end: float) -> tuple[Reading, ...]:
        """Energy from ``start`` to ``end``; raises ``MeasurementError`` if it cannot be read."""
        # In the list's order, the host last: a GPU's edges must lie as near the work as can be.
        return tuple(r for m in self.meters for r in m.end(start, end))

    def end_or_reason(
        self, start: float, end: float
    ) -> tuple[tuple[Reading, ...], tuple[str, ...]]:
        """As :meth:`end`; where energy cannot be read, nothing and the reason.

        The second time in a row with one worker raises: the source is gone, not unlucky.
        """
        try:
            readings = self.end(start, end)
        except MeasurementError as error:
            if self._unread:
                raise
            self._unread = True
            return (), (str(error),)
        self._unread = False
        return readings, ()


def converse(worker: WorkerProcess, device: str, answer: Callable[[Message], Message]) -> None:
    """Answer a worker on ``device`` until it is done.

    Raises ``EOFError`` or ``BrokenPipeError`` if it vanishes.
    """
    worker.channel.send("device", name=device)
    while True:
        message = worker.channel.receive()
        if message is None:
            raise EOFError
        if message["type"] == "done":
            return
        worker.channel.send("go", **answer(message))


def failure(message: Message, log: Path) -> GreenBenchError:
    """The error that a worker met and told of, or the one that broke it."""
    if message["type"] == "error":
        return WorkerError(message["message"], ExitCode(message["exit_code"]))
    return MeasurementError(f"the worker failed: {message['message']}; the traceback is in {log}")


def killed_in(cell: Cell | None, block: int, worker: WorkerProcess) -> Skip:
    """The cell in which the system killed a worker that vanished, given up.

    Raises ``MeasurementError`` for a worker that ended otherwise, or before any cell.
    """
    code = worker.stop()
    if code != -signal.SIGKILL or cell is None:
        raise MeasurementError(
            f"the worker process ended unexpectedly (exit code {code}); "
            f"its output is in {worker.log}"
        )
    length, method = cell
    reason = f"the system killed the worker at {format_length(length)}, likely out of memory"
    return Skip(block=block, context_length=length, method=method, reason=reason)


def fingerprint_of(
    device: Message, loaded: Message, workload: Workload, metering: Metering
) -> Fingerprint:
    """What figures measured by a worker on ``device`` depend on; ``loaded`` is its model."""
    commit, dirty = fingerprint.code_version()
    metered = [d for m in metering.meters for d in m.devices]
    return Fingerprint(
        devices=merge_devices(device, metered),
        model=loaded["model"],
        model_revision=loaded["revision"],
        weights=loaded["weights"],
        parameters=loaded["parameters"],
        dtype=workload.dtype,
        workload_hash=workload.hash,
        software=fingerprint.software(device.get("cuda")),
        kernel_hash=fingerprint.kernel_hash(),
        rest=loaded["rest"],
        code_commit=commit,
        code_dirty=dirty,
        cpu=fingerprint.cpu_name(),
        hostname_hash=fingerprint.hostname_hash(),
        doctor=tuple(
            DoctorMark(
                device=d.device,
                created_at=d.created_at,
                outcome=d.outcome,
                failing=d.failing,
            )
            for d in metering.diagnoses
        ),
    )


def diagnoses_of(meters: Sequence[Meter]) -> list[Diagnosis]:
    """What the doctor last found of the GPUs read, under the driver they have now."""
    gpus = [d for m in meters for d in m.devices if d.uuid]
    found = [(gpu, stored(str(gpu.uuid), cache_directory())) for gpu in gpus]
    return [d for gpu, d in found if d and d.driver == gpu.driver]


def gpus_of(device: Message) -> list[str]:
    """UUIDs of the GPUs a worker uses."""
    return [device["uuid"]] if device["kind"] == "gpu" else []


def merge_devices(device: Message, metered: list[Device]) -> tuple[Device, ...]:
    """The metered devices, with what only torch knows of the one the model runs on."""
    if device["kind"] == "cpu":
        return tuple(metered) or (Device(kind="cpu", name=fingerprint.cpu_name()),)
    known = {d.uuid: d for d in metered}
    ours = known.pop(device["uuid"], Device(kind="gpu", name=device["name"], uuid=device["uuid"]))
    from_torch = {"memory_bytes": device["memory_bytes"], "capability": device["capability"]}
    return (ours.model_copy(update=from_torch), *known.values())


def changes(before: Fingerprint, now: Fingerprint) -> list[str]:
    """What makes windows taken now a different experiment from those on file."""
    keys = (
        "devices",
        "model_revision",
        "dtype",
        "workload_hash",
        "rest",
        "kernel_hash",
        "software",
    )
    return [
        f"{key} changed from {getattr(before, key)} to {getattr(now, key)}"
        for key in keys
        if getattr(before, key) != getattr(now, key)
    ]


def timestamp() -> str:
    """The time now, in UTC, as records hold it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@contextmanager
def terminate_as_interrupt() -> Iterator[None]:
    """Treat SIGTERM, as a CI system sends it, like Ctrl-C."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
