"""NVML behind its one door: identities, units, and a type for each failure."""

import ctypes

import pynvml
import pytest

from minference_green.errors import MeasurementError
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
from minference_green.meters.nvml import NvmlGpu, visible_gpus

COUNTER = "nvmlDeviceGetTotalEnergyConsumption"


def test_a_gpu_is_described_with_units_undone(fake_nvml):
    gpu = NvmlGpu("GPU-a00", fake_nvml("NVIDIA H200"))
    info = gpu.info
    assert (info.uuid, info.name, info.driver) == ("GPU-a00", "NVIDIA H200", "580.1")
    assert (info.capability, info.power_limit_watts) == ("9.0", 700.0)
    assert info.memory_bytes == 80 * 2**30
    assert (info.has_counter, info.mig, info.scope) == (True, False, "board")
    assert gpu.energy_joules() == pytest.approx(123_456.789)


def test_power_is_read_from_the_most_immediate_field_supported(fake_nvml):
    nvml = fake_nvml("NVIDIA H200")
    assert NvmlGpu("GPU-a00", nvml).info.power_field == "instant"
    assert NvmlGpu("GPU-a00", nvml).watts("instant") == 300.0
    del nvml.fields[186]
    assert NvmlGpu("GPU-a00", nvml).info.power_field == "average"
    del nvml.fields[185]
    assert NvmlGpu("GPU-a00", nvml).info.power_field == "usage"
    assert NvmlGpu("GPU-a00", nvml).watts("usage") == 200.0
    nvml.fail("nvmlDeviceGetPowerUsage", pynvml.NVML_ERROR_NOT_SUPPORTED)
    assert NvmlGpu("GPU-a00", nvml).info.power_field is None


def test_a_field_that_is_not_supported_is_refused_when_asked_for(fake_nvml):
    nvml = fake_nvml("NVIDIA H200")
    del nvml.fields[186]
    with pytest.raises(NoPowerError, match="GPU-a00"):
        NvmlGpu("GPU-a00", nvml).watts("instant")


def test_a_superchip_is_read_for_the_whole_module(fake_nvml):
    """Counter and field 186 must cover the same thing, or the check compares two things."""
    nvml = fake_nvml("NVIDIA GH200 480GB")
    nvml.fields = {(186, 1): 450_000, 186: 300_000}
    gpu = NvmlGpu("GPU-a00", nvml)
    assert gpu.info.scope == "module"
    assert gpu.watts("instant") == 450.0


def test_conditions_carry_throttle_times_in_seconds(fake_nvml):
    nvml = fake_nvml("NVIDIA H200")
    nvml.fields |= {74: 10**9, 75: 2 * 10**9, 269: 2 * 10**9, 270: 3 * 10**9, 271: 4 * 10**9}
    now = NvmlGpu("GPU-a00", nvml).conditions()
    assert (now.temperature_celsius, now.memory_temperature_celsius) == (41, 45)
    assert (now.sm_clock_mhz, now.memory_clock_mhz) == (1980, 3201)
    assert (now.power_limit_watts, now.memory_used_bytes) == (700.0, 2**30)
    assert now.throttle_seconds == {"power_cap": 1.0, "thermal": 5.0, "power_brake": 4.0}


def test_conditions_leave_out_what_the_device_does_not_tell(fake_nvml):
    nvml = fake_nvml("NVIDIA T4")
    nvml.fields = {}
    for call in ("nvmlDeviceGetTemperature", "nvmlDeviceGetClockInfo", "nvmlDeviceGetMemoryInfo"):
        nvml.fail(call, pynvml.NVML_ERROR_NOT_SUPPORTED)
    now = NvmlGpu("GPU-a00", nvml).conditions()
    assert now.temperature_celsius is None
    assert now.memory_used_bytes is None
    assert now.throttle_seconds == {}


def test_fields_are_read_by_the_type_they_come_with(fake_nvml):
    nvml = fake_nvml("NVIDIA H200")

    def answer(handle, fields):
        values = (pynvml.c_nvmlFieldValue_t * 1)()
        ctypes.memset(values, 0xFF, ctypes.sizeof(values))
        values[0].nvmlReturn = pynvml.NVML_SUCCESS
        values[0].valueType = pynvml.NVML_VALUE_TYPE_UNSIGNED_INT
        values[0].value.uiVal = 123_000
        return values

    nvml._DeviceGetFieldValues = answer
    assert NvmlGpu("GPU-a00", nvml).watts("instant") == 123.0


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, NvmlMissingError),
        (pynvml.NVML_ERROR_DRIVER_NOT_LOADED, DriverError),
        (pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH, DriverError),
        (pynvml.NVML_ERROR_NO_PERMISSION, NotPermittedError),
        (pynvml.NVML_ERROR_OPERATING_SYSTEM, NotPermittedError),
        (pynvml.NVML_ERROR_UNKNOWN, NvmlCallError),
    ],
)
def test_a_library_that_does_not_start_is_a_typed_refusal_with_advice(fake_nvml, code, error):
    nvml = fake_nvml("NVIDIA H200")
    nvml.fail("nvmlInit", code)
    with pytest.raises(error, match="--no-energy"):
        NvmlGpu("GPU-a00", nvml)


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (pynvml.NVML_ERROR_NOT_SUPPORTED, NoCounterError),
        (pynvml.NVML_ERROR_GPU_IS_LOST, DeviceLostError),
        (pynvml.NVML_ERROR_RESET_REQUIRED, DeviceLostError),
        (pynvml.NVML_ERROR_UNINITIALIZED, DeviceLostError),
        (pynvml.NVML_ERROR_NO_PERMISSION, NotPermittedError),
        (pynvml.NVML_ERROR_TIMEOUT, NvmlCallError),
    ],
)
def test_a_counter_that_fails_is_a_typed_refusal_that_names_the_gpu(fake_nvml, code, error):
    nvml = fake_nvml("NVIDIA H200")
    gpu = NvmlGpu("GPU-a00", nvml)
    nvml.fail(COUNTER, code)
    with pytest.raises(error, match="GPU-a00"):
        gpu.energy_joules()


