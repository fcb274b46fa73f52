"""NVIDIA's management library; the only module that imports ``pynvml``."""

import contextlib
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import pynvml

from minference_green.errors import MeasurementError
from minference_green.meters.device import Conditions, GpuInfo, PowerField
from minference_green.meters.faults import (
    AmbiguousDeviceError,
    DeviceLostError,
    DriverError,
    NoCounterError,
    NoGpuError,
    NoPowerError,
    NotPermittedError,
    NvmlCallError,
    NvmlMissingError,
)

# Units of the fields: milliwatts, degrees Celsius, nanoseconds since the driver was loaded.
_POWER: dict[PowerField, int] = {"instant": 186, "average": 185}
_MEMORY_TEMPERATURE = 82
_POWER_CAP, _THERMAL, _SW_THERMAL, _HW_THERMAL, _POWER_BRAKE = 74, 75, 269, 270, 271

_MODULE_SCOPE = 1
_SUPERCHIPS = ("GH200", "GB200", "GB300")
"""Boards whose counter covers the CPU and its memory too."""

_UNSUPPORTED = (
    pynvml.NVML_ERROR_NOT_SUPPORTED,
    pynvml.NVML_ERROR_FUNCTION_NOT_FOUND,
    pynvml.NVML_ERROR_INVALID_ARGUMENT,
    pynvml.NVML_ERROR_NO_DATA,
)


