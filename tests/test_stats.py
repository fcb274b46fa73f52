"""Estimates, comparisons and break-even lengths of runs with stated figures."""

import math
import random
import subprocess
import sys
from statistics import fmean

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from minference_green import stats
from minference_green.errors import MeasurementError, UsageError
from minference_green.results import Observation, Setup, Skip

# Block means (geometric, of two windows) 100, 110, 121: logs in steps of ln 1.1.
DENSE = [[100.0, 100.0], [100.0, 121.0], [121.0, 121.0]]
LN11 = math.log(1.1)
T90_DOF2 = 2.919986  # Student t, two-sided 90 %, two degrees of freedom (any printed table)


def only(items, **wanted):
    (found,) = [i for i in items if all(getattr(i, k) == v for k, v in wanted.items())]
    return found


def test_joules_per_mtok_is_the_geometric_mean_of_blocks_with_student_t_on_logs(make_run):
    (cell,) = stats.cells(make_run({(1000, "dense"): DENSE}))
    half = T90_DOF2 * LN11 / math.sqrt(3)
    assert cell.joules_per_mtok.value == pytest.approx(110)
    assert cell.joules_per_mtok.low == pytest.approx(110 * math.exp(-half), rel=1e-6)
    assert cell.joules_per_mtok.high == pytest.approx(110 * math.exp(half), rel=1e-6)
    assert cell.joules_per_mtok.blocks == 3
    assert cell.joules_per_mtok.reason is None


def test_every_figure_of_a_cell_follows_from_its_joules_and_seconds(make_run):
    (cell,) = stats.cells(make_run({(1000, "dense"): DENSE}, batch=2))
    assert cell.seconds_per_mtok.value == pytest.approx(110 / 500)
    assert cell.ttft_seconds.value == pytest.approx(110 / 500 * 1000 * 2 / 1e6)  # batch of 2
    assert cell.joules_per_prompt.value == pytest.approx(110 * 1000 / 1e6)
    operational = 110 / 3.6e6 * 1.2 * 56.039
    assert cell.operational_g_per_mtok.value == pytest.approx(operational)
    assert cell.sci_g_per_mtok.value == pytest.approx(operational + 110 / 500 * 0.0104)
    assert (cell.windows_used, cell.windows_invalid, cell.obtained) == (6, 0, "counter")


def test_grams_are_zero_and_not_an_error_where_the_factor_is_zero(make_run):
    run = make_run({(1000, "dense"): DENSE})
    factor = run.header.carbon.factor.model_copy(update={"g_per_kwh": 0.0})
    carbon = run.header.carbon.model_copy(update={"factor": factor, "embodied_g_per_second": 0.0})
    run = run.model_copy(update={"header": run.header.model_copy(update={"carbon": carbon})})
    (cell,) = stats.cells(run)
    assert cell.operational_g_per_mtok.value == cell.sci_g_per_mtok.value == 0.0
    assert cell.sci_g_per_mtok.high == 0.0


def test_the_interval_is_the_one_scipy_gives():
    logs = [0.1, 0.13, 0.08, 0.2, 0.11, 0.09]
    wanted = scipy_stats.ttest_1samp(logs, 0).confidence_interval(0.90)
    assert stats.log_mean(logs).interval(0.90) == pytest.approx((wanted.low, wanted.high))


def test_welch_is_the_one_scipy_gives():
    now, then = [0.1, 0.13, 0.08, 0.2], [0.3, 0.31, 0.29, 0.33, 0.28, 0.3, 0.32]
    wanted = scipy_stats.ttest_ind(now, then, equal_var=False).confidence_interval(0.967)
    assert stats.welch(now, then).interval(0.967) == pytest.approx((wanted.low, wanted.high))


def test_welch_of_figures_without_spread_has_an_empty_interval():
    assert stats.welch([0.5, 0.5], [0.2, 0.2]).interval(0.9) == pytest.approx((0.3, 0.3))


def test_a_prediction_interval_covers_a_new_run_as_often_as_it_says():
    rng = random.Random(3)
    covered = 0
    for _ in range(2000):
        means = [rng.gauss(0, 0.02) for _ in range(5)]
        offset = rng.gauss(0, 0.02)
        low, high = stats.prediction(
            [offset + rng.gauss(0, 1e-4) for _ in range(6)], means
        ).interval(0.9)
        covered += low <= 0 <= high
    assert 0.88 <= covered / 2000 <= 0.92


