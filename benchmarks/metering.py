"""Our reading of a GPU's energy beside other tools', on windows of known truth.

    python benchmarks/metering.py [--windows 30] [--json]

No GPU is needed: a simulated one stands behind NVML's calls, in virtual time. Its counter moves
every 100 ms with 4 ms of jitter and a lag of 0, 30 or 80 ms, a call takes 3 ms and one in a
hundred 17 ms; each window is the first after a cold start, 80 W before and after it, 600 W in
it, and up to 0.1 s longer than the table says. Figures are errors against the truth in per
cent, mean and worst over the windows.

Zeus and codecarbon are scored by their own code where they can be imported (``pip install zeus
codecarbon``); that is their reading of the GPU alone, without their CPU and RAM models.
"""

import argparse
import contextlib
import importlib.util
import json
import random
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import pynvml

from minference_green.meters import evidence
from minference_green.meters.counter import CounterMeter
from minference_green.meters.evidence import Sample
from minference_green.meters.simulated import (
    CounterSpec,
    GpuSpec,
    SimulatedGpu,
    VirtualClock,
    constant,
    steps,
)

IDLE_WATTS, LOAD_WATTS = 80.0, 600.0
SECONDS = (1.0, 3.0, 10.0)
LAGS_SECONDS = (0.0, 0.03, 0.08)

Work = Callable[[], None]
Tool = Callable[[SimulatedGpu, VirtualClock, Work], float]
"""Measures one piece of work; returns joules."""


def edge_bracketed(gpu: SimulatedGpu, time: VirtualClock, work: Work) -> float:
    """Ours."""
    meter = CounterMeter({0: gpu}, None, clock=time.clock)
    meter.begin()
    time.pass_by(0.004)
    start = time.seconds
    work()
    end = time.seconds
    time.pass_by(0.004)
    [reading] = meter.end(start, end)
    assert reading.joules is not None
    return reading.joules


def sampled(gpu: SimulatedGpu, time: VirtualClock, work: Work) -> float:
    """Ours without a counter: field 186 at 20 Hz, held, with a margin on both sides."""
    begun = time.seconds
    time.pass_by(0.3)
    start = time.seconds
    work()
    end = time.seconds
    samples = []
    time.seconds = begun
    while time.seconds < end + 0.3:
        samples.append(Sample(time.seconds, gpu.watts("instant")))
        time.pass_by(0.05)
    t1 = end + evidence.UPDATE_SECONDS
    return evidence.held_bracket(samples, start - 0.2, start, end, t1)[0]


def plain(gpu: SimulatedGpu, _: VirtualClock, work: Work) -> float:
    """The counter read before and after."""
    before = gpu.energy_joules()
    work()
    return gpu.energy_joules() - before


def zeus(gpu: SimulatedGpu, _: VirtualClock, work: Work) -> float:
    """ZeusMonitor's window."""
    import zeus.device.gpu
    from zeus.monitor.energy import ZeusMonitor

    with nvml_of(gpu):
        # Its devices are kept for the life of the process; each window has another.
        zeus.device.gpu._gpus = None  # noqa: SLF001 - there is no public way
        monitor = ZeusMonitor(gpu_indices=[0], cpu_indices=[])
        monitor.begin_window("work", sync_execution=False)
        work()
        return float(monitor.end_window("work", sync_execution=False).gpu_energy[0])


def codecarbon(gpu: SimulatedGpu, time: VirtualClock, work: Work) -> float:
    """The GPU reading under codecarbon's trackers and tasks."""
    with nvml_of(gpu):
        from codecarbon.core.gpu import AllGPUDevices
        from codecarbon.core.units import Energy, Time

        devices = AllGPUDevices()
        devices.start()
        begun = time.seconds
        work()
        [delta] = devices.get_delta(Time.from_seconds(time.seconds - begun))
        kwh: Energy = delta["delta_energy_consumption"]
        return float(kwh.kWh) * 3.6e6


