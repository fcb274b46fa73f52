"""The noise floor: what it is computed from, and which margins it refuses."""

import math

import pytest

from minference_green import baseline, calibration
from minference_green.errors import UsageError
from minference_green.results import Device

WOBBLE = (0.004, -0.006, 0.002, 0.005, -0.003, -0.002)


@pytest.fixture
def equal_arms(make_run):
    """Dense against dense, with a wobble of the second arm."""

    def build(spread=1.0, second="dense-again", **more):
        wobble = [[100 * math.exp(spread * w)] for w in WOBBLE]
        return make_run({(8192, "dense"): [[100.0]] * 6, (8192, second): wobble}, **more)

    return build


def test_the_spread_between_blocks_is_the_noise_floor(equal_arms):
    floor = calibration.noise_floor(equal_arms())
    mean = sum(WOBBLE) / 6
    spread = math.sqrt(sum((w - mean) ** 2 for w in WOBBLE) / 5)
    assert floor.joules_spread == pytest.approx(spread)
    assert floor.blocks == 6
    assert floor.comparisons[0].energy_saving.value == pytest.approx(0, abs=1e-3)


def test_more_blocks_detect_a_smaller_margin(equal_arms):
    floor = calibration.noise_floor(equal_arms())
    least = [floor.detectable("joules", n, 6) for n in (6, 10, 16)]
    assert least == sorted(least, reverse=True)
    assert 0.005 < least[-1] < least[0] < 0.03
    assert floor.detectable("joules", 1, 6) is None


def test_joules_that_were_not_measured_have_no_floor(equal_arms, make_run):
    keys = ((8192, "dense"), (8192, "dense-again"))
    blind = make_run({k: [[None]] * 3 for k in keys}, seconds={k: [[1.0]] * 3 for k in keys})
    floor = calibration.noise_floor(blind)
    assert floor.detectable("joules", 6, 6) is None
    assert floor.detectable("seconds", 6, 6) is not None
    assert any(
        "joules with 6 against 6 blocks: unknown" in line for line in calibration.lines(floor)
    )


def test_a_margin_below_the_noise_floor_is_refused(tmp_path, equal_arms, store):
    run = equal_arms()
    baseline.save(tmp_path, "calibration", store(run))
    least = calibration.noise_floor(run).detectable("joules", 16, 6)
    with pytest.raises(UsageError, match=r"margin of .* is below .*raise the margin"):
        calibration.refuse_too_fine(tmp_path, {"energy_ratio": 0.99 * least}, [run], 16)
    assert calibration.refuse_too_fine(tmp_path, {"energy_ratio": 1.01 * least}, [run], 16) == ()
    assert calibration.refuse_too_fine(tmp_path, {"density": 0.0001}, [run], 16) == ()


def test_without_a_calibration_no_margin_is_refused(tmp_path, equal_arms):
    assert calibration.refuse_too_fine(tmp_path, {"energy_ratio": 1e-9}, [equal_arms()], 16) == ()


def test_a_calibration_of_another_machine_is_not_used_and_says_so(tmp_path, equal_arms, store):
    baseline.save(tmp_path, "calibration", store(equal_arms()))
    other = equal_arms(fingerprint={"devices": (Device(kind="gpu", name="NVIDIA H100"),)})
    (warning,) = calibration.refuse_too_fine(tmp_path, {"energy_ratio": 1e-9}, [other], 16)
    assert "device: NVIDIA H200 -> NVIDIA H100" in warning


def test_with_the_least_margin_nine_in_ten_unchanged_runs_pass():
    """The promise of ``detectable_margin``, by simulation."""
    import numpy as np

    from minference_green.stats import detectable_margin, welch
    from minference_green.verdict import decision_level

    rng, spread = np.random.default_rng(1), 0.01
    limit = math.log1p(detectable_margin(spread, 10, 10, decision_level()))
    passed = [
        welch(*rng.normal(0, spread, (2, 10)).tolist()).interval(decision_level())[1] < limit
        for _ in range(1000)
    ]
    assert 0.86 <= sum(passed) / 1000 <= 0.94