class NvmlGpu:
    """One GPU by UUID; see :class:`device.Gpu`.

    ``library`` is ``pynvml`` or a fake of it. Raises an error of ``faults`` if the GPU
    cannot be opened. A MIG slice's UUID opens the board it is cut from.
    """

    def __init__(self, uuid: str, library: Any = pynvml) -> None:
        self._nvml = library
        self._wanted = uuid
        _initialise(library)
        with self._faults("its handle"):
            self._handle = self._find(uuid)

    @cached_property
    def info(self) -> GpuInfo:
        """Identity and what is supported."""
        nvml, handle = self._nvml, self._handle
        with self._faults("its identity"):
            uuid = str(nvml.nvmlDeviceGetUUID(handle))
            name = str(nvml.nvmlDeviceGetName(handle))
            driver = str(nvml.nvmlSystemGetDriverVersion())
        capability = self._optional("nvmlDeviceGetCudaComputeCapability")
        memory = self._optional("nvmlDeviceGetMemoryInfo")
        limit = self._optional("nvmlDeviceGetEnforcedPowerLimit")
        mig = self._optional("nvmlDeviceGetMigMode")
        fields: tuple[PowerField, ...] = ("instant", "average", "usage")
        return GpuInfo(
            uuid=uuid,
            name=name,
            library="NVML",
            driver=driver,
            has_counter=self._optional("nvmlDeviceGetTotalEnergyConsumption") is not None,
            power_field=next((f for f in fields if self._milliwatts(f, name) is not None), None),
            capability=".".join(map(str, capability)) if capability else None,
            memory_bytes=int(memory.total) if memory else None,
            power_limit_watts=limit / 1000 if limit else None,
            mig=bool(mig and mig[0]),
            scope="module" if _is_superchip(name) else "board",
        )

    def energy_joules(self) -> float:
        """The counter, in joules since the driver was loaded."""
        with self._faults("its energy counter"):
            return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1000

    def watts(self, power_field: PowerField) -> float:
        """Board power now, in watts."""
        milliwatts = self._milliwatts(power_field, self.info.name)
        if milliwatts is None:
            raise NoPowerError(self._wanted)
        return milliwatts / 1000

    def conditions(self) -> Conditions:
        """Temperature, clocks, limit, memory and cumulative throttle times now."""
        nvml = self._nvml
        memory = self._optional("nvmlDeviceGetMemoryInfo")
        limit = self._optional("nvmlDeviceGetEnforcedPowerLimit")
        return Conditions(
            temperature_celsius=self._optional(
                "nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU
            ),
            memory_temperature_celsius=self._field(_MEMORY_TEMPERATURE),
            sm_clock_mhz=self._optional("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_SM),
            memory_clock_mhz=self._optional("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_MEM),
            power_limit_watts=limit / 1000 if limit else None,
            memory_used_bytes=int(memory.used) if memory else None,
            throttle_seconds=self._throttle_seconds(),
        )

    def process_ids(self) -> tuple[int, ...]:
        """Compute processes on the device; an empty answer proves nothing inside a VM."""
        found = self._optional("nvmlDeviceGetComputeRunningProcesses") or []
        return tuple(int(process.pid) for process in found)

    def close(self) -> None:
        """Release this use of the library."""
        with contextlib.suppress(pynvml.NVMLError):
            self._nvml.nvmlShutdown()

    def _find(self, uuid: str) -> Any:
        """Handle of the GPU; of the board if ``uuid`` is one of its slices."""
        nvml = self._nvml
        # torch writes the UUID of a slice with the prefix of a whole GPU.
        for name in (uuid, re.sub("^GPU-", "MIG-", uuid)):
            try:
                handle = nvml.nvmlDeviceGetHandleByUUID(name)
            except pynvml.NVMLError as error:
                missing = (pynvml.NVML_ERROR_NOT_FOUND, pynvml.NVML_ERROR_INVALID_ARGUMENT)
                if error.value not in missing:
                    raise
                continue
            if name.startswith("MIG-"):
                handle = nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle)
            return handle
        raise NoGpuError(uuid, list(_uuids(nvml)))

    def _throttle_seconds(self) -> dict[str, float]:
        """Cumulative seconds by cause, of the causes this driver counts."""
        cap, policy, software, hardware, brake = (
            self._field(f) for f in (_POWER_CAP, _THERMAL, _SW_THERMAL, _HW_THERMAL, _POWER_BRAKE)
        )
        # The policy counter and the newer one for software slowdown count the same thing.
        software = software if policy is None else max(policy, software or 0.0)
        thermal = [t for t in (software, hardware) if t is not None]
        seconds = {
            "power_cap": cap,
            "thermal": sum(thermal) if thermal else None,
            "power_brake": brake,
        }
        return {cause: ns / 1e9 for cause, ns in seconds.items() if ns is not None}

    def _milliwatts(self, power_field: PowerField, name: str) -> float | None:
        if power_field == "usage":
            usage: int | None = self._optional("nvmlDeviceGetPowerUsage")
            return usage
        field = _POWER[power_field]
        return self._field((field, _MODULE_SCOPE) if _is_superchip(name) else field)

    def _field(self, field: int | tuple[int, int]) -> float | None:
        """Value of a field, or null where the driver does not support it."""
        with self._faults(f"field {field}"):
            (value,) = self._nvml.nvmlDeviceGetFieldValues(self._handle, [field])
        if value.nvmlReturn in _UNSUPPORTED:
            return None
        with self._faults(f"field {field}"):
            if value.nvmlReturn != pynvml.NVML_SUCCESS:
                raise pynvml.NVMLError(value.nvmlReturn)
        match value.valueType:
            case pynvml.NVML_VALUE_TYPE_DOUBLE:
                return float(value.value.dVal)
            case pynvml.NVML_VALUE_TYPE_UNSIGNED_INT:
                return float(value.value.uiVal)
            case pynvml.NVML_VALUE_TYPE_SIGNED_LONG_LONG:
                return float(value.value.sllVal)
            case _:
                return float(value.value.ullVal)

    def _optional(self, call: str, *arguments: Any) -> Any:
        """What a call returns, or null where the driver does not support it."""
        with self._faults(call):
            try:
                return getattr(self._nvml, call)(self._handle, *arguments)
            except pynvml.NVMLError as error:
                if error.value in _UNSUPPORTED:
                    return None
                raise

    @contextlib.contextmanager
    def _faults(self, what: str) -> Iterator[None]:
        """Turn NVML's errors into typed ones."""
        try:
            yield
        except pynvml.NVMLError as error:
            raise _typed(error, f"{what} of GPU {self._wanted}", self._wanted) from error


def visible_gpus(environ: Mapping[str, str], library: Any = pynvml) -> list[str]:
    """UUIDs of the GPUs CUDA would show, in its order.

    Reads ``CUDA_VISIBLE_DEVICES`` (indices, UUIDs or unique beginnings of them, MIG names)
    and ``CUDA_DEVICE_ORDER``. Raises ``AmbiguousDeviceError`` where an index means different
    GPUs in CUDA's order and NVML's, or an entry means none.
    """
    _initialise(library)
    named = _uuids(library)
    wanted = environ.get("CUDA_VISIBLE_DEVICES")
    if wanted is None:
        return list(named)
    chosen: list[str] = []
    for entry in (e.strip() for e in wanted.split(",")):
        # CUDA stops at the first entry that is no device, and -1 or nothing is the usual one.
        if entry in ("", "-1"):
            break
        chosen.append(_resolve(entry, named, environ))
    if len(set(chosen)) < len(chosen):
        raise AmbiguousDeviceError(f"CUDA_VISIBLE_DEVICES={wanted} names one GPU twice")
    return chosen


def gpu_present() -> bool:
    """Whether the NVIDIA driver has devices here, asked of the system and not of NVML."""
    return any(
        path.exists() for path in (Path("/dev/nvidiactl"), Path("/proc/driver/nvidia/version"))
    )


def _resolve(entry: str, named: Mapping[str, str], environ: Mapping[str, str]) -> str:
    uuids = list(named)
    if entry.isdecimal():
        if int(entry) >= len(uuids):
            raise NoGpuError(f"with index {entry} (CUDA_VISIBLE_DEVICES)", uuids)
        if len(set(named.values())) > 1 and environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
            raise AmbiguousDeviceError(
                f"CUDA_VISIBLE_DEVICES={entry} on a machine with different GPUs "
                f"({', '.join(sorted(set(named.values())))}): CUDA numbers them by speed, NVML "
                "by PCI bus; set CUDA_DEVICE_ORDER=PCI_BUS_ID or give UUIDs from nvidia-smi -L"
            )
        return uuids[int(entry)]
    if entry.startswith("MIG-GPU-"):
        # MIG-GPU-<uuid>/<instance>/<slice>, as drivers before 470 wrote it.
        entry = entry.removeprefix("MIG-").partition("/")[0]
    elif entry.startswith("MIG-"):
        return entry
    found = [uuid for uuid in uuids if uuid.casefold().startswith(entry.casefold())]
    if len(found) > 1:
        raise AmbiguousDeviceError(
            f"CUDA_VISIBLE_DEVICES entry {entry} begins several UUIDs: {', '.join(found)}"
        )
    if not found:
        raise NoGpuError(f"{entry} (CUDA_VISIBLE_DEVICES)", uuids)
    return found[0]


def _uuids(library: Any) -> dict[str, str]:
    """Name of each GPU by UUID, in NVML's order, which is that of the PCI bus."""
    try:
        handles = [
            library.nvmlDeviceGetHandleByIndex(i) for i in range(library.nvmlDeviceGetCount())
        ]
        return {
            str(library.nvmlDeviceGetUUID(h)): str(library.nvmlDeviceGetName(h)) for h in handles
        }
    except pynvml.NVMLError as error:
        raise _typed(error, "the list of GPUs", "") from error


def _initialise(library: Any) -> None:
    try:
        library.nvmlInit()
    except pynvml.NVMLError as error:
        raise _typed(error, "itself", "") from error


def _typed(error: Any, what: str, device: str) -> MeasurementError:
    """The error of ``faults`` that an NVML error means."""
    detail = str(error)
    match error.value:
        case pynvml.NVML_ERROR_LIBRARY_NOT_FOUND:
            return NvmlMissingError(detail)
        case pynvml.NVML_ERROR_DRIVER_NOT_LOADED | pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH:
            return DriverError(detail)
        case pynvml.NVML_ERROR_NO_PERMISSION:
            return NotPermittedError(what, "run as root or relax the driver's restrictions")
        case pynvml.NVML_ERROR_OPERATING_SYSTEM:
            return NotPermittedError(what, "the container's cgroup blocks /dev/nvidia*")
        case (
            pynvml.NVML_ERROR_GPU_IS_LOST
            | pynvml.NVML_ERROR_RESET_REQUIRED
            | pynvml.NVML_ERROR_UNINITIALIZED
            | pynvml.NVML_ERROR_NOT_FOUND
            | pynvml.NVML_ERROR_GPU_NOT_FOUND
        ):
            return DeviceLostError(device, detail)
        case pynvml.NVML_ERROR_NOT_SUPPORTED if "energy counter" in what:
            return NoCounterError(device)
        case _:
            return NvmlCallError(what, detail)


def _is_superchip(name: str) -> bool:
    return any(chip in name for chip in _SUPERCHIPS)