TOOLS: dict[str, tuple[Tool, str | None]] = {
    "minference-green, counter": (edge_bracketed, None),
    "minference-green, sampled": (sampled, None),
    "two plain reads": (plain, None),
    "zeus": (zeus, "zeus"),
    "codecarbon": (codecarbon, "codecarbon"),
}
"""Tool and the package its own code needs."""


@contextlib.contextmanager
def nvml_of(gpu: SimulatedGpu) -> Iterator[None]:
    """Let pynvml's calls answer for ``gpu``."""

    def unsupported(*_: Any) -> Any:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    answers: dict[str, Callable[..., Any]] = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: 1,
        "nvmlDeviceGetHandleByIndex": lambda _: gpu,
        "nvmlDeviceGetName": lambda _: gpu.info.name,
        "nvmlDeviceGetUUID": lambda _: gpu.info.uuid,
        "nvmlDeviceGetArchitecture": lambda _: pynvml.NVML_DEVICE_ARCH_HOPPER,
        "nvmlDeviceGetC2cModeInfoV": unsupported,
        "nvmlDeviceGetMemoryInfo": lambda _: pynvml.c_nvmlMemory_t(total=2**36, free=2**36, used=0),
        "nvmlDeviceGetEnforcedPowerLimit": lambda _: 700_000,
        "nvmlDeviceGetPowerUsage": lambda _: round(gpu.watts("usage") * 1000),
        "nvmlDeviceGetTotalEnergyConsumption": lambda _: round(gpu.energy_joules() * 1000),
    }
    with mock.patch.multiple(pynvml, **answers):
        yield


def error(tool: Tool, seed: int, seconds: float, lag: float) -> float:
    """Relative error of one tool on one window; the same window for each tool."""
    chance = random.Random(seed)
    time = VirtualClock(1.0 + chance.random())
    counter = CounterSpec(
        phase_seconds=chance.uniform(0, 0.1),
        jitter_seconds=0.004,
        lag_seconds=lag,
        slow_call_seconds=0.017,
        slow_call_share=0.01,
    )
    gpu = SimulatedGpu(GpuSpec(constant(IDLE_WATTS), counter=counter, seed=seed), time.clock)
    # No multiple of any period, so that no error can cancel by locking to one.
    seconds += chance.uniform(0, 0.1)
    truth = 0.0

    def work() -> None:
        nonlocal truth
        start, end = time.seconds, time.seconds + seconds
        load = steps((0.0, IDLE_WATTS), (start, LOAD_WATTS), (end, IDLE_WATTS))
        gpu.spec = replace(gpu.spec, trace=load)
        truth = gpu.truth(start, end)
        time.seconds = end

    return tool(gpu, time, work) / truth - 1


def score(windows: int) -> list[dict[str, Any]]:
    """One row per tool and window length; null errors where a package is not installed."""
    rows = []
    for name, (tool, package) in TOOLS.items():
        installed = package is None or importlib.util.find_spec(package) is not None
        for seconds in SECONDS:
            errors = [
                error(tool, seed, seconds, lag)
                for lag in LAGS_SECONDS
                for seed in range(windows if installed else 0)
            ]
            rows.append(
                {
                    "tool": name,
                    "window_seconds": seconds,
                    "windows": len(errors),
                    "mean_error": statistics.fmean(errors) if errors else None,
                    "worst_error": max(errors, key=abs) if errors else None,
                }
            )
    return rows


def main() -> None:
    """Score every tool and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--windows", type=int, default=30, help="windows per lag and length")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = score(arguments.windows)
    if arguments.json:
        json.dump(rows, sys.stdout, indent=1)
        return
    print(f"{'tool':28}{'window':>8}{'mean error':>13}{'worst error':>13}")
    for row in rows:
        window = f"{row['window_seconds']:g} s"
        if row["windows"]:
            figures = f"{row['mean_error']:>+12.3%}{row['worst_error']:>+13.3%}"
        else:
            figures = "  not installed"
        print(f"{row['tool']:28}{window:>8} {figures}")


if __name__ == "__main__":
    main()
