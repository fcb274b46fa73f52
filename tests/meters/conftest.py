"""A world in virtual time: GPUs of known truth, loads placed on them, power sampled ideally."""

# ruff: noqa: N802 - the fake answers to NVML's own names

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pynvml
import pytest

from minference_green.meters.counter import CounterMeter
from minference_green.meters.evidence import Sample
from minference_green.meters.simulated import CounterSpec, GpuSpec, SimulatedGpu, Trace
from minference_green.meters.simulated import VirtualClock as VirtualTime
from minference_green.results import Reading

IDLE_WATTS = 80.0


class IdealSampler:
    """20 samples a second of each GPU, always there."""

    problem: str | None = None

    def __init__(self, gpus: Sequence[SimulatedGpu]) -> None:
        self.gpus = gpus
        self.lost: Callable[[float], bool] = lambda seconds: False

    def samples(self, device: int, start: float, end: float) -> list[Sample]:
        first, last = int(start / 0.05), int(end / 0.05) + 1
        moments = [i * 0.05 for i in range(first, last) if not self.lost(i * 0.05)]
        return [Sample(t, self._watts(device, t)) for t in moments]

    def _watts(self, device: int, t: float) -> float:
        # The reading is as of the GPU's last update, at a tenth of a second.
        updated = int(t * 10 + 1e-6) / 10
        spec = self.gpus[device].spec
        noise = random.Random(f"{spec.seed} {updated}").uniform(-1, 1) * spec.power_noise_watts
        return spec.trace.watts(updated) + noise

    def close(self) -> None: ...


@dataclass
class World:
    time: VirtualTime = field(default_factory=lambda: VirtualTime(1.0))
    loads: dict[str, list[tuple[float, float]]] = field(default_factory=dict)

    def gpu(self, uuid: str = "GPU-a", *, idle: float = IDLE_WATTS, **spec: Any) -> SimulatedGpu:
        self.loads[uuid] = [(0.0, idle)]
        spec.setdefault("trace", Trace(((0.0, idle),)))
        return SimulatedGpu(GpuSpec(uuid=uuid, **spec), self.time.clock)

    def cold_gpu(self, seed: int, **counter: Any) -> SimulatedGpu:
        """As real ones are: 3 ms calls with rare slow ones, jitter, any phase."""
        chance = random.Random(seed)
        self.time.pass_by(chance.uniform(0, 1))
        return self.gpu(
            seed=seed,
            counter=CounterSpec(
                phase_seconds=chance.uniform(0, 0.1),
                jitter_seconds=0.004,
                slow_call_seconds=0.017,
                slow_call_share=0.01,
                **counter,
            ),
        )

    def load(self, gpu: SimulatedGpu, seconds: float, watts: float, after: float) -> None:
        """Run a load of ``watts`` from now on for ``seconds``, then draw ``after``."""
        now = self.time.seconds
        parts = self.loads[gpu.spec.uuid]
        parts += [(now, watts), (now + seconds, after)]
        points: list[tuple[float, float]] = []
        for t, w in parts:
            points += [(t, points[-1][1]), (t, w)] if points else [(t, w)]
        gpu.spec = replace(gpu.spec, trace=Trace(tuple(points)))

    def window(
        self,
        meter: Any,
        gpus: Sequence[SimulatedGpu],
        seconds: float = 2.0,
        *,
        watts: float = 600.0,
        after: float = IDLE_WATTS,
        latency: float = 0.004,
    ) -> tuple[list[Reading], float, float]:
        """One window as a run has it; its readings, start and end."""
        meter.begin()
        self.time.pass_by(latency)
        start = self.time.seconds
        for gpu in gpus:
            self.load(gpu, seconds, watts, after)
        self.time.pass_by(seconds)
        end = self.time.seconds
        self.time.pass_by(latency)
        return list(meter.end(start, end)), start, end

    def counter_meter(
        self, *gpus: SimulatedGpu, check: bool = True, **options: Any
    ) -> CounterMeter:
        sampler = IdealSampler(gpus) if check else None
        return CounterMeter(dict(enumerate(gpus)), sampler, clock=self.time.clock, **options)


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def make_world() -> type[World]:
    return World