def test_a_prediction_is_no_tighter_than_the_new_runs_own_spread():
    noisy = stats.prediction([-0.3, 0.3, -0.2, 0.2], [0.0, 0.001, -0.001, 0.0, 0.001])
    own = stats.log_mean([-0.3, 0.3, -0.2, 0.2])
    assert noisy.standard_error >= own.standard_error
    assert noisy.dof == 3


def test_one_block_gives_the_figure_without_an_interval_and_says_so(make_run):
    (cell,) = stats.cells(make_run({(1000, "dense"): DENSE[:1]}))
    assert cell.joules_per_mtok.value == pytest.approx(100)
    assert cell.joules_per_mtok.low is None
    assert cell.joules_per_mtok.high is None
    assert "one block" in cell.joules_per_mtok.reason


def test_invalid_windows_are_counted_and_left_out(make_run):
    energy = {(1000, "dense"): [[100.0, 900.0], [100.0, 100.0]]}
    run = make_run(energy, invalid={(0, 2, "dense"): "thermal slowdown"})
    (cell,) = stats.cells(run)
    # Order 1 is the second method's place: with one method the windows stand at 0 and 2.
    assert cell.joules_per_mtok.value == pytest.approx(100)
    assert (cell.windows_used, cell.windows_invalid) == (3, 1)
    assert stats.invalid_share(run) == 0.25


def test_a_cell_with_only_invalid_windows_is_null_with_their_reason(make_run):
    run = make_run({(1000, "dense"): [[100.0]]}, invalid={(0, 0, "dense"): "thermal slowdown"})
    (cell,) = stats.cells(run)
    assert cell.joules_per_mtok.value is None
    assert cell.seconds_per_mtok.value is None
    assert "thermal slowdown" in cell.joules_per_mtok.reason


def test_joules_that_are_null_stay_null_while_time_is_given(make_run):
    energy = {(1000, "dense"): [[None], [None]]}
    (cell,) = stats.cells(make_run(energy, seconds={(1000, "dense"): [[2.0], [2.0]]}))
    assert cell.joules_per_mtok.value is None
    assert "the counter stood still" in cell.joules_per_mtok.reason
    assert cell.sci_g_per_mtok.value is None
    assert cell.seconds_per_mtok.value == pytest.approx(2.0)
    assert cell.obtained == "none"


def test_windows_without_joules_among_others_are_left_out_and_told(make_run):
    energy = {(1000, "dense"): [[100.0, None], [100.0, 100.0]]}
    seconds = {(1000, "dense"): [[1.0, 1.0], [1.0, 1.0]]}
    (cell,) = stats.cells(make_run(energy, seconds=seconds))
    assert cell.joules_per_mtok.value == pytest.approx(100)
    assert "1 of 4 windows without joules" in cell.joules_per_mtok.reason


def test_a_skipped_cell_carries_the_reason_of_the_skip(make_run):
    skip = Skip(block=0, context_length=1000, method="minference", reason="out of memory at 1000")
    run = make_run({(1000, "dense"): DENSE, (1000, "minference"): []}, events=[skip])
    cell = only(stats.cells(run), method="minference")
    assert cell.joules_per_mtok.value is None
    assert "out of memory" in cell.joules_per_mtok.reason
    (comparison,) = stats.comparisons(run)
    assert comparison.energy_saving.value is None
    assert comparison.energy_saving.reason.startswith("minference: skipped: out of memory")


def test_a_valid_window_of_zero_joules_is_refused(make_run):
    run = make_run({(1000, "dense"): [[0.0]]}, seconds={(1000, "dense"): [[1.0]]})
    with pytest.raises(MeasurementError, match=r"dense at 1000: a valid window with 0.0 J"):
        stats.cells(run)


def test_a_block_started_again_counts_with_its_last_start_alone(make_run):
    run = make_run({(1000, "dense"): [[100.0], [100.0]]})
    again = make_run({(1000, "dense"): [[50.0], [400.0]]})
    restarted = [e for e in again.events if e.block == 1]
    assert isinstance(restarted[0], Setup)
    joined = run.model_copy(update={"events": (*run.events, *restarted)})
    (cell,) = stats.cells(joined)
    assert cell.joules_per_mtok.value == pytest.approx(200)  # sqrt(100 * 400)
    assert cell.windows_used == 2


