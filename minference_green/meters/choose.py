"""Which energy sources a run reads: asked for by one word, opened once."""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from minference_green.errors import UsageError
from minference_green.meters.clock import MONOTONIC
from minference_green.meters.counter import CounterMeter, open_checked
from minference_green.meters.cpu import cpu_name
from minference_green.meters.device import Gpu
from minference_green.meters.faults import RaplError
from minference_green.meters.lock import DeviceLock
from minference_green.meters.meter import Meter
from minference_green.meters.modelled import open_modelled
from minference_green.meters.rapl import RaplMeter
from minference_green.meters.sampled import SampledMeter
from minference_green.meters.sampler import Sampler
from minference_green.meters.simulated import SimulatedGpu, load_specs

KINDS = "auto, nvml, rapl, modelled, none, simulated:FILE"


def open_meters(
    kind: str = "auto", *, gpu_uuids: Sequence[str] | None, allow_shared: bool = False
) -> list[Meter]:
    """Open the energy sources that ``kind`` means.

    ``gpu_uuids`` are the GPUs the work runs on: none of them means the CPU, ``None`` all that
    CUDA would show. ``auto`` reads those GPUs through NVML with the host beside them, or
    without GPUs the host alone, by RAPL where readable and else by a model. A GPU that NVML
    cannot read is an error, not a reason to read something else. ``allow_shared`` accepts
    MIG slices and devices with other processes. Begin and end meters in the list's order:
    the host stands last, so that its own reading delays no edge of a GPU's counter.

    Raises ``UsageError`` for an unknown ``kind``, a ``MeasurementError`` for a source that
    does not work.
    """
    word, _, file = kind.partition(":")
    match word:
        case "none" if not file:
            return []
        case "auto" if not file:
            gpus = _gpus(gpu_uuids)
            return [*_open_nvml(gpus, allow_shared), _host(headline=not gpus)]
        case "nvml" if not file:
            if not (gpus := _gpus(gpu_uuids)):
                raise UsageError("--meter nvml reads GPUs, but the work runs on none")
            return _open_nvml(gpus, allow_shared)
        case "rapl" if not file:
            return [RaplMeter(cpu_name(), headline=True)]
        case "modelled" if not file:
            return [open_modelled(headline=True)]
        case "simulated" if file:
            return _open_simulated(Path(file), allow_shared)
    raise UsageError(f"--meter {kind} is not known; choose one of {KINDS}")


def _gpus(uuids: Sequence[str] | None) -> list[str]:
    """The GPUs meant; those CUDA would show if ``uuids`` does not say."""
    if uuids is not None:
        return list(uuids)
    from minference_green.meters.nvml import gpu_present, visible_gpus

    return visible_gpus(os.environ) if gpu_present() else []


def _open_nvml(uuids: Sequence[str], allow_shared: bool) -> list[Meter]:
    if not uuids:
        return []
    from minference_green.meters.nvml import NvmlGpu

    with _closed_on_failure() as opened:
        boards: dict[str, Gpu] = {}
        for uuid in uuids:
            gpu = NvmlGpu(uuid)
            opened.callback(gpu.close)
            board = open_checked(gpu, uuid).info.uuid
            # Two slices of one board have one counter, which counts once.
            if board not in boards:
                opened.callback(DeviceLock(board).close)
                boards[board] = gpu
        return _meters_of(list(boards.values()), ["nvml", *boards], opened, allow_shared)


def _open_simulated(file: Path, allow_shared: bool) -> list[Meter]:
    origin = MONOTONIC.now()
    gpus = [SimulatedGpu(spec, MONOTONIC, origin) for spec in load_specs(file)]
    for gpu in gpus:
        open_checked(gpu, gpu.spec.uuid)
    with _closed_on_failure() as opened:
        source = ["simulated", str(file.resolve()), repr(origin)]
        return _meters_of(gpus, source, opened, allow_shared)


def _meters_of(
    gpus: Sequence[Gpu], sampled_from: Sequence[str], opened: ExitStack, allow_shared: bool
) -> list[Meter]:
    """Counter meters where there are counters, sampled power elsewhere, one sampler for all.

    The first meter closed releases what all of them use.
    """
    sampler = Sampler(sampled_from)
    opened.callback(sampler.close)
    counted = {i: g for i, g in enumerate(gpus) if g.info.has_counter}
    others = {i: g for i, g in enumerate(gpus) if not g.info.has_counter}
    meters: list[Meter] = []
    for group, kind in ((counted, CounterMeter), (others, SampledMeter)):
        if group:
            meters.append(kind(group, sampler, allow_shared=allow_shared, release=opened.close))
    sampler.wait_ready()
    return meters


def _host(*, headline: bool) -> Meter:
    """The host's own energy: RAPL, or a model that says why."""
    try:
        return RaplMeter(cpu_name(), headline=headline)
    except RaplError as error:
        return open_modelled(headline=headline, why=str(error).partition(":")[0])


@contextmanager
def _closed_on_failure() -> Iterator[ExitStack]:
    """A stack that unwinds only if its block fails; after that, whoever holds it closes it."""
    opened = ExitStack()
    try:
        yield opened
    except BaseException:
        opened.close()
        raise
