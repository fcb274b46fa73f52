"""The gate: its rules one by one, and its error rates on simulated runs with known truth."""

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minference_green import verdict
from minference_green.errors import ExitCode, MeasurementError, NotComparableError, UsageError
from minference_green.results import (
    Device,
    Divergence,
    Faithfulness,
    Observation,
    Recall,
    Window,
)
from minference_green.verdict import Arms, Outcome, compare, decision_level, next_look, rule

WOBBLE = (0.004, -0.006, 0.002, 0.005, -0.003, -0.002)
D = math.log(1.05)


def arms(candidate=0.0, reference=0.0, blocks=6, spread=1.0):
    """Six blocks with a fixed small wobble of the candidate; changes are logs."""
    wobble = [spread * w for w in (WOBBLE * 3)[:blocks]]
    return Arms(tuple(candidate + w for w in wobble), (reference,) * blocks)


def test_no_change_passes():
    ruling = rule(arms(), [arms()], margin=0.05)
    assert (ruling.outcome, ruling.reason) == (Outcome.PASS, "within-margin")
    assert not ruling.improved


def test_a_change_beyond_the_margin_fails():
    ruling = rule(arms(candidate=0.09), [arms()], margin=0.05)
    assert (ruling.outcome, ruling.reason) == (Outcome.FAIL, "worse")
    assert ruling.change.mean == pytest.approx(0.09)


def test_a_change_at_the_margin_is_inconclusive_and_tells_how_many_blocks_would_decide():
    at = rule(arms(candidate=D), [arms()], margin=0.05)
    assert (at.outcome, at.reason) == (Outcome.INCONCLUSIVE, "margin-in-interval")
    # Beside the margin and with a wide spread, more blocks help.
    beside = rule(arms(candidate=0.03, spread=4), [arms(spread=0.5)], margin=0.05)
    assert beside.outcome is Outcome.INCONCLUSIVE
    assert 6 < beside.blocks_for_verdict < 60


def test_the_deciding_interval_is_wider_than_the_shown_one():
    assert decision_level() == pytest.approx(1 - 0.1 / 3)
    assert decision_level(criteria=4) == pytest.approx(1 - 0.1 / 12)
    # A change whose 90 % interval is below the margin, but not the deciding one.
    shown = D - rule(arms(), [arms()], margin=0.05).change.interval(0.90)[1]
    deciding = D - rule(arms(), [arms()], margin=0.05).change.interval(decision_level())[1]
    between = (shown + deciding) / 2
    assert rule(arms(candidate=between), [arms()], margin=0.05).outcome is Outcome.INCONCLUSIVE
    assert rule(arms(candidate=0.99 * deciding), [arms()], margin=0.05).outcome is Outcome.PASS


def test_several_criteria_share_the_error_rate_of_a_fail():
    ruling = rule(arms(), [arms()], margin=0.05)
    alone = D - ruling.change.interval(decision_level(1))[0]
    among_ten = D - ruling.change.interval(decision_level(10))[0]
    between = (alone + among_ten) / 2
    assert rule(arms(candidate=between), [arms()], margin=0.05).outcome is Outcome.FAIL
    shared = rule(arms(candidate=between), [arms()], margin=0.05, criteria=10)
    assert shared.outcome is Outcome.INCONCLUSIVE


def test_an_offset_that_hits_both_arms_cancels():
    offset = 0.04
    ruling = rule(arms(candidate=offset, reference=offset), [arms()], margin=0.05)
    assert ruling.outcome is Outcome.PASS
    assert ruling.change.mean == pytest.approx(0)


@pytest.mark.parametrize("both", [0.12, -0.12])
def test_both_arms_beyond_the_margin_never_pass(both):
    ruling = rule(arms(candidate=both, reference=both), [arms()], margin=0.05)
    assert (ruling.outcome, ruling.reason) == (Outcome.INCONCLUSIVE, "both-moved")
    assert ruling.blocks_for_verdict is None