def test_the_saving_is_paired_by_block_and_its_interval_worked_by_hand(make_run):
    # Ratios per block 0.5, 0.5 * 1.1, 0.5 / 1.1, while the machine wanders by a factor of 9.
    base = [10.0, 90.0, 30.0]
    candidate = [b * r for b, r in zip(base, (0.5, 0.55, 0.5 / 1.1), strict=True)]
    run = make_run(
        {(1000, "dense"): [[b] for b in base], (1000, "minference"): [[c] for c in candidate]}
    )
    (comparison,) = stats.comparisons(run)
    half = T90_DOF2 * LN11 / math.sqrt(3)
    saving = comparison.energy_saving
    assert saving.value == pytest.approx(0.5)
    assert saving.low == pytest.approx(1 - 0.5 * math.exp(half), rel=1e-6)
    assert saving.high == pytest.approx(1 - 0.5 * math.exp(-half), rel=1e-6)
    assert comparison.speedup.value == pytest.approx(2)
    assert comparison.speedup.low == pytest.approx(2 * math.exp(-half), rel=1e-6)
    assert (comparison.reference, comparison.method) == ("dense", "minference")


def test_abba_windows_cancel_a_linear_drift(make_run):
    # Per window position 0, 1, 2, 3 the log energy drifts by 1 %: A at 0 and 3, B at 1 and 2.
    drift = [math.exp(0.01 * i) for i in range(4)]
    run = make_run(
        {
            (1000, "dense"): [[100 * drift[0], 100 * drift[3]]],
            (1000, "minference"): [[80 * drift[1], 80 * drift[2]]],
        }
    )
    (comparison,) = stats.comparisons(run)
    assert comparison.energy_saving.value == pytest.approx(0.2, abs=1e-12)


def test_a_block_with_one_arm_only_is_not_part_of_the_comparison(make_run):
    run = make_run(
        {(1000, "dense"): [[100.0], [100.0], [700.0]], (1000, "minference"): [[50.0], [50.0]]}
    )
    (comparison,) = stats.comparisons(run)
    assert comparison.energy_saving.blocks == 2
    assert comparison.energy_saving.value == pytest.approx(0.5)


def test_a_comparison_without_joules_is_null_with_the_reason_and_still_has_time(make_run):
    keys = ((1000, "dense"), (1000, "minference"))
    run = make_run(
        {k: [[None], [None]] for k in keys},
        seconds={keys[0]: [[2.0], [2.0]], keys[1]: [[1.0], [1.0]]},
    )
    (comparison,) = stats.comparisons(run)
    assert comparison.energy_saving.value is None
    assert "the counter stood still" in comparison.energy_saving.reason
    assert comparison.time_saving.value == pytest.approx(0.5)


positive = st.floats(1e-3, 1e6)
blocks_of_both = st.lists(st.tuples(positive, positive), min_size=2, max_size=7)


@given(blocks_of_both)
def test_swapping_the_arms_flips_the_sign_of_the_log_ratio(pairs):
    forth = stats.log_mean([math.log(a / b) for a, b in pairs])
    back = stats.log_mean([math.log(b / a) for a, b in pairs])
    low, high = forth.interval(0.9)
    assert back.mean == pytest.approx(-forth.mean, abs=1e-9)
    assert back.interval(0.9) == pytest.approx((-high, -low), abs=1e-9)


@pytest.mark.parametrize("scale", [1e-3, 7.0, 1e4])
def test_a_saving_does_not_depend_on_the_scale_of_the_joules(make_run, scale):
    energy = {(1000, "dense"): DENSE, (1000, "minference"): [[50.0], [70.0], [60.0]]}
    scaled = {k: [[scale * x for x in block] for block in v] for k, v in energy.items()}
    (plain,), (large,) = stats.comparisons(make_run(energy)), stats.comparisons(make_run(scaled))
    assert large.energy_saving.value == pytest.approx(plain.energy_saving.value)
    assert large.energy_saving.low == pytest.approx(plain.energy_saving.low)


def test_the_90_percent_interval_of_a_saving_covers_the_truth_nine_times_in_ten():
    rng = np.random.default_rng(11)
    for blocks in (3, 6, 10):
        logs = rng.normal(-0.5, 0.017, (2000, blocks))
        inside = [
            low <= -0.5 <= high
            for low, high in (stats.log_mean(list(r)).interval(0.9) for r in logs)
        ]
        assert fmean(inside) == pytest.approx(0.90, abs=0.02)


def sparse_run(make_run, ratios, blocks=6, spread=0.01):
    """Dense 100 J/Mtok everywhere; the arm's log ratio wobbles alike at every length."""
    wobble = [spread * (i - (blocks - 1) / 2) for i in range(blocks)]
    energy = {}
    for length, ratio in ratios.items():
        energy[length, "dense"] = [[100.0]] * blocks
        energy[length, "minference"] = [[100 * ratio * math.exp(w)] for w in wobble]
    return make_run(energy)


