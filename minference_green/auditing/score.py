"""Right or wrong, and how surely, from the logits of an answer's rows."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rival:
    """Where a wrong value first differs from the answer, and the token it has there."""

    at: int
    token: int


@dataclass(frozen=True)
class Probe:
    """An answer's tokens and the values it is held against.

    A rival is judged by its first differing token alone: the rows of the right answer tell
    that, and no further pass is needed.
    """

    answer: tuple[int, ...]
    present: tuple[Rival, ...] = ()
    """Wrong values that stand in the text."""
    fresh: tuple[Rival, ...] = ()
    """Wrong values that stand nowhere."""
    conflicting: Rival | None = None
    """The other of two conflicting statements."""


@dataclass(frozen=True)
class Score:
    """What one answer showed; log-probabilities in nats."""

    first_right: bool
    rest_right: bool | None
    """Of the tokens after the first, each given the right ones before it; ``None`` if none."""
    logprob: float
    first_logprob: float
    margin: float | None
    fresh_margin: float | None
    preference: float | None

    @property
    def right(self) -> bool:
        """Whether greedy decoding would write the whole answer."""
        return self.first_right and self.rest_right is not False


def rival(answer: Sequence[int], other: Sequence[int]) -> Rival | None:
    """Where ``other`` first differs from ``answer``; ``None`` if one begins the other."""
    for at, (right, wrong) in enumerate(zip(answer, other, strict=False)):
        if right != wrong:
            return Rival(at, wrong)
    return None


def score(logits: Tensor, probes: Sequence[Probe]) -> list[Score]:
    """Judge answers from the logits of the rows that predict their tokens.

    ``logits [R, vocabulary]`` are the rows of the first probe's answer, then of the second's, and
    so on; they are normalised in fp32. Raises ``ValueError`` if the rows are not as many as the
    answers have tokens.
    """
    n_rows = sum(len(p.answer) for p in probes)
    if logits.shape[0] != n_rows:
        raise ValueError(f"{n_rows} answer tokens need as many rows of logits, got {len(logits)}")
    if not probes:
        return []
    rows: list[int] = []
    tokens: list[int] = []
    start = 0
    for probe in probes:
        pairs = [*enumerate(probe.answer), *((r.at, r.token) for r in _rivals(probe))]
        rows += [start + at for at, _ in pairs]
        tokens += [token for _, token in pairs]
        start += len(probe.answer)
    logprobs = torch.log_softmax(logits.float(), -1)
    # One transfer each: a device is not waited for per answer.
    at = torch.tensor([rows, tokens], device=logits.device)
    found: list[float] = logprobs[at[0], at[1]].tolist()
    best: list[int] = logits.argmax(-1).tolist()
    scores = []
    for probe in probes:
        length = len(probe.answer)
        top, best = best[:length], best[length:]
        width = length + len(_rivals(probe))
        scores.append(_judge(probe, top, found[:width]))
        found = found[width:]
    return scores


def _rivals(probe: Probe) -> tuple[Rival, ...]:
    other = () if probe.conflicting is None else (probe.conflicting,)
    return (*probe.present, *probe.fresh, *other)


def _judge(probe: Probe, top: Sequence[int], logprobs: Sequence[float]) -> Score:
    length = len(probe.answer)
    right = [best == token for best, token in zip(top, probe.answer, strict=True)]
    margins = [logprobs[r.at] - logprobs[length + i] for i, r in enumerate(_rivals(probe))]
    present, rest = margins[: len(probe.present)], margins[len(probe.present) :]
    fresh, other = rest[: len(probe.fresh)], rest[len(probe.fresh) :]
    return Score(
        first_right=right[0],
        rest_right=all(right[1:]) if length > 1 else None,
        logprob=sum(logprobs[:length]),
        first_logprob=logprobs[0],
        margin=min(present, default=None),
        fresh_margin=min(fresh, default=None),
        preference=other[0] if other else None,
    )