def noisy_in_common(change, size):
    """Both arms changed, with a noise of their blocks that cancels in the ratio."""
    common = [size * s for s in (1, -1, 1, -1, 1, -1)]
    return Arms(
        tuple(change + c + w for c, w in zip(common, WOBBLE, strict=True)),
        tuple(change + c for c in common),
    )


@pytest.mark.parametrize("change", [0.09, -0.09, 0.04, 0.0])
def test_a_ratio_does_not_pass_where_neither_arm_is_shown_to_have_held(change):
    stored = [noisy_in_common(0.0, 0.06)]
    ruling = rule(noisy_in_common(change, 0.06), stored, margin=0.05)
    assert ruling.change.interval(decision_level())[1] < D  # the ratio alone would pass
    assert (ruling.outcome, ruling.reason) == (Outcome.INCONCLUSIVE, "neither-held")
    assert not ruling.improved


@pytest.mark.parametrize(("both", "outcome"), [(0.05, "pass"), (0.062, "inconclusive")])
def test_arms_have_held_within_one_and_a_half_margins(both, outcome):
    now = noisy_in_common(both, 0.01)
    for sign in (1, -1):
        swung = Arms(*(tuple(sign * x for x in arm) for arm in (now.candidate, now.reference)))
        ruling = rule(swung, [noisy_in_common(0.0, 0.01)], margin=0.05)
        # Neither is shown to have left the margin: the guard alone decides.
        assert (ruling.outcome, ruling.reason) == (
            outcome,
            "within-margin" if outcome == "pass" else "neither-held",
        )


def test_one_arm_shown_to_have_held_is_enough_for_a_pass():
    def other_moved(by):
        return Arms(tuple(w - by for w in WOBBLE), (0.0,) * 6)

    assert rule(other_moved(0.2), [arms()], margin=0.05).outcome is Outcome.PASS
    # The same noise as above does no harm where it is small beside the margin.
    calm = rule(noisy_in_common(0.0, 0.01), [noisy_in_common(0.0, 0.01)], margin=0.05)
    assert calm.outcome is Outcome.PASS


def test_a_regression_is_proven_by_the_ratio_however_noisy_both_arms_are():
    noisy = noisy_in_common(0.0, 0.06)
    dearer = Arms(tuple(c + 0.2 for c in noisy.candidate), noisy.reference)
    assert rule(dearer, [noisy], margin=0.05).outcome is Outcome.FAIL


def test_a_worse_ratio_by_a_cheaper_reference_is_the_references_doing():
    ruling = rule(arms(reference=-0.10), [arms()], margin=0.05)
    assert (ruling.outcome, ruling.reason) == (Outcome.INCONCLUSIVE, "reference-moved")


def test_a_worse_ratio_that_is_mostly_the_candidates_own_fails():
    ruling = rule(arms(candidate=0.08, reference=-0.03), [arms()], margin=0.05)
    assert (ruling.outcome, ruling.reason) == (Outcome.FAIL, "worse")


def test_improved_needs_the_candidates_own_figure_to_be_lower():
    assert rule(arms(candidate=-0.1), [arms()], margin=0.05).improved
    dearer_reference = rule(arms(reference=0.1), [arms()], margin=0.05)
    assert dearer_reference.outcome is Outcome.PASS
    assert not dearer_reference.improved


@pytest.mark.parametrize(("now", "then"), [(3, 6), (6, 3), (0, 6), (6, 0)])
def test_fewer_than_four_blocks_decide_nothing(now, then):
    ruling = rule(arms(candidate=0.5, blocks=now), [arms(blocks=then)], margin=0.05)
    assert (ruling.outcome, ruling.reason) == (Outcome.INCONCLUSIVE, "few-blocks")


def test_stored_runs_too_short_alone_count_together():
    assert rule(arms(), [arms(blocks=2), arms(blocks=2)], margin=0.05).outcome is Outcome.PASS