def test_break_even_is_where_the_log_ratio_crosses_zero_on_a_log_axis(make_run):
    # ln ratio +0.2 at 1k and -0.2 at 4k: zero half way on the log axis, at 2k.
    run = sparse_run(make_run, {1024: math.exp(0.2), 4096: math.exp(-0.2)})
    found = stats.break_even(run, "minference")
    assert found.tokens == pytest.approx(2048, rel=0.01)
    assert found.low < found.tokens < found.high
    # The ratio falls by 0.4 over ln 4, so the half-width of the mean shifts the crossing by this.
    logs = [0.01 * (i - 2.5) for i in range(6)]
    half = stats.log_mean(logs).interval(0.9)[1]
    assert math.log(found.high / 2048) == pytest.approx(half * math.log(4) / 0.4, abs=0.01)


def test_break_even_interval_grows_with_the_spread(make_run):
    ratios = {1024: 1.2, 4096: 1.05, 16384: 0.7}
    tight = stats.break_even(sparse_run(make_run, ratios, spread=0.005), "minference")
    wide = stats.break_even(sparse_run(make_run, ratios, spread=0.02), "minference")
    assert wide.low < tight.low < tight.tokens < tight.high < wide.high


def test_a_method_that_always_saves_has_no_break_even_and_the_reason(make_run):
    found = stats.break_even(sparse_run(make_run, {1024: 0.8, 4096: 0.4}), "minference")
    assert found.tokens is None
    assert found.high == 1024
    assert found.reason == "less than the reference at every length from 1k on"


def test_a_method_that_never_saves_has_no_break_even_and_the_reason(make_run):
    found = stats.break_even(sparse_run(make_run, {1024: 1.8, 4096: 1.2}), "minference")
    assert (found.tokens, found.high) == (None, None)
    assert "4k, the longest length compared" in found.reason


def test_break_even_is_the_last_crossing_where_there_are_several(make_run):
    ratios = {1024: 0.9, 2048: 1.1, 4096: 1.1, 8192: 0.8}
    found = stats.break_even(sparse_run(make_run, ratios), "minference")
    assert 4096 < found.tokens < 8192
    assert found.low is None  # it does not cost more at the shortest length


def test_break_even_takes_two_lengths_and_two_blocks(make_run):
    one_length = stats.break_even(sparse_run(make_run, {1024: 0.8}), "minference")
    assert "1 context length(s) compared" in one_length.reason
    one_block = stats.break_even(
        sparse_run(make_run, {1024: 1.2, 4096: 0.8}, blocks=1), "minference"
    )
    assert "1 block(s) measured every length" in one_block.reason


def test_break_even_of_an_unknown_method_is_refused(make_run):
    with pytest.raises(UsageError, match="'flex' is not compared in this run"):
        stats.break_even(sparse_run(make_run, {1024: 1.2, 4096: 0.8}), "flex")


def test_the_number_of_blocks_it_asks_for_decides_with_90_percent_power():
    gap, spread, level = 0.03, 0.025, 0.967
    blocks = stats.blocks_needed(gap, spread, level)
    rng = np.random.default_rng(5)
    decided = [
        stats.log_mean(list(r)).interval(level)[0] > 0
        for r in rng.normal(gap, spread, (3000, blocks))
    ]
    assert 0.88 <= fmean(decided) <= 0.96
    assert stats.blocks_needed(gap / 2, spread, level) > 2 * blocks


def test_no_number_of_blocks_makes_up_for_a_noisy_reference():
    assert stats.blocks_needed(0.03, 0.01, 0.967, other_error=0.03) is None


def test_density_is_the_mean_of_the_observations_and_null_with_their_reason(make_run):
    key = (1000, "dense")
    assert stats.density(make_run({key: DENSE}, density={key: 0.25}), *key).value == 0.25
    untold = Observation(
        block=0, context_length=1000, method="dense", density=None, density_reason="no profile()"
    )
    assert stats.density(make_run({key: DENSE}, events=[untold]), *key).reason == "no profile()"
    assert stats.density(make_run({key: DENSE}), *key).reason == "not observed in this run"


def test_a_spread_of_one_value_is_refused():
    with pytest.raises(ValueError, match="two blocks or more, got 1"):
        stats.log_mean([0.1])


def test_statistics_need_neither_torch_nor_nvml_nor_all_of_scipy():
    code = (
        "import sys; from minference_green import verdict, stats; stats.student_quantile(0.95, 5)\n"
        "print([m for m in ('torch', 'pynvml', 'transformers', 'scipy.stats') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
