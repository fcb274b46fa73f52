"""Permutation tests: labels permuted within strata, signs flipped, in pieces that fit a cache."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 9999
"""Of a bootstrap or a permutation test; the smallest p is 0.0001."""

AT_ONCE = 1 << 20
"""Elements of a working array: what fits a processor's cache is quickest."""


def permutations(
    stratum: NDArray[np.intp], value: NDArray[np.float64], resamples: int, seed: int
) -> tuple[NDArray[np.intp], Iterator[NDArray[np.intp]]]:
    """Items with a value, and for each of them the item whose label it is given.

    Uniform over permutations within strata. A value of 0 adds nothing to any statistic, so only
    the first steps of each Fisher-Yates shuffle are taken, those of items with another.
    Returns indices, (items) and an iterator of (some permutations, items).
    """
    order = np.lexsort((value == 0, stratum))
    sizes = np.bincount(stratum)
    starts = np.cumsum(sizes) - sizes
    scored = np.bincount(stratum, value != 0)
    columns = np.flatnonzero(value[order])

    def draws() -> Iterator[NDArray[np.intp]]:
        rng, done = np.random.default_rng(seed), 0
        at_once = max(1, AT_ONCE // max(len(order), 1))
        while done < resamples:
            shape = min(at_once, resamples - done), 1
            done += shape[0]
            state = np.tile(order, shape)
            for step in range(int(scored.max(initial=0))):
                going = np.flatnonzero(scored > step)
                here = starts[going] + step
                there = here + rng.integers(sizes[going] - step, size=(shape[0], len(going)))
                picked = np.take_along_axis(state, there, 1)
                np.put_along_axis(state, there, state[:, here], 1)
                state[:, here] = picked
            yield state[:, columns]

    return order[columns], draws()


def sign_flip_p(values: NDArray[np.float64], resamples: int, seed: int) -> float:
    """Two-sided p that independent values are as likely on either side of 0."""
    rng, reached = np.random.default_rng(seed), 0
    observed = abs(float(values.sum())) * (1 - 1e-9)
    at_once = max(1, AT_ONCE // max(len(values), 1))
    for done in range(0, resamples, at_once):
        signs = rng.integers(0, 2, (min(at_once, resamples - done), len(values))) * 2 - 1
        reached += int((np.abs(signs @ values) >= observed).sum())
    return (reached + 1) / (resamples + 1)


def strata(*columns: NDArray[Any]) -> NDArray[np.intp]:
    """A number per item; those that are equal in every column carry one number."""
    code = codes(columns[0])
    for column in columns[1:]:
        own = codes(column)
        code = code * (own.max(initial=0) + 1) + own
    return codes(code)


def holds_several(
    stratum: NDArray[np.intp], label: NDArray[np.intp], part: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Whether each item's stratum holds several labels among the items that take part."""
    high = np.zeros(stratum.max(initial=-1) + 1, np.intp)
    low = np.full_like(high, label.max(initial=0) + 1)
    np.maximum.at(high, stratum[part], label[part])
    np.minimum.at(low, stratum[part], label[part])
    return (low < high)[stratum]


def group_means(code: NDArray[np.intp], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean value of each group, by its number."""
    return np.bincount(code, values) / np.bincount(code)


def codes(column: NDArray[Any]) -> NDArray[np.intp]:
    """A number from 0 up for each entry, in the order of the values; equal ones share it."""
    return np.unique(column, return_inverse=True)[1].astype(np.intp)
