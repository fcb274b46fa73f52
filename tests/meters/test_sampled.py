"""GPUs without a counter: held power, wider uncertainty, null where samples are missing."""

import pytest

from minference_green.meters import evidence
from minference_green.meters.faults import (
    DeviceLostError,
    MigError,
    NoPowerError,
    SamplerError,
    WindowError,
)
from minference_green.meters.sampled import SampledMeter
from minference_green.meters.simulated import FaultSpec


@pytest.fixture
def meter_of(world, ideal_sampler):
    def make(gpu, **options):
        return SampledMeter({0: gpu}, ideal_sampler([gpu]), clock=world.time.clock, **options)

    return make


@pytest.mark.parametrize("seconds", [1.0, 3.0, 10.0])
def test_the_truth_lies_within_the_stated_uncertainty(make_world, ideal_sampler, seconds):
    for seed in range(20):
        world = make_world()
        gpu = world.cold_gpu(seed)
        meter = SampledMeter({0: gpu}, ideal_sampler([gpu]), clock=world.time.clock)
        [reading], start, end = world.window(meter, [gpu], seconds)
        truth = gpu.truth(start, end)
        assert abs(reading.joules - truth) <= reading.uncertainty_joules
        assert reading.uncertainty_joules < (0.02 + 0.15 / seconds) * truth


def test_the_reading_says_that_it_was_sampled_and_from_which_field(world, meter_of):
    gpu = world.gpu(counter=None)
    meter = meter_of(gpu)
    [reading], _, _ = world.window(meter, [gpu])
    assert reading.obtained == "simulated"
    assert "186" in reading.source
    assert "no energy counter" in meter.description
    assert reading.check_joules is None


def test_joules_are_recomputed_from_the_evidence(world, meter_of):
    gpu = world.gpu(counter=None)
    [reading], _, _ = world.window(meter_of(gpu), [gpu])
    assert evidence.recompute(reading.evidence) == pytest.approx(reading.joules)


def test_power_averaged_over_a_second_is_believed_less(world, meter_of):
    gpu = world.gpu(counter=None)
    [sharp], _, _ = world.window(meter_of(gpu), [gpu])
    slow = world.gpu("GPU-b", counter=None, power_fields=("average",))
    [blunt], _, _ = world.window(meter_of(slow), [slow])
    assert blunt.uncertainty_joules > 3 * sharp.uncertainty_joules
    assert "185" in blunt.source


def test_missing_samples_make_joules_null_with_the_reason(world, ideal_sampler):
    gpu = world.gpu(counter=None)
    sampler = ideal_sampler([gpu])
    meter = SampledMeter({0: gpu}, sampler, clock=world.time.clock)
    sampler.lost = lambda t: t > 2.0
    [reading], _, _ = world.window(meter, [gpu])
    assert reading.joules is None
    assert reading.uncertainty_joules is None
    assert "samples cover" in reading.reason


def test_no_window_begins_on_a_sampler_that_failed(world, ideal_sampler):
    gpu = world.gpu(counter=None)
    sampler = ideal_sampler([gpu])
    sampler.problem = "the sampler ended (exit 1)"
    meter = SampledMeter({0: gpu}, sampler, clock=world.time.clock)
    with pytest.raises(SamplerError, match="exit 1"):
        meter.begin()


def test_a_gpu_that_shows_no_power_either_is_refused(world, meter_of):
    with pytest.raises(NoPowerError, match="neither"):
        meter_of(world.gpu(counter=None, power_fields=()))


def test_a_slice_is_refused_here_too(world, meter_of):
    gpu = world.gpu(counter=None, mig=True)
    with pytest.raises(MigError):
        meter_of(gpu)
    [reading], _, _ = world.window(meter_of(gpu, allow_shared=True), [gpu])
    assert "MIG" in reading.reason


def test_a_gpu_that_vanishes_in_the_window_is_refused(world, meter_of):
    gpu = world.gpu(counter=None, faults=FaultSpec(vanish_at=2.0))
    with pytest.raises(DeviceLostError):
        world.window(meter_of(gpu), [gpu])


def test_windows_out_of_order_are_refused(world, meter_of):
    meter = meter_of(world.gpu(counter=None))
    with pytest.raises(WindowError, match="without begin"):
        meter.end(1.0, 2.0)
    meter.begin()
    with pytest.raises(WindowError, match="before the meter was ready"):
        meter.end(0.1, 0.9)


def test_closing_releases_what_was_opened(world, meter_of):
    released = []
    meter_of(world.gpu(counter=None), release=lambda: released.append(True)).close()
    assert released == [True]