def test_from_five_stored_runs_on_their_scatter_judges_a_new_one():
    def stored(step):
        return [arms(candidate=step * i) for i in range(-2, 3)]

    quiet, scattered = stored(0.001), stored(0.03)
    assert rule(arms(candidate=0.09), quiet, margin=0.05).outcome is Outcome.FAIL
    assert rule(arms(candidate=0.09), scattered, margin=0.05).outcome is Outcome.INCONCLUSIVE
    # Four of the same runs are pooled: their blocks say nothing of the runs' scatter but spread.
    assert rule(arms(candidate=0.09), quiet[:4], margin=0.05).change.dof > 4


def test_stored_runs_that_scatter_do_not_hide_that_both_arms_moved():
    stored = [arms(candidate=0.02 * i, reference=0.02 * i) for i in range(-2, 3)]
    now = arms(candidate=0.12, reference=0.12)
    ruling = rule(now, stored, margin=0.05)
    assert (ruling.outcome, ruling.reason) == (Outcome.INCONCLUSIVE, "both-moved")
    # By the runs' scatter alone it might be one more of them.
    assert ruling.reference.interval(decision_level())[0] < D


def test_the_candidates_own_figure_is_judged_by_the_same_rule():
    own = rule(arms(candidate=0.09), [arms()], margin=0.05, own=True)
    assert (own.outcome, own.change.mean) == (Outcome.FAIL, pytest.approx(0.09))
    # The ratio is as it was; the candidate's own figure is not.
    now = arms(candidate=0.03, reference=0.03, spread=4)
    assert rule(now, [arms(spread=0.5)], margin=0.05).change.mean == pytest.approx(0)
    beside = rule(now, [arms(spread=0.5)], margin=0.05, own=True)
    assert beside.reason == "margin-in-interval"
    assert 6 < beside.blocks_for_verdict < 60


logs = st.floats(-0.3, 0.3)


@given(st.lists(st.tuples(logs, logs), min_size=4, max_size=8), st.floats(-2, 2))
def test_a_verdict_does_not_depend_on_the_scale_of_the_joules(pairs, shift):
    now = Arms(tuple(c for c, _ in pairs), tuple(r for _, r in pairs))
    then = arms(blocks=4)

    def moved(a):
        return Arms(tuple(c + shift for c in a.candidate), tuple(r + shift for r in a.reference))

    plain, shifted = rule(now, [then], margin=0.05), rule(moved(now), [moved(then)], margin=0.05)
    assert plain.change.mean == pytest.approx(shifted.change.mean, abs=1e-9)
    assert plain.change.standard_error == pytest.approx(shifted.change.standard_error, abs=1e-9)


def test_looks_are_at_6_10_and_16_blocks():
    assert [next_look(n) for n in (0, 5, 6, 9, 10, 15, 16, 40)] == [
        6,
        6,
        10,
        10,
        16,
        16,
        None,
        None,
    ]


# compare(): the same on whole runs.


def run_of(make_run, ratio, *, length=8192, reference=100.0, spread=1.0, **more):
    return make_run(
        {
            (length, "dense"): [[reference]] * 6,
            (length, "minference"): [[reference * ratio * math.exp(spread * w)] for w in WOBBLE],
        },
        **more,
    )


def test_compare_passes_fails_and_doubts_with_the_documented_exit_codes(make_run):
    stored = run_of(make_run, 0.6)
    found = {ratio: compare(stored, run_of(make_run, ratio)) for ratio in (0.6, 0.63, 0.66, 0.5)}
    assert [v.outcome for v in found.values()] == ["pass", "inconclusive", "fail", "pass"]
    assert [v.exit_code for v in found.values()] == [
        ExitCode.PASS,
        ExitCode.INCONCLUSIVE,
        ExitCode.REGRESSION,
        ExitCode.PASS,
    ]
    assert [v.improved for v in found.values()] == [False, False, False, True]