def test_a_gpu_without_counter_says_so_before_it_is_read(fake_nvml):
    nvml = fake_nvml("NVIDIA P100")
    nvml.fail(COUNTER, pynvml.NVML_ERROR_NOT_SUPPORTED)
    assert not NvmlGpu("GPU-a00", nvml).info.has_counter


def test_a_field_that_loses_the_device_is_not_taken_for_unsupported(fake_nvml):
    nvml = fake_nvml("NVIDIA H200")
    gpu = NvmlGpu("GPU-a00", nvml)
    assert gpu.info.has_counter
    nvml.fail("nvmlDeviceGetFieldValues", pynvml.NVML_ERROR_GPU_IS_LOST)
    with pytest.raises(DeviceLostError):
        gpu.watts("instant")


def test_an_unknown_uuid_is_refused_with_those_there_are(fake_nvml):
    with pytest.raises(NoGpuError, match="GPU-a00, GPU-b01"):
        NvmlGpu("GPU-zzz", fake_nvml("NVIDIA H200", "NVIDIA H200"))


@pytest.mark.parametrize("name", ["MIG-slice", "GPU-slice"])
def test_a_slices_uuid_opens_its_board_and_shows_that_it_is_cut(fake_nvml, name):
    """For torch a slice's UUID begins with ``GPU-``."""
    nvml = fake_nvml("NVIDIA H200")
    nvml.slices, nvml.mig = {"MIG-slice": "GPU-a00"}, 1
    info = NvmlGpu(name, nvml).info
    assert (info.uuid, info.mig) == ("GPU-a00", True)


def test_processes_are_listed_and_an_unsupported_list_is_empty(fake_nvml):
    nvml = fake_nvml("NVIDIA H200")
    nvml.pids = (11, 12)
    gpu = NvmlGpu("GPU-a00", nvml)
    assert gpu.process_ids() == (11, 12)
    nvml.fail("nvmlDeviceGetComputeRunningProcesses", pynvml.NVML_ERROR_NOT_SUPPORTED)
    assert gpu.process_ids() == ()


def test_closing_gives_the_library_back(fake_nvml):
    nvml = fake_nvml("NVIDIA H200")
    NvmlGpu("GPU-a00", nvml).close()
    assert nvml.shut == 1


@pytest.mark.parametrize(
    ("visible", "uuids"),
    [
        (None, ["GPU-a00", "GPU-b01", "GPU-c02"]),
        ("", []),
        ("-1", []),
        ("NoDevFiles", NoGpuError),
        ("2,0", ["GPU-c02", "GPU-a00"]),
        ("1,-1,0", ["GPU-b01"]),
        ("GPU-b01", ["GPU-b01"]),
        ("gpu-B", ["GPU-b01"]),
        (" 0 , 1 ", ["GPU-a00", "GPU-b01"]),
        ("MIG-1234", ["MIG-1234"]),
        ("MIG-GPU-b01/1/0", ["GPU-b01"]),
        ("GPU-", AmbiguousDeviceError),
        ("0,0", AmbiguousDeviceError),
        ("3", NoGpuError),
        ("GPU-zzz", NoGpuError),
    ],
)
def test_cuda_visible_devices_means_what_cuda_makes_of_it(fake_nvml, visible, uuids):
    nvml = fake_nvml("NVIDIA H200", "NVIDIA H200", "NVIDIA H200")
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    if isinstance(uuids, list):
        assert visible_gpus(environ, nvml) == uuids
    else:
        with pytest.raises(uuids):
            visible_gpus(environ, nvml)


def test_an_index_among_different_gpus_needs_the_bus_order(fake_nvml):
    """CUDA numbers them by speed, NVML by PCI bus."""
    nvml = fake_nvml("NVIDIA T4", "NVIDIA H200")
    with pytest.raises(AmbiguousDeviceError, match="CUDA_DEVICE_ORDER=PCI_BUS_ID"):
        visible_gpus({"CUDA_VISIBLE_DEVICES": "1"}, nvml)
    environ = {"CUDA_VISIBLE_DEVICES": "1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    assert visible_gpus(environ, nvml) == ["GPU-b01"]


def test_a_list_of_gpus_that_cannot_be_had_is_a_typed_refusal(fake_nvml):
    nvml = fake_nvml("NVIDIA H200")
    nvml.fail("nvmlDeviceGetCount", pynvml.NVML_ERROR_UNKNOWN)
    with pytest.raises(MeasurementError, match="list of GPUs"):
        visible_gpus({}, nvml)
