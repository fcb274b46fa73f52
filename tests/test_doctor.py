"""Each check on simulated GPUs of known truth: a wrong counter must fail the right one."""

import os
from dataclasses import replace
from functools import partial

import pytest

from minference_green import doctor
from minference_green.diagnosis import Diagnosis
from minference_green.meters.device import Conditions
from minference_green.meters.simulated import (
    CounterSpec,
    FaultSpec,
    GpuSpec,
    SimulatedGpu,
    VirtualClock,
    constant,
)


def diagnose(*, full: bool = False, **spec: object) -> Diagnosis:
    spec.setdefault("trace", constant(600.0))
    gpu = SimulatedGpu(GpuSpec(**spec), VirtualClock(1.0).clock)
    return doctor.examine(doctor.simulated_patient(gpu), full=full)


def outcomes(diagnosis: Diagnosis) -> dict[str, str]:
    return {c.name: c.outcome for c in diagnosis.checks}


REAL = CounterSpec(jitter_seconds=0.004, slow_call_seconds=0.017, slow_call_share=0.01)


def test_an_honest_gpu_is_ok_in_every_check_within_90_seconds() -> None:
    clock = VirtualClock(1.0)
    gpu = SimulatedGpu(
        GpuSpec(constant(600.0), counter=REAL, power_noise_watts=3.0, seed=1), clock.clock
    )
    found = doctor.examine(doctor.simulated_patient(gpu), full=False)
    assert set(outcomes(found).values()) == {"OK"}, [c for c in found.checks if c.outcome != "OK"]
    # What starts the load process takes another 15 s on a real GPU.
    assert clock.seconds < 75


def test_the_full_examination_meets_every_goal_on_an_honest_gpu() -> None:
    found = diagnose(full=True, counter=REAL, power_noise_watts=3.0)
    assert set(outcomes(found).values()) == {"OK"}, [c for c in found.checks if c.outcome != "OK"]
    assert {"repeatability", "observer effect"} <= outcomes(found).keys()
    steady = next(c for c in found.checks if c.name == "steady load")
    assert steady.figures["seconds"] >= 20


@pytest.mark.parametrize(
    ("spec", "failing"),
    [
        pytest.param(
            {"faults": FaultSpec(scale_from=0.0, scale=0.9)}, {"steady load"}, id="reads 10 % low"
        ),
        pytest.param({"counter": CounterSpec(lag_seconds=0.3)}, {"counter lag"}, id="lags"),
        pytest.param(
            {"counter": CounterSpec(period_seconds=0.7)},
            {"counter period", "counter lag"},
            id="moves too seldom",
        ),
        pytest.param(
            {"counter": CounterSpec(call_seconds=0.06)}, {"counter call"}, id="answers too slowly"
        ),
        pytest.param({"mig": True}, {"exclusive"}, id="cut into slices"),
        pytest.param({"process_ids": (os.getppid(),)}, {"exclusive"}, id="shared"),
        pytest.param({"counter": None, "power_fields": ()}, {"energy counter"}, id="shows nothing"),
    ],
)
def test_what_is_wrong_with_a_gpu_fails_the_check_for_it(
    spec: dict[str, object], failing: set[str]
) -> None:
    found = diagnose(**spec)
    assert failing <= set(found.failing)
    assert found.outcome == "FAIL"
    for check in found.checks:
        assert check.outcome == "OK" or check.advice, check


def test_a_part_time_sensor_fails_only_where_pulses_lock_to_it() -> None:
    """Under steady load it cannot be told from an honest one."""
    found = diagnose(counter=CounterSpec(sensed_share=0.25))
    assert found.failing == ("pulses at the counter's period",)


@pytest.mark.parametrize(
    "faults",
    [
        pytest.param(FaultSpec(stuck_from=20.0), id="stands still"),
        pytest.param(FaultSpec(reset_at=20.0), id="starts again"),
        pytest.param(FaultSpec(nan_from=20.0), id="is no number"),
        pytest.param(FaultSpec(vanish_at=20.0), id="is gone"),
    ],
)
def test_a_counter_that_breaks_during_the_examination_fails_the_check_under_way(
    faults: FaultSpec,
) -> None:
    found = diagnose(faults=faults)
    broken = [c for c in found.checks if c.outcome == "FAIL"]
    assert broken
    assert any("GPU-51a0-0" in c.finding for c in broken)