def test_compare_tells_change_density_and_the_next_look(make_run):
    density = {(8192, "minference"): 0.2}
    stored = run_of(make_run, 0.6, density=density)
    now = run_of(make_run, 0.66, density={(8192, "minference"): 0.3})
    found = compare(stored, now)
    ratio, own = found.criteria
    assert [(c.name, c.judged) for c in (ratio, own)] == [
        ("energy_ratio", True),
        ("energy_absolute", False),
    ]
    assert ratio.change.value == pytest.approx(0.10)
    assert ratio.decision_low < ratio.change.low < 0.10 < ratio.change.high < ratio.decision_high
    assert ratio.candidate_change == pytest.approx(0.10)
    assert ratio.reference_change == pytest.approx(0.0)
    assert ratio.density_then == pytest.approx(0.2)
    assert ratio.density_now == pytest.approx(0.3)
    assert (found.blocks, found.next_look, found.stored_runs) == (6, None, 1)
    assert compare(stored, run_of(make_run, 0.63)).next_look == 10


def test_a_pass_takes_every_criterion_and_one_fail_is_enough(make_run):
    lengths = {8192: (0.6, 0.6), 32768: (0.4, 0.45)}

    def both(which):
        energy = {}
        for length, ratios in lengths.items():
            energy[length, "dense"] = [[100.0]] * 6
            energy[length, "minference"] = [[100 * ratios[which] * math.exp(w)] for w in WOBBLE]
        return make_run(energy)

    found = compare(both(0), both(1))
    judged = [(c.context_length, c.outcome) for c in found.criteria if c.judged]
    assert judged == [(8192, "pass"), (32768, "fail")]
    assert found.outcome is Outcome.FAIL


def test_time_is_judged_when_asked_for(make_run):
    energy = {(8192, "dense"): [[100.0]] * 6, (8192, "minference"): [[60.0]] * 6}
    slower = make_run(
        energy,
        seconds={
            (8192, "dense"): [[0.2]] * 6,
            (8192, "minference"): [[0.15 * math.exp(w)] for w in WOBBLE],
        },
    )
    assert compare(make_run(energy), slower).outcome is Outcome.PASS
    found = compare(make_run(energy), slower, margin={"energy_ratio": 0.05, "latency": 0.05})
    assert found.outcome is Outcome.FAIL
    assert [c.name for c in found.criteria if c.outcome is Outcome.FAIL] == ["latency"]


def test_the_methods_own_joules_are_judged_from_five_stored_runs_on(make_run):
    # Both arms cost 8 % more: the ratio is as it was.
    now = run_of(make_run, 0.6, reference=104.0)
    stored = [run_of(make_run, 0.6, reference=100 + 0.1 * i) for i in range(5)]
    four, five = compare(stored[:4], now), compare(stored, now)
    assert [c.judged for c in four.criteria] == [True, False]
    assert [c.judged for c in five.criteria] == [True, True]
    assert four.outcome is Outcome.PASS
    dearer = run_of(make_run, 0.6, reference=108.0)
    assert compare(stored, dearer).criteria[1].reason == "both-moved"
    assert compare(stored, dearer).outcome is Outcome.INCONCLUSIVE


def test_the_methods_own_joules_do_not_pass_where_neither_arm_is_shown_to_have_held(make_run):
    def noisy(base):
        ups = [base * math.exp(s) for s in (0.06, -0.06) * 3]
        ours = [[0.6 * up * math.exp(w)] for up, w in zip(ups, WOBBLE, strict=True)]
        return make_run({(8192, "dense"): [[up] for up in ups], (8192, "minference"): ours})

    stored = [noisy(100 + 0.1 * i) for i in range(5)]
    found = compare(stored, noisy(100), margin={"energy_absolute": 0.30, "density": 0.1})
    assert found.criteria[0].reason == "within-margin"
    # Cheaper than before by less than the noise tells: within the margin above, perhaps not below.
    found = compare(stored, noisy(93), margin={"energy_absolute": 0.05, "energy_ratio": 0.05})
    assert [c.reason for c in found.criteria] == ["neither-held", "neither-held"]
    assert (found.outcome, found.next_look) == (Outcome.INCONCLUSIVE, 10)


