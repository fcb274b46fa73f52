"""What sparse attention lost, as functions of tensors: kept mass, errors, divergences.

Nothing here runs a model and nothing holds a matrix of tokens by tokens: sampled rows meet all
keys, and sampled positions the whole vocabulary, one bounded chunk at a time.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minference_green.errors import MeasurementError
from minference_green.kernels.index import Index

MOST_RECALL = 1 + 1e-3
"""A row that kept more than this of its mass counted a key twice."""

HEAD_TOLERANCE = 0.01
"""Relative difference of logits made here from the model's own; bfloat16 rounds to a tenth."""

_GOLDEN = (5**0.5 - 1) / 2

_CHUNK = 2**22
"""Scores or logits held at once: 16 MiB in fp32."""


class RecallError(MeasurementError):
    """A kernel's log-sum-exp says that it kept more attention than there is."""


@dataclass(frozen=True)
class ClassMass:
    """Attention mass of sampled rows by class of key; ``kept / dense`` is a class's recall."""

    dense: Tensor
    """Share of each row's causal softmax on keys of each class, ``[B, Hq, R, C]``; sums to 1."""
    kept: Tensor
    """The part of it on keys that the index shows."""


@dataclass(frozen=True)
class Divergences:
    """How next-token distributions at sampled positions differ; float64 ``[m]``, in nats."""

    kl: Tensor
    """Kullback-Leibler divergence of the second from the first."""
    js: Tensor
    """Jensen-Shannon divergence, at most log 2."""
    same_top: Tensor
    """Whether the most likely token is the same, bool ``[m]``."""
    nll_change: Tensor
    """Of the token that follows: its log probability in the first less that in the second;
    NaN where nothing follows."""


def sampled_rows(n: int, count: int) -> Tensor:
    """Positions below ``n``, one in each of ``count`` equal stretches, int64 ascending.

    All positions if ``n <= count``. Where in its stretch a position lies follows the golden
    ratio: a regular grid would hit the same lane of every kernel tile.
    """
    bounds = torch.arange(min(n, count) + 1) * n // min(n, count)
    within = torch.arange(min(n, count), dtype=torch.float64) * _GOLDEN % 1
    return bounds[:-1] + (within * bounds.diff()).long()


def causal_lse(q: Tensor, k: Tensor, rows: Tensor, *, scale: float) -> Tensor:
    """Log-sum-exp of the scores of some rows over all keys up to them, as dense attention has.

    Shapes: ``q [B, Hq, R, D]``, the queries of the positions ``rows [R]`` alone, ascending;
    ``k [B, Hkv, N, D]``; returns ``[B, Hq, R]`` in fp32 (fp64 for fp64 inputs).
    """
    lse = torch.full(q.shape[:3], -torch.inf, dtype=_wide(q), device=q.device)
    for first, _, _, scores in _scores(q, k, rows, scale):
        lse[:, :, first:] = torch.logaddexp(lse[:, :, first:], torch.logsumexp(scores, -1))
    return lse


def kept_mass(sparse_lse: Tensor, dense_lse: Tensor) -> Tensor:
    """Attention recall: the share of its dense softmax mass that a row kept.

    Both log-sum-exps must come from the same queries and keys and have the same shape. Raises
    ``RecallError`` for a row that kept more than there is, or whose share is not a number.
    """
    recall = torch.exp(sparse_lse - dense_lse)
    worst = float(recall.max())
    if not worst <= MOST_RECALL:
        raise RecallError(
            f"a row kept {worst:.4g} of its attention, which cannot be more than 1: the kernel "
            "counts a key twice or its log-sum-exp is wrong; do not trust what it computes"
        )
    return recall


def class_mass(
    q: Tensor,
    k: Tensor,
    rows: Tensor,
    classes: Tensor,
    indices: Sequence[Index] | None,
    *,
    scale: float,
    n_classes: int,
) -> ClassMass:
    """Dense and kept attention mass of some rows on each class of keys.

    Shapes: ``q [B, Hq, R, D]`` the queries of the positions ``rows [R]``, ascending;
    ``k [B, Hkv, N, D]``; ``classes [N]`` numbers below ``n_classes``, on any device;
    ``indices`` cover every query head once, as :class:`methods.method.LayerProfile` has them;
    ``None`` for every causal pair, as dense attention has.
    Costs two passes of ``[R, chunk]`` matrix products. Raises ``ValueError`` for indices that
    do not cover the heads, or classes that do not fit the keys.
    """
    heads = [h for index in indices or () for h in index.heads.tolist()]
    if indices is not None and sorted(heads) != list(range(q.shape[1])):
        raise ValueError(f"indices must cover each of {q.shape[1]} query heads once, got {heads}")
    if classes.shape != k.shape[2:3]:
        raise ValueError(f"needs a class for each of {k.shape[2]} keys, got {list(classes.shape)}")
    lowest, highest = int(classes.min()), int(classes.max())
    if lowest < 0 or highest >= n_classes:
        raise ValueError(f"classes must be 0 to {n_classes - 1}, got {lowest} to {highest}")
    lse = causal_lse(q, k, rows, scale=scale)
    member = torch.nn.functional.one_hot(classes.long().to(q.device), n_classes).to(lse.dtype)
    dense = lse.new_zeros(*lse.shape, n_classes)
    kept = torch.zeros_like(dense)
    for first, begin, end, scores in _scores(q, k, rows, scale):
        mass = torch.exp(scores - lse[:, :, first:, None])
        dense[:, :, first:] += mass @ member[begin:end]
        for index in indices or ():
            at = index.heads.long()
            seen = index.visible(rows[first:], begin, end, k.shape[2])
            kept[:, at, first:] += (mass[:, at] * seen) @ member[begin:end]
    return ClassMass(dense, dense if indices is None else kept)


