"""Answers after dense and after sparse prefill, paired: one by one, by columns, scored."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from minference_green.errors import UsageError
from minference_green.permutation import strata

Place = Literal["inside", "after"]
"""Whether the question was part of the prefill or came after it."""

Score = Literal["loss", "net"]
"""Lost among the answers dense gave right; or lost minus gained among all."""

Change = Literal["log_probability_change", "kl_above_floor_nats"]
"""What is measured on a scale of each answer rather than right or wrong."""


@dataclass(frozen=True)
class Answer:
    """One question of an audit, answered after dense and after sparse prefill."""

    haystack: int
    """Answers of one haystack carry one number, at every length it was padded to."""
    kind: str
    depth: float
    """Of the fact within the context, 0 to 1."""
    place: Place
    context_tokens: int
    dense_right: bool
    sparse_right: bool
    log_probability_change: float | None = None
    """Of the right answer, sparse minus dense, in nats."""
    kl_above_floor_nats: float | None = None
    """KL of sparse from dense minus that of dense with another kernel; noise alone averages 0."""


@dataclass(frozen=True, eq=False)
class Answers:
    """The same by columns, all of one length; ``collect`` makes them from answers."""

    haystack: NDArray[np.int64]
    kind: NDArray[np.str_]
    depth: NDArray[np.float64]
    place: NDArray[np.str_]
    context_tokens: NDArray[np.int64]
    dense_right: NDArray[np.bool_]
    sparse_right: NDArray[np.bool_]
    log_probability_change: NDArray[np.float64]
    """NaN where it was not taken."""
    kl_above_floor_nats: NDArray[np.float64]
    """NaN where it was not taken."""

    def __len__(self) -> int:
        return len(self.haystack)

    def where(self, chosen: NDArray[np.bool_]) -> "Answers":
        """The answers chosen by a mask, as ``answers.where(answers.place == "inside")``."""
        return Answers(**{f.name: getattr(self, f.name)[chosen] for f in fields(self)})


def collect(answers: Iterable[Answer]) -> Answers:
    """Answers by columns; raises ``UsageError`` for none, or a depth or place that is none."""
    rows = tuple(answers)
    if not rows:
        raise UsageError("there are no answers to judge; run the audit first")
    for row in rows:
        if not 0 <= row.depth <= 1:
            raise UsageError(f"a depth of {row.depth:g} is not within the context: give 0 to 1")
        if row.place not in get_args(Place):
            raise UsageError(
                f"a question is asked {' or '.join(get_args(Place))}, not {row.place!r}"
            )

    def column(name: str, dtype: type) -> NDArray[Any]:
        values = [getattr(row, name) for row in rows]
        return np.array([math.nan if v is None else v for v in values], dtype)

    return Answers(
        haystack=column("haystack", np.int64),
        kind=column("kind", np.str_),
        depth=column("depth", np.float64),
        place=column("place", np.str_),
        context_tokens=column("context_tokens", np.int64),
        dense_right=column("dense_right", np.bool_),
        sparse_right=column("sparse_right", np.bool_),
        log_probability_change=column("log_probability_change", np.float64),
        kl_above_floor_nats=column("kl_above_floor_nats", np.float64),
    )


def scores(answers: Answers, score: Score) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Score of each answer and which take part."""
    net = answers.dense_right.astype(float) - answers.sparse_right
    eligible = answers.dense_right if score == "loss" else np.ones(len(answers), bool)
    return np.where(eligible, net, 0.0), eligible


def strata_of(answers: Answers) -> NDArray[np.intp]:
    """Answers of one haystack, place and length carry one number."""
    return strata(answers.haystack, answers.place, answers.context_tokens)
