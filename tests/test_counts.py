"""Tests on counts against closed forms, and counts that cannot be."""

import pytest
from scipy import stats as scipy_stats

from minference_green.counts import (
    clopper_pearson,
    holm,
    mcnemar,
    odds_ratio,
    share_above,
)


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (1, 0), (5, 0), (6, 0), (9, 2), (4, 21)])
def test_mcnemar_is_the_exact_binomial_test_up_to_25(lost, gained):
    wanted = scipy_stats.binomtest(lost, lost + gained).pvalue if lost + gained else 1.0
    assert mcnemar(lost, gained) == pytest.approx(wanted)
    assert mcnemar(gained, lost) == pytest.approx(wanted)


@pytest.mark.parametrize(("lost", "gained"), [(26, 0), (20, 10), (13, 13), (30, 31)])
def test_mcnemar_is_mid_p_above_25(lost, gained):
    exact = scipy_stats.binomtest(lost, lost + gained).pvalue
    at = scipy_stats.binom.pmf(lost, lost + gained, 0.5)
    # Where both sides are level the exact p is capped at 1, so the middle is counted once.
    wanted = exact - at if lost != gained else 1.0
    assert mcnemar(lost, gained) == pytest.approx(wanted, abs=1e-12)


def test_counts_below_nothing_are_refused():
    with pytest.raises(ValueError, match="got -1 lost and 3 gained"):
        mcnemar(-1, 3)


def test_holm_steps_down():
    assert holm([0.04, 0.01, 0.03]) == pytest.approx((0.06, 0.03, 0.06))
    assert holm([0.5, 0.9]) == (1.0, 1.0)
    assert holm([]) == ()


# --- depth as a trend


def test_the_odds_ratio_adds_half_an_answer_to_each_count():
    assert odds_ratio(0, 9, 0, 9) == 1.0
    assert odds_ratio(3, 6, 1, 8) == pytest.approx(3.5 * 8.5 / (6.5 * 1.5))


# --- correlation, and what can be detected


@pytest.mark.parametrize(("hits", "items"), [(1, 7), (13, 111), (999, 1000)])
def test_bounds_of_a_share_leave_5_percent_beyond_either_end(hits, items):
    low, high = clopper_pearson(hits / items, items)
    assert scipy_stats.binom.sf(hits - 1, items, low) == pytest.approx(0.05)
    assert scipy_stats.binom.cdf(hits, items, high) == pytest.approx(0.05)


def test_nothing_and_everything_have_one_open_bound():
    assert clopper_pearson(0.0, 13) == (0.0, pytest.approx(1 - 0.05 ** (1 / 13)))
    assert clopper_pearson(1.0, 13) == (pytest.approx(0.05 ** (1 / 13)), 1.0)


def test_a_share_above_a_margin_is_shown_to_be_so_in_80_percent_of_cases():
    items, margin = 1000, 0.02
    share = share_above(margin, items)
    fewest = next(h for h in range(items) if clopper_pearson(h / items, items)[0] > margin)
    # The law is of hits made continuous: it lies between one hit too few and just enough.
    too_few, enough = scipy_stats.binom.sf([fewest - 2, fewest - 1], items, share)
    assert enough < 0.8 < too_few