@pytest.fixture
def ideal_sampler() -> type[IdealSampler]:
    return IdealSampler


class FakeNvml:
    """NVML with the GPUs and faults a test wants; errors are pynvml's own."""

    NVML_TEMPERATURE_GPU = pynvml.NVML_TEMPERATURE_GPU
    NVML_CLOCK_SM = pynvml.NVML_CLOCK_SM
    NVML_CLOCK_MEM = pynvml.NVML_CLOCK_MEM

    def __init__(self, *names: str) -> None:
        self.names = {f"GPU-{chr(97 + i)}0{i}": name for i, name in enumerate(names)}
        self.slices: dict[str, str] = {}
        self.failing: dict[str, int] = {}
        """Call to NVML error code."""
        self.fields: dict[Any, int] = {186: 300_000, 185: 250_000, 82: 45}
        self.pids: tuple[int, ...] = ()
        self.mig = 0
        self.shut = 0

    def fail(self, call: str, code: int) -> None:
        self.failing[call] = code

    def __getattr__(self, call: str) -> Callable[..., Any]:
        if not call.startswith("nvml"):
            raise AttributeError(call)

        def answer(*arguments: Any) -> Any:
            if call in self.failing:
                raise pynvml.NVMLError(self.failing[call])
            return getattr(self, f"_{call.removeprefix('nvml')}")(*arguments)

        return answer

    def _Init(self) -> None: ...

    def _Shutdown(self) -> None:
        self.shut += 1

    def _DeviceGetCount(self) -> int:
        return len(self.names)

    def _DeviceGetHandleByIndex(self, index: int) -> str:
        return list(self.names)[index]

    def _DeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid not in self.names and uuid not in self.slices:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return uuid

    def _DeviceGetDeviceHandleFromMigDeviceHandle(self, handle: str) -> str:
        return self.slices[handle]

    def _DeviceGetUUID(self, handle: str) -> str:
        return handle

    def _DeviceGetName(self, handle: str) -> str:
        return self.names[handle]

    def _SystemGetDriverVersion(self) -> str:
        return "580.1"

    def _DeviceGetCudaComputeCapability(self, handle: str) -> tuple[int, int]:
        return (9, 0)

    def _DeviceGetMemoryInfo(self, handle: str) -> Any:
        return pynvml.c_nvmlMemory_t(total=80 * 2**30, free=79 * 2**30, used=2**30)

    def _DeviceGetEnforcedPowerLimit(self, handle: str) -> int:
        return 700_000

    def _DeviceGetMigMode(self, handle: str) -> tuple[int, int]:
        return (self.mig, self.mig)

    def _DeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        return 123_456_789

    def _DeviceGetPowerUsage(self, handle: str) -> int:
        return 200_000

    def _DeviceGetTemperature(self, handle: str, sensor: int) -> int:
        return 41

    def _DeviceGetClockInfo(self, handle: str, clock: int) -> int:
        return {self.NVML_CLOCK_SM: 1980, self.NVML_CLOCK_MEM: 3201}[clock]

    def _DeviceGetComputeRunningProcesses(self, handle: str) -> list[Any]:
        return [pynvml.c_nvmlProcessInfo_v3_t(pid=p) for p in self.pids]

    def _DeviceGetFieldValues(self, handle: str, fields: list[Any]) -> Any:
        values = (pynvml.c_nvmlFieldValue_t * len(fields))()
        for value, wanted in zip(values, fields, strict=True):
            value.nvmlReturn = pynvml.NVML_ERROR_NOT_SUPPORTED
            if wanted in self.fields:
                value.nvmlReturn = pynvml.NVML_SUCCESS
                value.valueType = pynvml.NVML_VALUE_TYPE_UNSIGNED_LONG_LONG
                value.value.ullVal = self.fields[wanted]
        return values


@pytest.fixture
def fake_nvml() -> type[FakeNvml]:
    return FakeNvml
