"""The real library on a real GPU: units, plausibility, counter against sampled power."""

import os
import time

import pytest

from minference_green.meters.choose import open_meters
from minference_green.meters.nvml import NvmlGpu, gpu_present, visible_gpus

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not gpu_present(), reason="no NVIDIA driver here"),
]


@pytest.fixture
def uuid():
    return visible_gpus(os.environ)[0]


def test_the_counter_grows_by_a_power_the_board_can_have(uuid):
    gpu = NvmlGpu(uuid)
    before, begun = gpu.energy_joules(), time.monotonic()
    time.sleep(2.0)
    watts = (gpu.energy_joules() - before) / (time.monotonic() - begun)
    assert 5 < watts < gpu.info.power_limit_watts
    assert watts == pytest.approx(gpu.watts(gpu.info.power_field), rel=0.5)
    gpu.close()


def test_throttle_times_are_seconds_since_the_driver_was_loaded(uuid):
    gpu = NvmlGpu(uuid)
    first = gpu.conditions()
    time.sleep(1.0)
    last = gpu.conditions()
    assert 0 < first.temperature_celsius < 110
    assert first.sm_clock_mhz > 0
    for cause, seconds in last.throttle_seconds.items():
        assert 0 <= seconds - first.throttle_seconds[cause] < 5, cause
    gpu.close()


def test_an_idle_window_is_undisputed(uuid):
    meters = open_meters("nvml", gpu_uuids=[uuid])
    try:
        meters[0].begin()
        start = time.monotonic()
        time.sleep(3.0)
        end = time.monotonic()
        [reading] = meters[0].end(start, end)
    finally:
        meters[0].close()
    assert reading.check_joules is not None, reading.reason
    assert not reading.disputed
    assert reading.uncertainty_joules < 0.1 * reading.joules
