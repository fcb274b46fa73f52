"""Permutations and sign flips against all there are; strata and what they hold."""

import numpy as np
import pytest

from minference_green.permutation import (
    codes,
    group_means,
    holds_several,
    permutations,
    sign_flip_p,
    strata,
)


def test_permutations_are_uniform_within_strata_and_never_leave_them():
    stratum = np.array([0, 0, 0, 1, 1, 2, 0])
    value = np.array([1.0, 0, -1, 1, 0, 1, 0])
    scored, draws = permutations(stratum, value, 30_000, seed=1)
    drawn = np.concatenate(list(draws))
    assert sorted(scored.tolist()) == [0, 2, 3, 5]
    assert drawn.shape == (30_000, 4)
    assert (stratum[drawn] == stratum[scored]).all()
    first, second = (int(np.flatnonzero(scored == i)[0]) for i in (0, 2))
    pairs, counts = np.unique(drawn[:, [first, second]], axis=0, return_counts=True)
    assert len(pairs) == 12  # ordered pairs of the four answers of stratum 0
    assert counts == pytest.approx(np.full(12, 2500), rel=0.1)


def test_sign_flips_count_the_ways_that_reach_the_sum():
    """Of the 8 signs of 1, 2 and 4 the sum reaches 7 in two, 1 in all."""
    assert sign_flip_p(np.array([1.0, 2.0, 4.0]), 40_000, seed=1) == pytest.approx(0.25, abs=0.01)
    assert sign_flip_p(np.array([1.0, 2.0, -4.0]), 999, seed=1) == 1.0


def test_items_share_a_stratum_where_every_column_agrees():
    haystack, place = np.array([7, 7, 3, 7, 3]), np.array(["a", "b", "a", "a", "a"])
    number = strata(haystack, place)
    same = {(i, j) for i in range(5) for j in range(i) if number[i] == number[j]}
    assert same == {(3, 0), (4, 2)}
    assert sorted(set(number.tolist())) == [0, 1, 2]


def test_a_stratum_holds_several_labels_only_of_items_that_take_part():
    stratum, label = np.array([0, 0, 1, 1, 2]), np.array([0, 1, 0, 1, 0])
    part = np.array([True, True, True, False, True])
    assert holds_several(stratum, label, part).tolist() == [True, True, False, False, False]


def test_groups_are_numbered_in_order_and_averaged_by_number():
    number = codes(np.array(["url", "date", "url"]))
    assert number.tolist() == [1, 0, 1]
    assert group_means(number, np.array([1.0, 5.0, 2.0])).tolist() == [5.0, 1.5]
