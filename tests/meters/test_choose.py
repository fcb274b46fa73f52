"""One word opens the energy sources; what was asked for is read, or refused."""

import json
import time

import pytest

from minference_green.errors import MeasurementError, UsageError
from minference_green.meters import choose, nvml, rapl
from minference_green.meters.choose import open_meters
from minference_green.meters.counter import CounterMeter
from minference_green.meters.device import GpuInfo
from minference_green.meters.evidence import recompute
from minference_green.meters.faults import (
    DeviceInUseError,
    NvmlMissingError,
    RaplError,
    WrongDeviceError,
)
from minference_green.meters.sampled import SampledMeter


@pytest.fixture
def no_rapl(monkeypatch, tmp_path):
    monkeypatch.setattr(rapl.find_domains, "__defaults__", (tmp_path,))


@pytest.fixture
def gpus_file(tmp_path):
    def write(*gpus):
        file = tmp_path / "gpus.json"
        file.write_text(json.dumps({"gpus": list(gpus)}))
        return f"simulated:{file}"

    return write


def measure(meters, seconds=1.0):
    for meter in meters:
        meter.begin()
    start = time.monotonic()
    time.sleep(seconds)
    end = time.monotonic()
    readings = [r for meter in meters for r in meter.end(start, end)]
    for meter in meters:
        meter.close()
    return readings, end - start


def confirm(reading, truth):
    """The check agrees with the truth, or a host too busy to sample is named."""
    if reading.check_joules is None:
        assert "samples cover" in reading.reason
    else:
        assert reading.check_joules == pytest.approx(truth, rel=0.01)


def test_a_simulated_gpu_in_real_time_is_read_and_checked(gpus_file):
    meters = open_meters(gpus_file({"watts": 300}), gpu_uuids=[])
    [reading], seconds = measure(meters)
    assert abs(reading.joules - 300 * seconds) <= reading.uncertainty_joules
    confirm(reading, 300 * seconds)
    assert not reading.disputed
    assert "simulated" in reading.source
    assert "simulated" in meters[0].description
    assert recompute(reading.evidence) == reading.joules


def test_gpus_with_and_without_a_counter_are_each_read_their_way(gpus_file):
    meters = open_meters(gpus_file({"watts": 300, "counter": None}, {"watts": 100}), gpu_uuids=[])
    assert [type(m) for m in meters] == [CounterMeter, SampledMeter]
    (counted, sampled), seconds = measure(meters)
    assert (counted.device, counted.obtained) == ("GPU-51a0-1", "simulated")
    assert (sampled.device, sampled.obtained) == ("GPU-51a0-0", "simulated")
    assert abs(counted.joules - 100 * seconds) <= counted.uncertainty_joules
    confirm(counted, 100 * seconds)
    if sampled.joules is None:
        assert "samples cover" in sampled.reason
    else:
        assert sampled.joules == pytest.approx(300 * seconds, rel=0.01)


def test_a_gpu_that_answers_with_another_uuid_is_refused(gpus_file):
    with pytest.raises(WrongDeviceError):
        open_meters(gpus_file({"watts": 1, "faults": {"answers_as": "GPU-x"}}), gpu_uuids=[])


def test_a_gpu_without_any_power_is_refused_and_leaves_no_sampler(gpus_file, monkeypatch):
    closed = []
    real = choose.Sampler.close
    monkeypatch.setattr(choose.Sampler, "close", lambda s: (closed.append(s.pid), real(s)))
    with pytest.raises(MeasurementError, match="neither"):
        open_meters(gpus_file({"watts": 1, "counter": None, "power_fields": []}), gpu_uuids=[])
    assert len(closed) == 1


def test_none_reads_nothing():
    assert open_meters("none", gpu_uuids=["GPU-a"]) == []


def test_without_a_gpu_the_host_is_the_headline_and_says_that_it_is_modelled(no_rapl):
    [meter] = open_meters("auto", gpu_uuids=[])
    [reading], _ = measure([meter], 0.1)
    assert (reading.obtained, reading.headline) == ("modelled", True)
    assert "modelled, not measured" in meter.description
    assert "no RAPL" in meter.description


