"""Every fault that could make joules or grams wrong, with the refusal or the label it gets.

Each row goes through the door a run goes through and names what must come of it: a typed error
(``Refused``), a reading that says what is wrong with it (``Labelled``), or, where a fault must
not matter, the truth (``Unharmed``). No row may end in a number that says nothing.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pynvml
import pytest

from minference_green import carbon
from minference_green.errors import GreenBenchError, MeasurementError, UsageError
from minference_green.journal import Journal, SealError
from minference_green.meters import choose, faults
from minference_green.meters.choose import open_meters
from minference_green.meters.counter import CounterMeter
from minference_green.meters.lock import DeviceLock
from minference_green.meters.nvml import NvmlGpu
from minference_green.meters.rapl import find_domains
from minference_green.meters.simulated import CounterSpec, FaultSpec
from minference_green.results import FILE_NAME, DeviceState, Note, load
from minference_green.validity import doubts

SECONDS = 0.8
WATTS = 300


@dataclass
class Ground:
    """What a row may use; ``make`` is the world in virtual time of this folder's fixtures."""

    path: Path
    world: Any
    nvml: Any
    header: Any
    window: Any
    monkeypatch: Any

    def spec(self, **gpu: Any) -> str:
        file = self.path / "gpu.json"
        file.write_text(json.dumps({"gpus": [{"watts": WATTS, **gpu}]}))
        return f"simulated:{file}"

    def real_window(
        self,
        during: Callable[[Any], None] = lambda sampler: time.sleep(SECONDS),
        **gpu: Any,
    ) -> Any:
        """One window in real time, with a real sampling process; ``during`` gets the sampler."""
        samplers: list[Any] = []
        real = choose.Sampler

        def spied(source: Any) -> Any:
            samplers.append(real(source))
            return samplers[-1]

        self.monkeypatch.setattr(choose, "Sampler", spied)
        [meter] = open_meters(self.spec(**gpu), gpu_uuids=[])
        try:
            meter.begin()
            start = time.monotonic()
            during(samplers[0])
            end = time.monotonic()
            [reading] = meter.end(start, end)
        finally:
            meter.close()
        return reading, WATTS * (end - start)

    def virtual_window(self, seconds: float = 2.0, watts: float = 600.0, **gpu: Any) -> Any:
        """One window in virtual time."""
        allow = gpu.pop("allow_shared", False)
        made = self.world.gpu(**gpu)
        meter = self.world.counter_meter(made, allow_shared=allow)
        [reading], _, _ = self.world.window(meter, [made], seconds, watts=watts)
        return reading

    def table(self, content: bytes | None) -> None:
        """A codecarbon of our own making that holds this table of countries, or none."""
        root = self.path / "codecarbon"
        (root / "data/private_infra").mkdir(parents=True)
        (root / "__init__.py").write_text("")
        if content is not None:
            (root / "data/private_infra/global_energy_mix.json").write_bytes(content)
        spec = type("Spec", (), {"origin": str(root / "__init__.py")})
        self.monkeypatch.setattr(carbon.importlib.util, "find_spec", lambda _: spec)


@dataclass(frozen=True)
class Refused:
    error: type[GreenBenchError]
    words: str = ""


@dataclass(frozen=True)
class Labelled:
    words: str
    joules_null: bool = False


@dataclass(frozen=True)
class Unharmed:
    pass


def virtual(**gpu: Any) -> Callable[[Ground], Any]:
    return lambda ground: ground.virtual_window(**gpu)


def real(**options: Any) -> Callable[[Ground], Any]:
    return lambda ground: ground.real_window(**options)


def kill(sampler: Any) -> None:
    os.kill(sampler.pid, signal.SIGKILL)
    time.sleep(SECONDS)


def stop(sampler: Any) -> None:
    os.kill(sampler.pid, signal.SIGSTOP)
    time.sleep(SECONDS)


def starve(sampler: Any) -> None:
    """A processor that others take for half a second at a time."""
    for _ in range(2):
        os.kill(sampler.pid, signal.SIGSTOP)
        time.sleep(0.5)
        os.kill(sampler.pid, signal.SIGCONT)
        time.sleep(0.1)