def test_the_methods_own_joules_are_not_judged_across_an_allowed_mismatch(make_run):
    stored = [run_of(make_run, 0.6, reference=100 + 0.1 * i) for i in range(5)]
    other = run_of(make_run, 0.6, fingerprint={"dtype": "float16"})
    found = compare(stored, other, allow_mismatch=["dtype"])
    assert [c.judged for c in found.criteria] == [True, False]


def test_every_judged_criterion_counts_in_the_error_rate_of_a_fail(make_run, monkeypatch):
    counted = []

    def level(criteria=1):
        counted.append(criteria)
        return decision_level(criteria)

    monkeypatch.setattr(verdict, "decision_level", level)
    stored = [run_of(make_run, 0.6, reference=100 + 0.1 * i) for i in range(5)]
    worse = run_of(make_run, 0.7)
    three = dict.fromkeys(("energy_ratio", "energy_absolute", "latency"), 0.05)
    compare(stored[0], worse, margin=three)
    assert set(counted) == {1, 2}
    counted.clear()
    compare(stored, worse, margin=three)
    assert set(counted) == {1, 3}


def test_joules_that_were_not_measured_decide_nothing(make_run):
    keys = ((8192, "dense"), (8192, "minference"))
    blind = make_run({k: [[None]] * 6 for k in keys}, seconds={k: [[1.0]] * 6 for k in keys})
    found = compare(run_of(make_run, 0.6), blind)
    assert found.outcome is Outcome.INCONCLUSIVE
    assert found.criteria[0].reason == "few-blocks"
    assert found.criteria[0].change.value is None


def test_more_than_a_fifth_invalid_windows_is_no_measurement(make_run):
    bad = run_of(make_run, 0.6, invalid={(b, 0, "dense"): "thermal slowdown" for b in range(3)})
    with pytest.raises(MeasurementError, match=r"25% of the windows .* thermal slowdown") as error:
        compare(run_of(make_run, 0.6), bad)
    assert error.value.exit_code == ExitCode.INVALID_MEASUREMENT
    fine = run_of(make_run, 0.6, invalid={(b, 0, "dense"): "thermal slowdown" for b in range(2)})
    assert compare(run_of(make_run, 0.6), fine).blocks == 4


H100 = Device(kind="gpu", name="NVIDIA H100", memory_bytes=150754820096, power_limit_watts=700.0)


@pytest.mark.parametrize(
    ("more", "key"),
    [
        ({"fingerprint": {"devices": (H100,)}}, "device"),
        ({"fingerprint": {"model_revision": "recipe 2"}}, "revision"),
        ({"fingerprint": {"weights": "trained"}}, "weights"),
        ({"fingerprint": {"dtype": "float16"}}, "dtype"),
        ({"fingerprint": {"workload_hash": "other"}}, "workload"),
        ({"obtained": "modelled"}, "energy"),
        ({"obtained": "simulated"}, "energy"),
    ],
)
def test_hard_keys_refuse_a_comparison_unless_allowed(make_run, more, key):
    stored, other = run_of(make_run, 0.6), run_of(make_run, 0.6, **more)
    with pytest.raises(NotComparableError, match=f"--allow-mismatch {key}") as error:
        compare(stored, other)
    assert error.value.exit_code == ExitCode.NOT_COMPARABLE
    found = compare(stored, other, allow_mismatch=[key])
    assert found.allowed == (key,)
    assert found.outcome is Outcome.PASS


def test_memory_that_drivers_report_some_mib_apart_is_the_same_card(make_run):
    device = H100.model_copy(update={"name": "NVIDIA H200", "memory_bytes": 150754820096 + 2**21})
    found = compare(
        run_of(make_run, 0.6), run_of(make_run, 0.6, fingerprint={"devices": (device,)})
    )
    assert found.outcome is Outcome.PASS
    assert [str(d) for d in found.differences.soft] == ["driver: 580.1 -> unknown"]


