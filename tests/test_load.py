"""The load process for real, on the CPU; and the simulated load's power."""

import time

import pytest
import torch

from minference_green.errors import MeasurementError
from minference_green.load import SimulatedLoad, WorkerLoad
from minference_green.load_worker import _begin, _Products
from minference_green.meters.simulated import GpuSpec, SimulatedGpu, VirtualClock, constant, steps


@pytest.fixture(scope="module")
def load():
    running = WorkerLoad("cpu")
    yield running
    running.close()


def test_work_is_done_between_the_two_times_it_returns(load) -> None:
    before = time.monotonic()
    start, end = load.work(0.2)
    assert before <= start < end <= time.monotonic()


def test_the_work_for_so_many_seconds_is_a_number_of_products(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    products = _Products(torch.device("cpu"))
    assert products.seconds > 0
    products.seconds = 0.01
    assert [products.count(seconds) for seconds in (1.0, 0.2, 0.001)] == [100, 20, 1]
    launched: list[int] = []
    monkeypatch.setattr(products, "launch", launched.append)
    _begin({"type": "work", "seconds": 0.2}, products)
    assert launched == [20]


def test_a_load_is_switched_while_it_runs(load) -> None:
    before = time.monotonic()
    began = load.steady()
    load.pulsed(0.1, time.monotonic())
    time.sleep(0.3)
    ended = load.idle()
    assert before <= began < ended <= time.monotonic()
    start, _ = load.work(0.05)
    assert start >= ended


def test_a_gpu_that_torch_does_not_see_is_refused_with_advice() -> None:
    with pytest.raises(MeasurementError, match="not GPU-none"):
        WorkerLoad("GPU-none")


def test_a_load_process_that_dies_is_told() -> None:
    load = WorkerLoad("cpu")
    load._worker._process.kill()
    with pytest.raises(MeasurementError, match="exit code -9"):
        load.steady()


def test_a_simulated_load_draws_its_traces_power_and_a_fifth_when_idle() -> None:
    gpu = SimulatedGpu(GpuSpec(constant(500.0)), VirtualClock(3.0).clock)
    load = SimulatedLoad(gpu)
    start = load.steady()
    gpu.clock.sleep(2.0)
    end = load.idle()
    gpu.clock.sleep(1.0)
    assert gpu.truth(start, end) == pytest.approx(1000.0)
    assert gpu.truth(end, end + 1.0) == pytest.approx(100.0)
    assert gpu.truth(0.0, 3.0) == pytest.approx(300.0)


def test_simulated_pulses_are_on_half_the_time_from_their_origin() -> None:
    gpu = SimulatedGpu(GpuSpec(steps((0.0, 80.0), (1.0, 600.0))), VirtualClock(3.0).clock)
    SimulatedLoad(gpu).pulsed(0.1, 2.97)
    assert gpu.truth(3.07, 3.12) == pytest.approx(30.0)
    assert gpu.truth(3.12, 3.17) == pytest.approx(4.0)
    assert gpu.truth(4.0, 5.0) == pytest.approx(340.0)
