"""Float64 oracles a mathematician can read. No Triton; slow on purpose; for tests only.

Notation as in ``kernels/README.md``: queries are the last ``n_q`` of ``n_k`` positions,
row ``i`` and key ``j`` are absolute positions, ``o = i - j`` is a slash.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from minference_green.kernels.index import PIECE, TILE


def expand_kv(x: Tensor, n_heads: int) -> Tensor:
    """Repeat KV heads ``[B, Hkv, N, D]`` so that each query head has its own."""
    return x.repeat_interleave(n_heads // x.shape[1], dim=1)


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *, scale: float
) -> tuple[Tensor, Tensor]:
    """Masked softmax attention and its log-sum-exp, in float64.

    Shapes: ``q [B, H, n_q, D]``, ``k, v [B, Hkv, n_k, D]``, ``mask [B, H, n_q, n_k]`` bool;
    returns ``out [B, H, n_q, D]`` and ``lse [B, H, n_q]``.
    """
    k, v = expand_kv(k, q.shape[1]).double(), expand_kv(v, q.shape[1]).double()
    logits = (q.double() @ k.transpose(-1, -2) * scale).masked_fill(~mask, -torch.inf)
    return torch.softmax(logits, -1) @ v, torch.logsumexp(logits, -1)


def causal_mask(n_q: int, n_k: int) -> Tensor:
    """Dense causal visibility, bool ``[n_q, n_k]``."""
    return torch.ones(n_q, n_k, dtype=torch.bool).tril(n_k - n_q)


def last_rows_scores(
    q: Tensor, k: Tensor, *, scale: float, rows: int = 64
) -> tuple[Tensor, Tensor]:
    """Column and slash mass of the last rows (MInference, algorithm 2).

    Shapes: ``q [B, H, n_q, D]``, ``k [B, Hkv, n_k, D]``; returns ``columns [B, H, n_k]`` with
    ``columns[j] = sum_r A[r, j]`` and ``slashes [B, H, n_k]`` with
    ``slashes[o] = sum_r A[r, i_r - o]``, where ``A`` is the causal softmax of the last
    ``min(rows, n_q)`` rows and ``i_r`` their absolute positions.
    """
    n_k, last = k.shape[2], min(rows, q.shape[2])
    mask = causal_mask(last, n_k)
    logits = q[:, :, -last:].double() @ expand_kv(k, q.shape[1]).double().transpose(-1, -2) * scale
    a = torch.softmax(logits.masked_fill(~mask, -torch.inf), -1)
    slashes = torch.zeros(*a.shape[:2], n_k, dtype=a.dtype)
    for r in range(last):
        i = n_k - last + r
        slashes[:, :, : i + 1] += a[:, :, r, : i + 1].flip(-1)
    return a.sum(2), slashes


def row_scores(
    q: Tensor,
    k: Tensor,
    rows: Sequence[int],
    *,
    scale: float,
    skip_offsets: int = 0,
    skip_columns: int = 0,
) -> tuple[Tensor, Tensor]:
    """Column and slash mass of any rows, given as positions; shapes as above.

    ``columns[j]`` counts keys at distances from ``skip_offsets`` on, ``slashes[o]`` keys from
    ``skip_columns`` on.
    """
    n_q, n_k = q.shape[2], k.shape[2]
    columns = torch.zeros(*q.shape[:2], n_k, dtype=torch.float64)
    slashes = torch.zeros_like(columns)
    keys = expand_kv(k, q.shape[1]).double()
    for i in rows:
        query = q[:, :, i - (n_k - n_q), None].double()
        a = torch.softmax(query @ keys[:, :, : i + 1].transpose(-1, -2) * scale, -1)[:, :, 0]
        j = torch.arange(i + 1)
        columns[:, :, j] += a * (i - j >= skip_offsets)
        slashes[:, :, i - j] += a * (j >= skip_columns)
    return columns, slashes


def top_positions(scores: Tensor, count: int, forced: int) -> list[int]:
    """Ascending positions of the ``count`` largest of ``scores [n]``, the first ``forced`` first.

    Ties go to the smaller position.
    """
    order = sorted(
        range(len(scores)),
        key=lambda p: (p >= forced, -float(scores[p]) if p >= forced else 0.0, p),
    )
    return sorted(order[: min(count, len(scores))])


def cut_pieces(offsets: list[int]) -> list[int]:
    """Starts of the pieces that cover the bands of ascending slash ``offsets``.

    Slash ``o`` needs every ``e`` in ``[o - TILE, o)``, so that all rows of a query tile find it;
    below ``TILE`` what slash ``TILE`` needs, and 0, the diagonal, nothing. Bands that touch, or
    are less than a piece apart, are one run, cut from its nearest ``e`` outward.
    """
    runs: list[list[int]] = []
    for o in (max(o, TILE) for o in offsets if o > 0):
        if runs and o - TILE - runs[-1][1] < PIECE:
            runs[-1][1] = o
        else:
            runs.append([o - TILE, o])
    return [p for begin, end in runs for p in range(begin, end, PIECE)]


def vertical_slash_mask(offsets: list[int], columns: list[int], n_q: int, n_k: int) -> Tensor:
    """Exactly the chosen slashes and columns, bool ``[n_q, n_k]``: what an index must contain."""
    i = torch.arange(n_k - n_q, n_k)[:, None]
    j = torch.arange(n_k)[None, :]
    chosen = torch.isin(i - j, torch.tensor(offsets)) | torch.isin(j, torch.tensor(columns))
    return chosen & (j <= i)


def a_shape_mask(n_init: int, n_local: int, n_q: int, n_k: int) -> Tensor:
    """The first ``n_init`` keys and the last ``n_local`` before each query, bool ``[n_q, n_k]``."""
    i = torch.arange(n_k - n_q, n_k)[:, None]
    j = torch.arange(n_k)[None, :]
    return ((j < n_init) | (i - j < n_local)) & (j <= i)


def block_means(x: Tensor) -> Tensor:
    """Mean of each ``TILE`` real tokens: ``[B, H, N, D]`` to ``[B, H, ceil(N/TILE), D]``."""
    return torch.stack([part.double().mean(2) for part in x.split(TILE, dim=2)], dim=2)


def tile_masses(
    q: Tensor, k: Tensor, rows: Sequence[int], *, scale: float, largest: bool = False
) -> Tensor:
    """Log-sum-exp of each row's causal logits over every key tile the last row reaches.

    Or, ``largest``, the largest of them. Shapes: ``q [B, H, n_q, D]``, ``k [B, Hkv, n_k, D]``,
    ``rows`` any positions of queries; returns ``[B, H, len(rows), tiles]``, -inf where a row
    sees no key of a tile.
    """
    n_q, n_k = q.shape[2], k.shape[2]
    at = torch.tensor(list(rows))
    reach = int(at.max()) // TILE + 1
    logits = q[:, :, at - (n_k - n_q)].double() @ expand_kv(k, q.shape[1]).double().mT * scale
    logits = logits.masked_fill(torch.arange(n_k) > at[:, None], -torch.inf)
    tiles = logits.split(TILE, -1)[:reach]
    return torch.stack([x.amax(-1) if largest else x.logsumexp(-1) for x in tiles], -1)


def probed_lists(
    q: Tensor, k: Tensor, *, scale: float, top_k: int, rows: int
) -> list[list[list[list[int]]]]:
    """Key tiles per (batch, head, query tile) of ``Probed``, sorted.

    As :func:`block_lists`, by the largest share that a probing row gives a key tile, in the
    softmax of its largest logit in each.
    """
    n_q, n_k = q.shape[2], k.shape[2]
    lists: list[list[list[list[int]]]] = [[[] for _ in range(q.shape[1])] for _ in q]
    for first in range(n_k - n_q, n_k, TILE):
        last = min(first + TILE, n_k) - 1
        lanes = (
            [TILE - 1] if rows == 1 else [part * (TILE - 1) // (rows - 1) for part in range(rows)]
        )
        probes = [min(first + lane, last) for lane in lanes]
        largest = tile_masses(q, k, probes, scale=scale, largest=True)
        scores = torch.softmax(largest, -1).amax(2)
        diagonal = [n for n in range(last // TILE + 1) if (n + 1) * TILE - 1 >= first]
        for b, of_prompt in enumerate(lists):
            for h, of_head in enumerate(of_prompt):
                of_head.append(sorted({0, *top_positions(scores[b, h], top_k, 0), *diagonal}))
    return lists


def block_lists(q: Tensor, k: Tensor, *, scale: float, top_k: int) -> list[list[list[list[int]]]]:
    """Key tiles per (batch, head, query tile) of MInference's block-sparse, sorted.

    Among key tiles that start at or before the query tile's last row: the ``top_k`` with the
    largest ``scale * mean(Q) . mean(K)``, ties to the smaller tile; then tile 0 and every tile
    that reaches past the query tile's first row are added if missing.
    """
    n_q, n_k = q.shape[2], k.shape[2]
    scores = block_means(q) @ expand_kv(block_means(k), q.shape[1]).transpose(-1, -2) * scale
    lists: list[list[list[list[int]]]] = []
    for b in range(q.shape[0]):
        lists.append([])
        for h in range(q.shape[1]):
            rows = []
            for m, first in enumerate(range(n_k - n_q, n_k, TILE)):
                last = min(first + TILE, n_k) - 1
                reachable = last // TILE + 1
                best = top_positions(scores[b, h, m, :reachable], top_k, 0)
                diagonal = [n for n in range(reachable) if (n + 1) * TILE - 1 >= first]
                rows.append(sorted({0, *best, *diagonal}))
            lists[-1].append(rows)
    return lists


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``weight * x / sqrt(mean(x^2) + eps)`` over the last dimension."""
    x = x.double()
    return weight.double() * x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    """``gate * sigmoid(gate) * up``."""
    return gate.double() * torch.sigmoid(gate.double()) * up.double()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each pair of one dimension of either half, turned by its angle; ``cos, sin [B, N, D]``."""
    first, second = x.double().chunk(2, -1)
    turned = torch.cat([-second, first], -1)
    return x.double() * cos.double()[:, None] + turned * sin.double()[:, None]
