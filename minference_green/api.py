"""The functions the package exports beside ``compare``: run, measure and audit."""

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from minference_green import bench
from minference_green.auditing import audit as auditing
from minference_green.auditing.audit import Conversation
from minference_green.auditing.audit import Progress as AuditProgress
from minference_green.auditing.plan import AuditRequest
from minference_green.bench import Grid, Progress, Request
from minference_green.errors import UsageError
from minference_green.grams import operational_grams
from minference_green.ledger import Audit, load_audit
from minference_green.meters.choose import open_meters
from minference_green.results import CarbonTerms, Reading, Run, load
from minference_green.validity import SHORT_WINDOW_SECONDS

if TYPE_CHECKING:
    from minference_green.methods.method import PrefillMethod
    from minference_green.model.loading import LoadedModel


class _Silent:
    """Progress of a run or an audit nobody watches."""

    def begin(self, done: int, of: int) -> None: ...
    def block(self, number: int, of: int, windows: int, window_seconds: float) -> None: ...
    def say(self, message: str) -> None: ...
    def advance(self) -> None: ...


SILENT = _Silent()


def run(
    model: str = "embedded",
    *,
    methods: Sequence[str] = ("dense", "minference"),
    options: Mapping[str, Mapping[str, str]] | None = None,
    context_lengths: Sequence[int] = (),
    grid: Grid | None = None,
    output: str | Path = "green-bench-runs",
    progress: Progress = SILENT,
    **settings: object,
) -> Run:
    """Measure prefill of ``model`` under each method and return the run.

    What ``green-bench run`` does, with the same defaults: ``methods`` are names or
    ``package.module:NAME``, ``options`` maps a method to its options, ``context_lengths`` are
    tokens, ``grid`` says where the electricity comes from, and ``settings`` are the other
    fields of ``bench.Request`` (``blocks``, ``window_seconds``, ``batch``, ``meter``...). The
    run file is in a new directory under ``output``.

    Raises ``UsageError`` and ``MeasurementError`` as the command does.
    """
    unknown = settings.keys() - Request.model_fields.keys()
    if unknown:
        raise UsageError(
            f"run() has no setting {', '.join(sorted(unknown))}; "
            f"it takes {', '.join(Request.model_fields)}"
        )
    request = Request.model_validate(
        {
            **settings,
            "model": model,
            "methods": tuple(methods),
            "options": {name: dict(given) for name, given in (options or {}).items()},
            "context_lengths": tuple(context_lengths),
            "grid": grid or Grid(),
        }
    )
    return load(bench.run(request, Path(output), progress))


def audit(
    model: "str | LoadedModel" = "embedded",
    *,
    methods: "Sequence[str | PrefillMethod]" = ("dense", "minference"),
    options: Mapping[str, Mapping[str, str]] | None = None,
    context_lengths: Sequence[int] = (),
    output: str | Path = "green-bench-runs",
    progress: AuditProgress = SILENT,
    **settings: object,
) -> Audit:
    """Ask ``model`` about known facts after dense and after sparse prefill; what it answered.

    What ``green-bench audit`` does, with the same defaults; ``settings`` are the other fields
    of ``auditing.plan.AuditRequest`` (``haystacks``, ``kinds``, ``quick``, ``margin_points``...).
    ``methods`` are names or objects, ``model`` a name or a loaded model; with an object among
    them everything runs in this process, else in a worker of its own. A method with a ``see``
    is shown each haystack first (``methods.method.SeeingMethod``). ``findings.findings`` turns
    the result into figures.

    Raises ``UsageError`` and ``MeasurementError`` as the command does.
    """
    unknown = settings.keys() - AuditRequest.model_fields.keys()
    if unknown:
        raise UsageError(
            f"audit() has no setting {', '.join(sorted(unknown))}; "
            f"it takes {', '.join(AuditRequest.model_fields)}"
        )
    own = {m.name: m for m in methods if not isinstance(m, str)}
    request = AuditRequest.model_validate(
        {
            **settings,
            "model": model if isinstance(model, str) else model.spec,
            "methods": tuple(m if isinstance(m, str) else m.name for m in methods),
            "options": {name: dict(given) for name, given in (options or {}).items()},
            "context_lengths": tuple(context_lengths),
        }
    )
    serve = None
    if own or not isinstance(model, str):
        loaded = None if isinstance(model, str) else model

        def serve(conversation: Conversation) -> None:
            from minference_green.auditing.worker import serve_here

            serve_here(conversation, loaded, own)

    return load_audit(auditing.audit(request, Path(output), progress, serve))


@dataclass(frozen=True)
class Measurement:
    """What repeated calls of a function cost."""

    repeats: int
    seconds: float
    """Of the whole window, all repeats."""
    readings: tuple[Reading, ...]

    @property
    def joules(self) -> float | None:
        """Joules per call; null, with the reason in ``readings``, if they were not measured."""
        parts = [r.joules for r in self.readings if r.headline]
        if not parts or any(p is None for p in parts):
            return None
        return math.fsum(p for p in parts if p is not None) / self.repeats

    def grams(self, carbon: CarbonTerms) -> float | None:
        """Operational grams of CO2e per call."""
        return None if self.joules is None else operational_grams(self.joules, carbon)


def measure(
    function: Callable[[], object],
    *,
    window_seconds: float = SHORT_WINDOW_SECONDS,
    meter: str = "auto",
    gpu_uuids: Sequence[str] | None = None,
) -> Measurement:
    """Joules and seconds per call of ``function``, in this process.

    The function is called once to warm up, then often enough to fill ``window_seconds``.
    ``gpu_uuids`` are the GPUs it uses; ``None`` means torch's current device if torch has
    started CUDA in this process, else the host. Raises ``MeasurementError`` where the energy
    source cannot be read.
    """
    function()
    synchronize = cuda_synchronize()
    start = time.monotonic()
    function()
    synchronize()
    repeats = max(1, math.ceil(window_seconds / max(time.monotonic() - start, 1e-9)))
    uuids = current_gpu() if gpu_uuids is None else list(gpu_uuids)
    meters = open_meters(meter, gpu_uuids=uuids, allow_shared=False)
    try:
        for source in meters:
            source.begin()
        start = time.monotonic()
        for _ in range(repeats):
            function()
        synchronize()
        end = time.monotonic()
        readings = tuple(r for source in meters for r in source.end(start, end))
    finally:
        for source in meters:
            source.close()
    return Measurement(repeats, end - start, readings)


def current_gpu() -> list[str]:
    """UUID of torch's current GPU, none if torch has not started CUDA in this process."""
    torch = sys.modules.get("torch")  # what was never loaded has started nothing
    if torch is None or not torch.cuda.is_initialized():
        return []
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return [f"GPU-{properties.uuid}"]


def cuda_synchronize() -> Callable[[], None]:
    """What waits for the GPU, if torch has started CUDA in this process."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return lambda: None
    synchronize: Callable[[], None] = torch.cuda.synchronize
    return synchronize
