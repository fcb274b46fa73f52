"""What a parent process needs around a worker that it measures: identity, doubt, interruption."""

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime

from minference_green import fingerprint
from minference_green.channel import Message
from minference_green.diagnosis import Diagnosis, cache_directory, stored
from minference_green.errors import ExitCode, GreenBenchError
from minference_green.meters.meter import Meter
from minference_green.results import Device, DoctorMark, Fingerprint
from minference_green.workload import Workload


class WorkerError(GreenBenchError):
    """An error the worker met, with its own exit code."""

    def __init__(self, message: str, exit_code: ExitCode) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def fingerprint_of(
    device: Message,
    loaded: Message,
    workload: Workload,
    meters: Sequence[Meter],
    diagnoses: Sequence[Diagnosis],
) -> Fingerprint:
    """What figures measured by a worker on ``device`` depend on; ``loaded`` is its model."""
    commit, dirty = fingerprint.code_version()
    metered = [d for m in meters for d in m.devices]
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
            for d in diagnoses
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
