"""The arithmetic of readings, against integrals done by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minference_green.meters import evidence
from minference_green.meters.evidence import Edge, Sample


def test_a_bracket_takes_off_what_was_spent_outside_the_window():
    # 100 W before, 500 W in the window of 2 s, 200 W after.
    raw = evidence.bracket(
        Edge(0.0, 0.0), Edge(1.0, 100.0), Edge(4.0, 1220.0), Edge(5.0, 1420.0), 1.2, 3.2
    )
    raw["t1_joules"] = 100 + 20 + 1000 + 160
    raw["after_joules"] = raw["t1_joules"] + 200
    assert evidence.bracketed(raw) == pytest.approx(1000.0)


def test_uncertainty_grows_with_each_edges_half_width():
    def bound(width: float) -> float:
        edges = [Edge(float(t), 100.0 * t, width) for t in (0, 1, 4, 5)]
        return evidence.bracket_uncertainty(evidence.bracket(*edges, 1.2, 3.2))

    assert bound(0.0) == 0.0
    assert bound(0.002) == pytest.approx(0.002 * 100 * (1 + 2 * 0.2 + 1 + 2 * 0.8))


def test_uncertainty_holds_the_change_of_power_across_the_window():
    raw = evidence.bracket(Edge(0, 0), Edge(1, 80), Edge(4, 1000), Edge(5, 1125), 1.0, 3.8)
    assert evidence.bracket_uncertainty(raw) == pytest.approx((125 - 80) * 0.2)


def test_the_last_value_is_held_and_extended_to_both_edges():
    samples = [Sample(1.0, 100.0), Sample(2.0, 300.0), Sample(2.5, 300.0)]
    assert evidence.held(samples, 0.0, 4.0) == 2 * 100 + 2 * 300


def test_samples_outside_the_window_count_only_for_what_they_hold_inside():
    samples = [Sample(0.0, 100.0), Sample(1.0, 200.0), Sample(9.0, 999.0)]
    assert evidence.held(samples, 2.0, 3.0) == 200.0


def test_dropping_repeated_values_changes_nothing():
    every = [Sample(0.1 * i, 100.0 if i < 7 else 250.0) for i in range(13)]
    kept = [every[0], every[7]]
    assert evidence.held(every, 0.05, 1.2) == pytest.approx(evidence.held(kept, 0.05, 1.2))


def test_no_samples_are_no_zero():
    with pytest.raises(ValueError, match="without samples"):
        evidence.held([], 0.0, 1.0)


@given(
    st.lists(st.tuples(st.floats(0, 10), st.floats(0, 1000)), min_size=1, max_size=20),
    st.floats(0, 4),
    st.floats(5, 10),
    st.floats(4, 5),
)
def test_held_power_adds_up_over_adjacent_windows(points, start, end, middle):
    samples = [Sample(t, w) for t, w in sorted(points)]
    split = evidence.held(samples, start, middle)
    # From the middle on, what is held there is the last sample before it.
    before = [s for s in samples if s.seconds <= middle][-1:]
    rest = before + [s for s in samples if s.seconds > middle]
    split += evidence.held(rest, middle, end)
    assert split == pytest.approx(evidence.held(samples, start, end), abs=1e-6)


def test_sampling_error_is_that_of_a_mean_of_so_many_updates():
    """100 and 300 W in turn have a deviation of 100 W; 4 s hold 40 updates."""
    samples = [Sample(0.05 * i, 100.0 + 200.0 * (i // 2 % 2)) for i in range(4, 84)]
    assert evidence.sampling_error(samples, 0.0, 4.0) == pytest.approx(
        3 * 100 / 40**0.5 * 4, rel=0.01
    )
    assert evidence.sampling_error(samples[:2], 0.0, 2.0) == 0.0
    assert evidence.sampling_error(samples, 5.0, 6.0) == 0.0


def test_what_an_update_still_shows_of_the_time_before_is_no_swing():
    stale = [Sample(0.0, 80.0), Sample(0.1, 80.0)]
    samples = stale + [Sample(0.05 * i, 600.0) for i in range(3, 40)]
    assert evidence.sampling_error(samples, 0.05, 2.0) == 0.0


def test_coverage_counts_only_what_lies_within_reach_of_a_sample():
    samples = [Sample(0.0, 1.0), Sample(0.1, 1.0), Sample(0.6, 1.0)]
    assert evidence.coverage(samples, 0.0, 1.0, 0.2) == pytest.approx(0.3 + 0.2)
    assert evidence.coverage([], 0.0, 1.0, 0.2) == 0.0
    assert evidence.coverage(samples, 5.0, 6.0, 0.2) == 0.0


def test_overlapping_reach_is_not_counted_twice():
    samples = [Sample(0.01 * i, 1.0) for i in range(101)]
    assert evidence.coverage(samples, 0.0, 1.0, 0.15) == pytest.approx(1.0)


def test_a_sampled_reading_is_recomputed_from_its_evidence():
    samples = [Sample(0.1 * i, 100.0 + 400.0 * (5 <= i < 15)) for i in range(20)]
    raw = evidence.sampled_evidence(samples, 0.3, 0.5, 1.5, 1.65)
    joules, _ = evidence.held_bracket(samples, 0.3, 0.5, 1.5, 1.65)
    assert evidence.recompute(raw) == pytest.approx(joules)
    assert len([k for k in raw if k.endswith("_watts")]) == 3


def test_a_modelled_share_is_kept_between_idle_and_all():
    raw = evidence.bracket(
        *(Edge(t, c) for t, c in ((0, 0), (1, 0), (3, 8), (4, 8))), 1.0, 3.0, unit="cpu_seconds"
    )
    raw |= {"rated_watts": 100.0, "threads": 8.0, "idle_share": 0.1}
    assert evidence.recompute(raw) == pytest.approx(100 * 0.5 * 2)
    assert evidence.recompute(raw | {"threads": 2.0}) == pytest.approx(100 * 1.0 * 2)
    assert evidence.recompute(raw | {"threads": 1000.0}) == pytest.approx(100 * 0.1 * 2)


def test_numbers_of_no_known_reading_are_refused():
    with pytest.raises(ValueError, match="no reading"):
        evidence.recompute({"watts": 3.0})