def test_rapl_is_read_where_it_can_be(tmp_path, monkeypatch):
    zone = tmp_path / "intel-rapl:0"
    zone.mkdir()
    for name, text in (("name", "package-0"), ("max_energy_range_uj", 9**9), ("energy_uj", 5)):
        (zone / name).write_text(f"{text}\n")
    monkeypatch.setattr(rapl.find_domains, "__defaults__", (tmp_path,))
    [meter] = open_meters("auto", gpu_uuids=[])
    assert "RAPL" in meter.description


def test_rapl_asked_for_and_absent_is_refused(no_rapl):
    with pytest.raises(RaplError, match="no RAPL counters"):
        open_meters("rapl", gpu_uuids=[])


def test_nvml_asked_for_without_a_gpu_is_refused():
    with pytest.raises(UsageError, match="runs on none"):
        open_meters("nvml", gpu_uuids=[])


@pytest.mark.parametrize("kind", ["auto", "nvml"])
def test_a_gpu_that_nvml_cannot_read_is_an_error_and_no_fallback(kind, monkeypatch):
    def missing(uuid):
        raise NvmlMissingError("not found")

    monkeypatch.setattr(nvml, "NvmlGpu", missing)
    with pytest.raises(NvmlMissingError, match="--no-energy"):
        open_meters(kind, gpu_uuids=["GPU-a"])


@pytest.mark.parametrize(
    "kind", ["", "nvidia", "simulated", "simulated:", "auto:x", "none:1", "Auto"]
)
def test_an_unknown_word_is_refused_with_those_there_are(kind):
    with pytest.raises(UsageError, match="simulated:FILE"):
        open_meters(kind, gpu_uuids=[])


class Board:
    """A GPU that is only opened and closed."""

    def __init__(self, uuid, mig=False):
        self.open = True
        self.info = GpuInfo("GPU-a", "H200", "NVML", "1", True, "instant", mig=mig)

    def process_ids(self):
        return ()

    def close(self):
        self.open = False


class NoSampler:
    def __init__(self, source):
        self.source = source

    def wait_ready(self): ...
    def close(self): ...


@pytest.fixture
def boards(monkeypatch, tmp_path):
    opened = []

    def open_board(uuid):
        opened.append(Board(uuid, mig=uuid.startswith("MIG")))
        return opened[-1]

    monkeypatch.setattr(nvml, "NvmlGpu", open_board)
    monkeypatch.setattr(choose, "Sampler", NoSampler)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    return opened


def test_a_gpu_is_held_until_its_meter_closes(boards):
    [meter] = open_meters("nvml", gpu_uuids=["GPU-a"])
    with pytest.raises(DeviceInUseError):
        open_meters("nvml", gpu_uuids=["GPU-a"])
    assert [b.open for b in boards] == [True, False]
    meter.close()
    assert not any(b.open for b in boards)
    [again] = open_meters("nvml", gpu_uuids=["GPU-a"])
    again.close()


def test_two_slices_of_one_board_are_read_once(boards):
    [meter] = open_meters("nvml", gpu_uuids=["MIG-1", "MIG-2"], allow_shared=True)
    assert len(meter.devices) == 1
    meter.close()


def test_beside_a_gpu_the_host_is_read_last_and_is_no_headline(boards, no_rapl):
    gpu, host = open_meters("auto", gpu_uuids=["GPU-a"])
    assert isinstance(gpu, CounterMeter)
    assert "beside the headline" in host.description
    gpu.close()


def test_without_a_list_the_gpus_are_those_that_cuda_would_show(boards, monkeypatch):
    monkeypatch.setattr(nvml, "gpu_present", lambda: True)
    monkeypatch.setattr(nvml, "visible_gpus", lambda environ: ["GPU-a"])
    [meter] = open_meters("nvml", gpu_uuids=None)
    assert meter.devices[0].uuid == "GPU-a"
    meter.close()


def test_opening_meters_loads_neither_torch_nor_pandas():
    import subprocess
    import sys

    code = (
        "import sys; from minference_green.meters.choose import open_meters;"
        "open_meters('modelled', gpu_uuids=[]);"
        "print(sorted({'torch', 'scipy', 'pandas', 'codecarbon'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert out.stdout.strip() == "[]", out.stderr