def test_the_lag_found_is_the_lag_there_is() -> None:
    for lag in (0.0, 0.03, 0.08):
        found = diagnose(counter=replace(REAL, lag_seconds=lag))
        check = next(c for c in found.checks if c.name == "counter lag")
        assert check.figures["lag_seconds"] == pytest.approx(lag, abs=0.01)


def test_the_periods_found_are_those_there_are() -> None:
    found = diagnose(counter=CounterSpec(period_seconds=0.04, call_seconds=0.0005))
    figures = {c.name: c.figures for c in found.checks}
    assert figures["counter period"]["median_seconds"] == pytest.approx(0.04, abs=0.002)
    assert figures["power period (instant)"]["p5_seconds"] == pytest.approx(0.1, abs=0.005)


def test_a_gpu_without_a_counter_is_a_warning_and_its_power_is_still_looked_at() -> None:
    found = diagnose(counter=None)
    assert outcomes(found)["energy counter"] == "WARN"
    assert outcomes(found)["power period (instant)"] == "OK"
    assert not found.failing


def test_a_trailing_power_reading_is_no_contradiction_under_steady_load() -> None:
    found = diagnose(power_fields=("average",))
    assert outcomes(found)["steady load"] == "OK"


def test_a_hot_gpu_is_a_warning_with_advice() -> None:
    found = diagnose(conditions=Conditions(temperature_celsius=91.0))
    check = next(c for c in found.checks if c.name == "state under load")
    assert check.outcome == "WARN"
    assert "cooling" in check.advice
    assert "91 C" in check.finding


class _Costly:
    """A sampler whose presence makes identical work take 2 % longer."""

    problem = None

    def __init__(self, load: "_SlowedLoad") -> None:
        self._load = load
        load.slowed = True

    def samples(self, device: int, start: float, end: float) -> list[object]:
        return []

    def close(self) -> None:
        self._load.slowed = False


class _SlowedLoad(doctor.SimulatedLoad):
    slowed = False

    def work(self, seconds: float) -> tuple[float, float]:
        return super().work(seconds * (1.02 if self.slowed else 1.0))


def test_a_sampler_that_slows_the_work_fails_the_observer_check() -> None:
    gpu = SimulatedGpu(GpuSpec(constant(600.0)), VirtualClock(1.0).clock)
    load = _SlowedLoad(gpu)
    patient = doctor.Patient(gpu, load, partial(_Costly, load), gpu.clock)
    [check] = doctor._observer(patient)
    assert check.outcome == "FAIL"
    assert check.figures["relative_seconds"] == pytest.approx(0.0198, abs=0.002)


class _Drifting(doctor.SimulatedLoad):
    """The same work takes 3 % longer every other time."""

    calls = 0

    def work(self, seconds: float) -> tuple[float, float]:
        self.calls += 1
        return super().work(seconds * (1.03 if self.calls % 2 else 1.0))


def test_work_that_does_not_repeat_fails_the_repeatability_check() -> None:
    gpu = SimulatedGpu(GpuSpec(constant(600.0)), VirtualClock(1.0).clock)
    patient = replace(doctor.simulated_patient(gpu), load=_Drifting(gpu))
    [check] = doctor._repeatability(patient, patient.open_sampler())
    assert check.outcome == "FAIL"


def test_the_machine_is_looked_at_without_any_gpu(tmp_path) -> None:
    found = doctor.examine_machine(tmp_path / "not" / "there")
    assert set(outcomes(found)) == {"free disk", "libraries", "host energy"}


def test_a_full_disk_fails(tmp_path, monkeypatch) -> None:
    usage = type("Usage", (), {"free": 10 * 2**20})
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: usage)
    found = doctor.examine_machine(tmp_path)
    assert found.failing == ("free disk",)