def test_what_is_under_judgement_never_refuses_and_is_listed(make_run):
    now = run_of(
        make_run,
        0.6,
        fingerprint={"kernel_hash": "bbbb", "software": {"torch": "2.12.0", "triton": "3.6.0"}},
    )
    found = compare(run_of(make_run, 0.6), now)
    assert [str(d) for d in found.differences.subject] == [
        "kernels: aaaa -> bbbb",
        "torch: 2.11.0 -> 2.12.0",
    ]


def lost(kl, recall):
    of_rows = Divergence(
        positions=64, kl_nats=kl, js_nats=0.0, top1_agreement=0.0, nll_change_nats=None
    )
    return Faithfulness(
        prompt=of_rows,
        last_rows=of_rows,
        kl_nats_by_decile=(kl,) * 10,
        layers=(0,),
        rows=1,
        recall=recall and Recall(by_head=((recall, recall),), by_decile=((recall,) * 10,)),
        recall_reason=None if recall else "the method does not tell",
        output_error=(0.0,),
        residual_cosine=(1.0,),
    )


def observed(make_run, density=0.2, error=0.03, memory=None, kl=0.1, top1=0.8, recall=0.9):
    energy = {(8192, "dense"): [[100.0]] * 4, (8192, "minference"): [[60.0]] * 4}
    run = make_run(energy, density={(8192, "dense"): 1.0, (8192, "minference"): density})
    events = tuple(
        e.model_copy(
            update={
                "logits_relative_error": error,
                "top1_agreement": top1,
                "faithfulness": None if kl is None else lost(kl, recall),
                "faithfulness_reason": "switched off" if kl is None else None,
            }
        )
        if isinstance(e, Observation)
        else e.model_copy(update={"peak_memory_bytes": memory})
        if isinstance(e, Window)
        else e
        for e in run.events
    )
    return run.model_copy(update={"events": events})


@pytest.mark.parametrize(
    ("name", "inside", "outside", "missing"),
    [
        ("density", {"density": 0.209}, {"density": 0.211}, None),
        ("output_error", {"error": 0.0314}, {"error": 0.0316}, {"error": None}),
        ("memory", {"memory": 1049}, {"memory": 1051}, {"memory": None}),
        ("kl", {"kl": 0.1049}, {"kl": 0.1051}, {"kl": None}),
        ("top1", {"top1": 0.761}, {"top1": 0.759}, {"top1": None}),
        ("recall", {"recall": 0.856}, {"recall": 0.854}, {"recall": None}),
    ],
)
def test_what_does_not_vary_is_judged_against_its_margin_alone(
    make_run, name, inside, outside, missing
):
    stored = observed(make_run, memory=1000)

    def judged(**change):
        found = compare(
            stored, observed(make_run, **{"memory": 1000, **change}), margin={name: 0.05}
        )
        return found.outcome, found.criteria[0].reason, found.next_look

    assert judged(**inside) == ("pass", "within-margin", None)
    assert judged(**outside) == ("fail", "worse", None)
    if missing:
        # More blocks would not show what was never recorded, so no further look is offered.
        assert judged(**missing) == ("inconclusive", "not-observed", None)


@pytest.mark.parametrize(
    ("name", "better"), [("kl", {"kl": 0.01}), ("top1", {"top1": 1.0}), ("recall", {"recall": 1.0})]
)
def test_losing_less_than_before_is_no_regression(make_run, name, better):
    found = compare(observed(make_run), observed(make_run, **better), margin={name: 0.01})
    assert found.outcome is Outcome.PASS


@pytest.mark.parametrize(
    ("name", "missing", "why"),
    [
        ("recall", {"recall": None}, "now: the method does not tell"),
        ("recall", {"kl": None}, "now: switched off"),
        ("kl", {"kl": None}, "now: switched off"),
    ],
)
def test_what_was_not_observed_says_why(make_run, name, missing, why):
    found = compare(observed(make_run), observed(make_run, **missing), margin={name: 0.05})
    assert found.criteria[0].change.reason == why