def fork(_: Any) -> None:
    """A child of a fork that ends must take neither sampler nor meter with it."""
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    time.sleep(SECONDS)


def step_wall_clock(ground: Ground) -> Any:
    """The wall clock jumps back an hour in the window; only the monotonic one may count."""

    def during(_: Any) -> None:
        now = time.time
        ground.monkeypatch.setattr(time, "time", lambda: now() - 3600)
        time.sleep(SECONDS)

    return ground.real_window(during)


def other_run_holds_the_gpu(ground: Ground) -> None:
    code = (
        "import sys; from pathlib import Path;"
        "from minference_green.meters.lock import DeviceLock;"
        "lock = DeviceLock('GPU-a', Path(sys.argv[1])); print('held', flush=True);"
        "sys.stdin.read()"
    )
    command = [sys.executable, "-P", "-c", code, str(ground.path)]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        DeviceLock("GPU-a", ground.path)
    finally:
        other.communicate("")


def nvml_fails(call: str, code: int) -> Callable[[Ground], Any]:
    def provoke(ground: Ground) -> None:
        library = ground.nvml("NVIDIA H200")
        if call == "nvmlInit":
            library.fail(call, code)
        gpu = NvmlGpu("GPU-a00", library)
        library.fail(call, code)
        gpu.energy_joules()

    return provoke


def full_disk(ground: Ground) -> None:
    """No room for the whole of a record: none of it may stay."""
    with Journal(ground.path / FILE_NAME) as journal:
        journal.append(ground.header)
        size = (ground.path / FILE_NAME).stat().st_size
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, limits[1]))
        try:
            journal.append(ground.window())
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            assert (ground.path / FILE_NAME).stat().st_size == size


def second_writer(ground: Ground) -> None:
    with Journal(ground.path / FILE_NAME):
        Journal(ground.path / FILE_NAME)


def damaged_line(ground: Ground) -> None:
    with Journal(ground.path / FILE_NAME) as journal:
        journal.append(ground.header)
        journal.append(Note(message="one"))
    file = ground.path / FILE_NAME
    file.write_bytes(file.read_bytes().replace(b'{"event":"note"', b'{"event":"no'))
    load(ground.path)


def edited_figure(ground: Ground) -> None:
    with Journal(ground.path / FILE_NAME) as journal:
        journal.append(ground.header)
        journal.append(ground.window(100.0))
        journal.seal()
    file = ground.path / FILE_NAME
    file.write_bytes(file.read_bytes().replace(b'"joules":100.0', b'"joules":100.1'))
    load(ground.path)


def throttled(cause: str) -> Callable[[Ground], Any]:
    def provoke(ground: Ground) -> str:
        before = DeviceState(device="cpu", throttle_seconds={cause: 1.0})
        after = DeviceState(device="cpu", throttle_seconds={cause: 1.5})
        valid, reasons = doubts(10.0, None, ground.window().readings, [before], [after])
        assert not valid
        return reasons[0]

    return provoke


def held_up_host(ground: Ground) -> str:
    valid, reasons = doubts(10.0, 9.0, ground.window().readings, [], [])
    assert not valid
    return reasons[0]


def company_arrives(ground: Ground) -> None:
    gpu = ground.world.gpu()
    meter = ground.world.counter_meter(gpu)
    meter.begin()
    start = ground.world.time.seconds
    ground.world.time.pass_by(1.0)
    object.__setattr__(gpu.spec, "process_ids", (os.getppid(),))
    meter.end(start, ground.world.time.seconds)


def another_machines_clock(ground: Ground) -> None:
    gpu = ground.world.gpu()
    meter = ground.world.counter_meter(gpu)
    meter.begin()
    now = ground.world.time.seconds
    meter.end(now, now + 1e6)


def no_check(ground: Ground) -> Any:
    gpu = ground.world.gpu()
    meter = CounterMeter({0: gpu}, None, clock=ground.world.time.clock)
    return ground.world.window(meter, [gpu])[0][0]