def divergences(
    first: Tensor,
    second: Tensor,
    weight: Tensor,
    following: Tensor,
    *,
    bias: Tensor | None = None,
) -> Divergences:
    """How two runs differ in the next token they expect, from what their heads are given.

    Shapes: ``first, second [m, width]`` hidden states after the last norm, ``weight
    [vocabulary, width]`` and ``bias [vocabulary]`` of the head, ``following [m]`` the token that
    follows each position, -1 for none. Logits are fp32 whatever the model's dtype, in tiles of
    the vocabulary: a first pass finds the normalisers, a second the sums.
    """
    step = max(1, _CHUNK // max(1, len(first)))

    def logits() -> Iterator[tuple[int, Tensor, Tensor]]:
        for begin in range(0, len(weight), step):
            w = weight[begin : begin + step].float().T
            b = 0.0 if bias is None else bias[begin : begin + step].float()
            yield begin, first.float() @ w + b, second.float() @ w + b

    passes = [_Normaliser(len(first), first.device) for _ in range(2)]
    for begin, *tile in logits():
        for one, z in zip(passes, tile, strict=True):
            one.add(begin, z, following)
    kl = torch.zeros(len(first), dtype=torch.float64, device=first.device)
    js = torch.zeros_like(kl)
    for _, *tile in logits():
        p, q = (z - one.lse[:, None] for one, z in zip(passes, tile, strict=True))
        p_mass, q_mass = p.exp(), q.exp()
        # Where both vanish the logarithm is any finite number: it is multiplied by zero.
        middle = ((p_mass + q_mass) / 2).clamp_(min=torch.finfo(p.dtype).tiny).log_()
        kl += (p_mass * (p - q)).sum(-1, dtype=torch.float64)
        js += (p_mass * (p - middle) + q_mass * (q - middle)).sum(-1, dtype=torch.float64) / 2
    nll = [(one.lse - one.target).double() for one in passes]
    return Divergences(
        kl=kl.clamp(min=0),
        js=js.clamp(min=0),
        same_top=passes[0].top == passes[1].top,
        nll_change=(nll[1] - nll[0]).masked_fill(following < 0, torch.nan),
    )


def made_by_head(hidden: Tensor, logits: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether a model's logits are its head's over these hidden states, and nothing more.

    Shapes: ``hidden [m, width]``, ``logits [m, vocabulary]``, ``weight`` and ``bias`` as for
    :func:`divergences`, which would compare other distributions than those of a model that
    scales or caps its logits.
    """
    again = torch.nn.functional.linear(hidden, weight, bias).float()
    return bool((again - logits).norm() <= HEAD_TOLERANCE * logits.norm())


def relative_rms(x: Tensor, reference: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """Root mean square of ``x - reference`` over that of ``reference``, over ``dim``, fp32."""
    difference: Tensor = torch.linalg.vector_norm(x.float() - reference.float(), dim=dim)
    size: Tensor = torch.linalg.vector_norm(reference.float(), dim=dim)
    return difference / size


class _Normaliser:
    """What one pass over the vocabulary finds of some positions' logits."""

    def __init__(self, positions: int, device: torch.device) -> None:
        self.lse = torch.full((positions,), -torch.inf, device=device)
        self.target = torch.zeros(positions, device=device)
        self.top = torch.zeros(positions, dtype=torch.int64, device=device)
        self._best = torch.full((positions,), -torch.inf, device=device)

    def add(self, begin: int, logits: Tensor, following: Tensor) -> None:
        self.lse = torch.logaddexp(self.lse, torch.logsumexp(logits, -1))
        best, at = logits.max(-1)
        self.top = torch.where(best > self._best, at + begin, self.top)
        self._best = torch.maximum(self._best, best)
        here = (following >= begin) & (following < begin + logits.shape[1])
        column = (following - begin).clamp(0, logits.shape[1] - 1)
        self.target = torch.where(here, logits.gather(1, column[:, None])[:, 0], self.target)


def _scores(
    q: Tensor, k: Tensor, rows: Tensor, scale: float
) -> Iterator[tuple[int, int, int, Tensor]]:
    """Chunks ``(first, begin, end, scores)`` of the scores of ``rows[first:]``, keys after -inf.

    ``scores`` is ``[B, Hq, R - first, end - begin]``: rows before the chunk's first key see none
    of it.
    """
    batch, n_heads, _, dim = q.shape
    kv_heads, n_k = k.shape[1:3]
    at = rows.cpu()
    on_device = rows.to(q.device)
    step = max(1, _CHUNK // (batch * n_heads * len(rows)))
    for begin in range(0, n_k, step):
        end = min(begin + step, n_k)
        first = int(torch.searchsorted(at, begin))
        if first == len(at):
            return
        grouped = (q[:, :, first:].to(_wide(q)) * scale).reshape(batch, kv_heads, -1, dim)
        keys = k[:, :, begin:end].to(_wide(q))
        scores = (grouped @ keys.transpose(-1, -2)).view(batch, n_heads, -1, end - begin)
        after = torch.arange(begin, end, device=q.device) > on_device[first:, None]
        yield first, begin, end, scores.masked_fill_(after, -torch.inf)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