def test_an_output_error_where_there_was_none_is_worse_by_any_margin(make_run):
    exact = observed(make_run, error=0.0)
    margin = {"output_error": 0.05}
    assert compare(exact, exact, margin=margin).outcome is Outcome.PASS
    found = compare(exact, observed(make_run, error=0.01), margin=margin)
    assert found.outcome is Outcome.FAIL
    assert found.criteria[0].change.reason == "was 0 before, is 0.01 now"


def test_a_run_without_windows_is_no_measurement(make_run):
    run = run_of(make_run, 0.6)
    empty = run.model_copy(update={"events": ()})
    with pytest.raises(MeasurementError, match="holds no windows"):
        compare(run, empty)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"margin": 5.0}, "a margin of 5 is not a fraction; 0.05 means 5 %"),
        ({"margin": 0.0}, "a margin of 0 is not a fraction"),
        ({"margin": {"watts": 0.05}}, "cannot judge by watts; choose from energy_ratio"),
        ({"margin": {}}, "cannot judge by nothing"),
        ({"margin": {"energy_absolute": 0.05}}, "only beside another"),
        ({"margin": {"latency": -0.05}}, "latency: a margin of -0.05 is not a fraction"),
        ({"allow_mismatch": ["gpu"]}, "gpu: no such hard key; they are device, memory"),
    ],
)
def test_a_wrong_request_is_refused(make_run, options, message):
    with pytest.raises(UsageError, match=message):
        compare(run_of(make_run, 0.6), run_of(make_run, 0.6), **options)


def test_no_stored_run_is_refused(make_run):
    with pytest.raises(UsageError, match="no stored run"):
        compare([], run_of(make_run, 0.6))


def test_runs_without_a_method_in_common_are_refused(make_run):
    other = make_run({(8192, "dense"): [[100.0]] * 6, (8192, "a-shape"): [[60.0]] * 6})
    with pytest.raises(UsageError, match="this one has dense, a-shape at 8k"):
        compare(run_of(make_run, 0.6), other)


# Error rates on simulated runs: 1.2 % noise per window, 5 % outliers of 2 to 10 %, 2 % between
# runs, drift and cold starts; see benchmarks/gate.py, which prints the whole table.


