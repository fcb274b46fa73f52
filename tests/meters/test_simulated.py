"""The simulated device: its truth is exact, its faults are those it is told to have."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minference_green.meters.faults import SimulatedSpecError
from minference_green.meters.simulated import (
    CounterSpec,
    Trace,
    VirtualClock,
    constant,
    load_specs,
    steps,
)


def test_a_traces_joules_are_its_area():
    trace = Trace(((0.0, 100.0), (2.0, 300.0), (2.0, 50.0), (4.0, 50.0)))
    assert trace.joules(2.0) == pytest.approx(400.0)
    assert trace.joules(5.0) == pytest.approx(400.0 + 3 * 50)
    assert trace.joules(-1.0) == pytest.approx(-100.0)
    assert (trace.watts(1.0), trace.watts(2.0), trace.watts(9.0)) == (200.0, 50.0, 50.0)


def test_a_repeating_trace_goes_on_for_ever():
    trace = Trace(((0.0, 100.0), (1.0, 100.0), (1.0, 500.0), (2.0, 500.0)), repeat_seconds=2.0)
    assert trace.joules(20.0) == pytest.approx(10 * 600.0)
    assert trace.joules(21.5) == pytest.approx(10 * 600.0 + 100 + 250)
    assert trace.watts(21.5) == 500.0


@given(
    st.lists(st.tuples(st.floats(0, 20), st.floats(0, 700)), min_size=1, max_size=8),
    st.floats(0.1, 20),
)
def test_joules_are_the_integral_of_watts(points, end):
    trace = Trace(tuple(sorted(points, key=lambda p: p[0])))
    n = 1000
    area = sum(trace.watts((i + 0.5) * end / n) for i in range(n)) * end / n
    # Each step of the trace may fall anywhere within one of the cells.
    assert trace.joules(end) == pytest.approx(area, abs=8 * 700 * end / n + 1e-6)


@pytest.mark.parametrize(
    "points", [(), ((1.0, 5.0), (0.0, 5.0)), ((0.0, -1.0),), ((0.0, float("nan")),)]
)
def test_a_trace_that_is_none_is_refused(points):
    with pytest.raises(ValueError, match="trace needs"):
        Trace(points)


def test_a_repeat_that_is_no_time_is_refused():
    with pytest.raises(ValueError, match="repeat_seconds"):
        Trace(((0.0, 1.0),), repeat_seconds=0.0)


def test_a_counter_without_a_period_is_refused():
    with pytest.raises(ValueError, match="period"):
        CounterSpec(period_seconds=0.0)


def moves(world, gpu, seconds):
    """(time, value) of each move seen in continuous polling."""
    found, last, end = [], gpu.energy_joules(), world.time.seconds + seconds
    while world.time.seconds < end:
        value = gpu.energy_joules()
        if value != last:
            found.append((world.time.seconds, value))
        last = value
        world.time.pass_by(0.0005)
    return found


def test_the_counter_moves_once_a_period_by_what_was_spent(world):
    gpu = world.gpu(trace=constant(200.0), counter=CounterSpec(call_seconds=0.0))
    seen = moves(world, gpu, 2.0)
    assert 19 <= len(seen) <= 21
    gained = [b[1] - a[1] for a, b in itertools.pairwise(seen)]
    assert gained == pytest.approx([20.0] * len(gained), abs=0.0021)


def test_jitter_moves_the_updates_and_keeps_the_sum(world):
    gpu = world.gpu(
        trace=constant(200.0), counter=CounterSpec(call_seconds=0.0, jitter_seconds=0.02)
    )
    seen = moves(world, gpu, 3.0)
    intervals = [b[0] - a[0] for a, b in itertools.pairwise(seen)]
    assert max(intervals) - min(intervals) > 0.02
    assert (seen[-1][1] - seen[0][1]) / (seen[-1][0] - seen[0][0]) == pytest.approx(200, rel=0.002)


def test_lag_shows_the_past(world):
    trace = steps((0.0, 0.0), (2.0, 1000.0))
    world.time.seconds = 2.151
    prompt = world.gpu(trace=trace, counter=CounterSpec(call_seconds=0.0))
    late = world.gpu("GPU-b", trace=trace, counter=CounterSpec(call_seconds=0.0, lag_seconds=0.06))
    assert prompt.energy_joules() - late.energy_joules() == pytest.approx(60.0, abs=0.01)


def test_quantisation_shows_whole_quanta(world):
    gpu = world.gpu(
        trace=constant(33.0),
        counter=CounterSpec(call_seconds=0.0, quantum_joules=10.0, start_joules=0),
    )
    world.time.seconds = 7.7
    assert gpu.energy_joules() == 250.0


def test_a_part_time_sensor_is_fooled_by_pulses_at_its_own_period(world):
    """Eight phases of a 50 % pulse: an honest counter sees one energy, this one many."""

    def mean_watts(share: float, phase: float) -> float:
        pulse = Trace(
            ((0.0, 600.0), (0.05, 600.0), (0.05, 100.0), (0.1, 100.0)), repeat_seconds=0.1
        )
        counter = CounterSpec(call_seconds=0.0, phase_seconds=phase, sensed_share=share)
        shifted = Trace(
            tuple((t, pulse.watts(t + phase)) for t in [i * 0.0125 for i in range(9)]),
            repeat_seconds=0.1,
        )
        gpu = world.gpu(trace=shifted, counter=counter)
        world.time.seconds = 0.0505
        first = gpu.energy_joules()
        world.time.seconds = 5.0505
        return (gpu.energy_joules() - first) / 5.0

    honest = [mean_watts(1.0, i / 80) for i in range(8)]
    fooled = [mean_watts(0.25, i / 80) for i in range(8)]
    assert max(honest) - min(honest) < 0.1 * max(honest)
    assert max(fooled) - min(fooled) > 0.5 * max(fooled)


def test_slow_calls_take_the_time_they_are_told_to(world):
    gpu = world.gpu(
        counter=CounterSpec(call_seconds=0.003, slow_call_seconds=0.017, slow_call_share=0.25)
    )
    begun = world.time.seconds
    for _ in range(400):
        gpu.energy_joules()
    mean = (world.time.seconds - begun) / 400
    assert mean == pytest.approx(0.75 * 0.003 + 0.25 * 0.017, rel=0.15)


def test_two_processes_see_one_truth(make_world):
    """All chance but call latency hangs on seed and time alone."""
    values = []
    for _ in range(2):
        world = make_world(VirtualClock(3.0))
        gpu = world.gpu(
            counter=CounterSpec(call_seconds=0.0, jitter_seconds=0.03), power_noise_watts=5.0
        )
        world.time.seconds = 4.321
        values.append((gpu.energy_joules(), gpu.watts("instant"), gpu.watts("average")))
    assert values[0] == values[1]


def test_average_power_trails_by_a_second(world):
    gpu = world.gpu(trace=steps((0.0, 100.0), (3.0, 500.0)))
    world.time.seconds = 3.55
    assert gpu.watts("instant") == 500.0
    assert gpu.watts("average") == pytest.approx(100 + 400 * 0.5)


def test_a_file_gives_its_devices(tmp_path):
    file = tmp_path / "gpus.json"
    file.write_text(
        json.dumps(
            {
                "gpus": [
                    {"watts": 300, "name": "H200", "counter": {"lag_seconds": 0.02}},
                    {"watts": [[0, 100], [1, 200]], "repeat_seconds": 2, "counter": None},
                    {"watts": 5, "faults": {"reset_at": 3}, "power_fields": [], "seed": 4},
                ]
            }
        )
    )
    first, second, third = load_specs(file)
    assert (first.name, first.trace.watts(9), first.counter.lag_seconds) == ("H200", 300.0, 0.02)
    assert second.counter is None
    assert second.trace.watts(2.5) == second.trace.watts(0.5)
    assert (third.faults.reset_at, third.power_fields, third.seed) == (3, (), 4)
    assert len({first.uuid, second.uuid, third.uuid}) == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "cannot read"),
        ("{", "not JSON"),
        ("[]", "at least one device"),
        ('{"gpus": []}', "at least one device"),
        ('{"gpus": [{}]}', r"gpus\[0\].*watts"),
        ('{"gpus": [{"watts": -5}]}', "not negative"),
        ('{"gpus": [{"watts": "many"}]}', r"gpus\[0\]"),
        ('{"gpus": [{"watts": 5, "colour": "red"}]}', "colour"),
        ('{"gpus": [{"watts": 5, "counter": {"period": 1}}]}', "period"),
        ('{"gpus": [7]}', r"gpus\[0\]"),
        ('{"gpus": [{"watts": 5, "uuid": "a"}, {"watts": 5, "uuid": "a"}]}', "one uuid"),
    ],
)
def test_a_file_that_is_no_simulation_is_refused_with_the_place(tmp_path, text, words):
    file = tmp_path / "gpus.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(SimulatedSpecError, match=words):
        load_specs(file)