def sampled_only(during: Callable[[Any], None]) -> Callable[[Ground], Any]:
    return lambda ground: ground.real_window(during, counter=None)


def dead_before_the_window(ground: Ground) -> None:
    [meter] = open_meters(ground.spec(counter=None), gpu_uuids=[])
    try:
        os.kill(meter._sampler.pid, signal.SIGKILL)  # type: ignore[attr-defined]
        time.sleep(0.3)
        meter.begin()
    finally:
        meter.close()


def rapl_zone(**files: str) -> Callable[[Ground], Any]:
    def provoke(ground: Ground) -> None:
        zone = ground.path / "intel-rapl:0"
        zone.mkdir()
        for name, text in files.items():
            (zone / name).write_text(text)
        find_domains(ground.path)

    return provoke


def table_of(content: bytes | None) -> Callable[[Ground], Any]:
    def provoke(ground: Ground) -> None:
        ground.table(content)
        carbon.factor(country="FRA")

    return provoke


ROWS: list[tuple[str, Callable[[Ground], Any], Refused | Labelled | Unharmed]] = [
    # the sampling process, for real
    ("sampler killed", real(during=kill), Labelled("the sampler ended (exit -9)")),
    ("sampler stopped", real(during=stop), Labelled("samples cover")),
    ("sampler starved", real(during=starve), Labelled("samples cover")),
    ("sampler killed, no counter", sampled_only(kill), Labelled("exit -9", joules_null=True)),
    ("sampler stopped, no counter", sampled_only(stop), Labelled("cover", joules_null=True)),
    ("sampler dead, no counter", dead_before_the_window, Refused(faults.SamplerError, "exit -9")),
    ("process forked", real(during=fork), Unharmed()),
    ("wall clock steps", step_wall_clock, Unharmed()),
    # the device
    ("device vanishes", real(faults={"vanish_at": 1.2}), Refused(faults.DeviceLostError)),
    ("wrong UUID", real(faults={"answers_as": "GPU-x"}), Refused(faults.WrongDeviceError)),
    (
        "neither counter nor power",
        real(counter=None, power_fields=[]),
        Refused(faults.NoPowerError),
    ),
    ("MIG slice", virtual(mig=True), Refused(faults.MigError, "--allow-shared")),
    ("MIG slice, allowed", virtual(mig=True, allow_shared=True), Labelled("MIG")),
    ("shared GPU", virtual(process_ids=(os.getppid(),)), Refused(faults.SharedDeviceError)),
    (
        "shared GPU, allowed",
        virtual(process_ids=(os.getppid(),), allow_shared=True),
        Labelled("shared with process"),
    ),
    ("company arrives", company_arrives, Refused(faults.SharedDeviceError)),
    ("two runs on one GPU", other_run_holds_the_gpu, Refused(faults.DeviceInUseError)),
    # the counter
    ("no counter", virtual(counter=None), Refused(faults.NoCounterError)),
    (
        "counter reset",
        virtual(faults=FaultSpec(reset_at=3.0)),
        Refused(faults.CounterBackwardsError),
    ),
    (
        "counter falls to 0",
        virtual(faults=FaultSpec(zero_from=3.0)),
        Refused(faults.CounterBackwardsError),
    ),
    (
        "counter always 0",
        virtual(faults=FaultSpec(zero_from=0.0)),
        Refused(faults.CounterStuckError),
    ),
    ("counter stuck", virtual(faults=FaultSpec(stuck_from=2.5)), Refused(faults.CounterStuckError)),
    ("counter NaN", virtual(faults=FaultSpec(nan_from=3.0)), Refused(faults.NotANumberError)),
    (
        "counter near 0 W",
        virtual(faults=FaultSpec(scale_from=1.4, scale=0.01)),
        Refused(faults.ImplausiblePowerError),
    ),
    (
        "counter above the limit",
        virtual(faults=FaultSpec(scale_from=2.0, scale=2.0)),
        Refused(faults.ImplausiblePowerError),
    ),
    (
        "counter forbidden",
        virtual(faults=FaultSpec(counter_forbidden=True)),
        Refused(faults.NotPermittedError),
    ),
    (
        "calls too slow",
        virtual(counter=CounterSpec(call_seconds=0.03)),
        Refused(faults.CounterSlowError),
    ),
    (
        "counter gains 10 % too much",
        virtual(seconds=10.0, watts=500.0, faults=FaultSpec(scale_from=0.0, scale=1.1)),
        Labelled("disputed"),
    ),
    ("counter unchecked", no_check, Labelled("no independent check")),
    # the window
    (
        "window too short",
        virtual(seconds=0.002, watts=120.0),
        Labelled("too short", joules_null=True),
    ),
    ("another machine's clock", another_machines_clock, Refused(faults.WindowError, "after now")),
    ("host held up", held_up_host, Labelled("host was held up")),
    ("thermal slowdown", throttled("thermal"), Labelled("thermal slowdown")),
    ("power brake", throttled("power_brake"), Labelled("power brake slowdown")),
    # the library
    (
        "no NVML",
        nvml_fails("nvmlInit", pynvml.NVML_ERROR_LIBRARY_NOT_FOUND),
        Refused(faults.NvmlMissingError, "--no-energy"),
    ),
    (
        "no driver",
        nvml_fails("nvmlInit", pynvml.NVML_ERROR_DRIVER_NOT_LOADED),
        Refused(faults.DriverError),
    ),
    (
        "NVML forbidden",
        nvml_fails("nvmlInit", pynvml.NVML_ERROR_NO_PERMISSION),
        Refused(faults.NotPermittedError),
    ),
    (
        "GPU lost",
        nvml_fails("nvmlDeviceGetTotalEnergyConsumption", pynvml.NVML_ERROR_GPU_IS_LOST),
        Refused(faults.DeviceLostError),
    ),
    (
        "unknown UUID",
        lambda ground: NvmlGpu("GPU-none", ground.nvml("NVIDIA H200")),
        Refused(faults.NoGpuError, "GPU-a00"),
    ),
    # the host's counters
    ("no RAPL", lambda ground: find_domains(ground.path), Refused(faults.RaplError)),
    (
        "RAPL is no number",
        rapl_zone(name="package-0", max_energy_range_uj="9", energy_uj="lots"),
        Refused(faults.RaplError, "no number"),
    ),
    # the file
    ("disk full", full_disk, Refused(MeasurementError, "make room and resume")),
    ("two writers", second_writer, Refused(UsageError, "another run")),
    ("damaged line", damaged_line, Refused(UsageError, "line 2")),
    ("edited figure", edited_figure, Refused(SealError, "changed after it was sealed")),
    # the grams
    ("unknown country", lambda _: carbon.factor(country="XXX"), Refused(UsageError, "XXX")),
    ("corrupt table", table_of(b'{"FRA": 56.0}'), Refused(UsageError, "damaged")),
    ("missing table", table_of(None), Refused(UsageError, "global_energy_mix")),
]


@pytest.fixture
def ground(tmp_path, make_world, fake_nvml, header, window, monkeypatch) -> Ground:
    return Ground(tmp_path, make_world(), fake_nvml, header, window, monkeypatch)


def test_the_matrix_has_thirty_cases_or_more() -> None:
    assert len({name for name, _, _ in ROWS}) == len(ROWS) >= 30


@pytest.mark.parametrize(
    ("provoke", "expected"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS]
)
def test_a_fault_is_refused_by_type_or_labelled_in_words(ground, provoke, expected) -> None:
    match expected:
        case Refused(error, words):
            with pytest.raises(error) as caught:
                provoke(ground)
            assert words in str(caught.value)
        case Labelled(words, joules_null):
            found = provoke(ground)
            if isinstance(found, str):
                assert words in found
                return
            reading = found[0] if isinstance(found, tuple) else found
            assert words in f"{reading.reason} {'disputed' if reading.disputed else ''}"
            assert (reading.joules is None) is joules_null
        case Unharmed():
            reading, truth = provoke(ground)
            assert abs(reading.joules - truth) <= reading.uncertainty_joules