@pytest.fixture(scope="module")
def gate():
    path = Path(__file__).parent.parent / "benchmarks" / "gate.py"
    spec = importlib.util.spec_from_file_location("gate", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("stored_runs", [1, 5])
def test_no_change_is_never_called_a_regression(gate, stored_runs):
    said = gate.simulate(1500, stored_runs=stored_runs)
    assert gate.share(said, Outcome.FAIL) <= 0.005
    assert gate.share(said, Outcome.PASS) >= 0.95


def test_no_change_passes_on_a_machine_whose_runs_are_one_percent_apart(gate):
    said = gate.simulate(400, noise=gate.Noise(between_runs=0.01))
    assert gate.share(said, Outcome.PASS) >= 0.99


def both_changed(gate, change, sims, stored_runs=1, **noise):
    """Share of PASS where both arms changed alike; what they change by is never a FAIL."""
    both = {"candidate_change": change, "reference_change": change}
    said = gate.simulate(sims, **both, stored_runs=stored_runs, noise=gate.Noise(**noise))
    assert gate.share(said, Outcome.FAIL) <= 0.005
    return gate.share(said, Outcome.PASS)


@pytest.mark.parametrize("change", [-0.20, -0.12, -0.08, 0.08, 0.12, 0.20])
@pytest.mark.parametrize("between_blocks", [0.0, 0.03, 0.06])
def test_a_machine_that_changed_under_both_arms_seldom_passes_however_noisy(
    gate, change, between_blocks
):
    noise = {"between_runs": 0.0, "between_blocks": between_blocks}
    assert both_changed(gate, change, 200, **noise) <= 0.05


def test_of_runs_2_percent_apart_few_with_both_arms_12_percent_off_pass(gate):
    assert both_changed(gate, 0.12, 600) <= 0.05
    assert both_changed(gate, -0.12, 300) <= 0.05
    assert both_changed(gate, 0.12, 300, stored_runs=5) <= 0.05
    assert both_changed(gate, 0.12, 100, between_blocks=0.06) <= 0.05


def test_8_percent_on_both_arms_of_runs_2_percent_apart_no_rule_can_tell_from_nothing(gate):
    """And this one passes no more of them than the best rule of as many unchanged passes."""
    assert gate.least_wrong_passes(0.08, between_runs=0.02) > 0.20
    assert gate.least_wrong_passes(0.12, between_runs=0.02) < 0.05
    unchanged = gate.share(gate.simulate(600), Outcome.PASS)
    least = gate.least_wrong_passes(0.08, between_runs=0.02, unchanged=unchanged)
    assert both_changed(gate, 0.08, 600) <= least + 0.05


def test_a_rule_that_passes_within_its_width_reaches_the_least_of_wrong_passes(gate):
    rng = np.random.default_rng(1)
    seen = rng.normal(0, 0.02, (2, 100_000)) - rng.normal(0, 0.02, (2, 100_000))
    width = np.quantile(abs(seen[0]), 0.95)
    passed = np.mean(abs(seen[1] + math.log(1.08)) < width)
    assert passed == pytest.approx(gate.least_wrong_passes(0.08, between_runs=0.02), abs=0.01)
    assert gate.least_wrong_passes(0.0, between_runs=0.02) == pytest.approx(0.95)
    # Runs that do not scatter show any change.
    assert gate.least_wrong_passes(0.01, between_runs=0.0) == 0


def test_a_narrower_guard_doubts_unchanged_machines_and_a_wider_one_passes_changed_ones(
    gate, monkeypatch
):
    monkeypatch.setattr(verdict, "GUARD", 1.0)
    assert gate.share(gate.simulate(400), Outcome.PASS) < 0.90
    monkeypatch.setattr(verdict, "GUARD", 2.0)
    assert both_changed(gate, 0.08, 150, between_runs=0.0, between_blocks=0.03) > 0.15


def test_asking_proof_that_both_arms_moved_would_let_noisy_ones_pass(gate, monkeypatch):
    monkeypatch.setattr(verdict, "_held", lambda *_: True)
    assert both_changed(gate, 0.12, 100, between_runs=0.0, between_blocks=0.06) > 0.5


@pytest.mark.parametrize("stored_runs", [1, 5])
def test_at_the_margin_at_most_5_percent_of_verdicts_are_wrong_on_either_side(gate, stored_runs):
    said = gate.simulate(1000, candidate_change=0.05, stored_runs=stored_runs)
    assert gate.share(said, Outcome.FAIL) <= 0.05
    assert gate.share(said, Outcome.PASS) <= 0.05


@pytest.mark.parametrize("stored_runs", [1, 5])
def test_ten_percent_more_is_found_on_ten_blocks(gate, stored_runs):
    said = gate.simulate(1500, candidate_change=0.10, stored_runs=stored_runs)
    assert gate.share(said, Outcome.FAIL, by_blocks=10) >= 0.95
    assert gate.share(said, Outcome.PASS) == 0


def test_a_cheaper_reference_is_seldom_blamed_on_the_candidate(gate):
    said = gate.simulate(1000, reference_change=-0.10)
    assert gate.share(said, Outcome.FAIL) <= 0.20


def test_deciding_at_90_percent_at_every_look_would_be_wrong_more_often(gate, monkeypatch):
    def wrong():
        said = gate.simulate(600, candidate_change=0.05, stored_blocks=16)
        return gate.share(said, Outcome.FAIL) + gate.share(said, Outcome.PASS)

    ours = wrong()
    monkeypatch.setattr(verdict, "decision_level", lambda criteria=1: 0.90)
    assert wrong() > 2 * ours


def test_naive_rules_raise_false_alarms_that_this_gate_does_not(gate):
    assert min(gate.naive_alarms(300, 0.0).values()) > 0.15
