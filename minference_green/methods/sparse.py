"""Sparse prefill by head patterns: estimate, index, attend, one launch per index kind and layer.

One engine serves every method made of head patterns. A uniform method gives all heads the
same pattern; MInference gives each layer and head its own.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from minference_green.errors import UsageError
from minference_green.kernels.index import BandIndex, BlockIndex, Index, PartedIndex
from minference_green.kernels.selection import (
    a_shape_index,
    band_index,
    block_index,
    join_bands,
    probed_index,
    to_device,
)
from minference_green.methods.backend import Kernels, kernels_for, timed
from minference_green.methods.estimator import LAST_ROWS, Estimator
from minference_green.methods.method import LayerProfile, Parts
from minference_green.methods.patterns import (
    AShape,
    BlockSparse,
    HeadPattern,
    Patterns,
    Probed,
    VerticalSlash,
)

_KEYS = 2**27
"""Elements of keys that probing prepares at once, unless one KV head alone has more."""


@dataclass(frozen=True)
class SparsePrefill:
    """A prefill method whose heads follow patterns.

    ``patterns`` is one pattern for all heads, or one per layer and query head; ``estimator``
    serves the vertical-slash ones. A whole prompt only: as many queries as keys.
    """

    name: str
    patterns: HeadPattern | Patterns
    parameters: Mapping[str, Any]
    estimator: Estimator = LAST_ROWS

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, layer: int) -> Tensor:
        """Attention over the pairs that the layer's patterns choose for this prompt.

        Shapes as :meth:`PrefillMethod.attend`. Nothing waits for the device. Raises
        ``UsageError`` if patterns, shapes, dtype or device do not fit.
        """
        with self._as_usage_error():
            work = self._layer(q, k, v, scale, layer)
            return work.attend(work.index(work.estimate()))

    def profile(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, layer: int) -> LayerProfile:
        """As :meth:`attend`, each step timed between synchronisations, with its account."""
        with self._as_usage_error():
            work = self._layer(q, k, v, scale, layer)
            scores, estimate_seconds = timed(q.device, work.estimate)
            indices, index_seconds = timed(q.device, lambda: work.index(scores))
            lse = work.empty_lse()
            out, attend_seconds = timed(q.device, lambda: work.attend(indices, lse))
        density = torch.zeros(q.shape[1], dtype=torch.float64)
        for index in indices:
            density[index.heads.cpu().long()] = index.density(q.shape[2]).mean(0).cpu()
        seconds = (estimate_seconds, index_seconds, attend_seconds)
        return LayerProfile(out, density, *seconds, lse, tuple(indices))

    def parts(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, layer: int) -> Parts:
        """See :class:`methods.method.PartedMethod`."""
        with self._as_usage_error():
            work = self._layer(q, k, v, scale, layer)
            scores = work.estimate()
            indices = work.index(scores)
        return {
            "estimate": work.estimate,
            "index": lambda: work.index(scores),
            "attention": lambda: work.attend(indices),
        }

    def _layer(self, q: Tensor, k: Tensor, v: Tensor, scale: float, layer: int) -> "_Layer":
        if q.shape[2] != k.shape[2]:
            raise UsageError(
                f"{self.name} prefills whole prompts, got {q.shape[2]} queries for "
                f"{k.shape[2]} keys; run a continuation dense"
            )
        heads = self.head_patterns(layer, q.shape[1])
        return _Layer(
            kernels=kernels_for(q.device),
            q=q,
            k=k,
            v=v,
            scale=scale,
            estimator=self.estimator,
            vertical_slash={h: p for h, p in heads.items() if isinstance(p, VerticalSlash)},
            a_shape={h: p for h, p in heads.items() if isinstance(p, AShape)},
            block_sparse={h: p for h, p in heads.items() if isinstance(p, BlockSparse)},
            probed={h: p for h, p in heads.items() if isinstance(p, Probed)},
        )

    def head_patterns(self, layer: int, n_heads: int) -> dict[int, HeadPattern]:
        """Each query head's pattern; ``UsageError`` if the patterns are for another model."""
        if not isinstance(self.patterns, tuple):
            return dict.fromkeys(range(n_heads), self.patterns)
        if layer >= len(self.patterns) or len(self.patterns[layer]) != n_heads:
            heads = len(self.patterns[layer]) if layer < len(self.patterns) else "none"
            raise UsageError(
                f"{self.name} has patterns for {len(self.patterns)} layers and for {heads} heads "
                f"of layer {layer}, where the model has {n_heads}; they belong to another model"
            )
        return dict(enumerate(self.patterns[layer]))

    @contextmanager
    def _as_usage_error(self) -> Iterator[None]:
        """A kernel's refusal of shape or dtype, as the user's to resolve."""
        try:
            yield
        except ValueError as error:
            raise UsageError(f"{self.name} cannot run on this model: {error}") from error


def uniform(name: str, pattern: HeadPattern) -> SparsePrefill:
    """The method that gives every head of every layer the same pattern."""
    return SparsePrefill(name, pattern, asdict(pattern))


@dataclass(frozen=True)
class _Scores:
    """What the estimators found; empty or ``None`` where no head of the layer needs it."""

    masses: Sequence[tuple[Tensor, Tensor]] = ()
    """Columns and slashes of each part of the prompt."""
    q_means: Tensor | None = None
    k_means: Tensor | None = None
    probed: Sequence[BlockIndex] = ()
    """Chosen as they are scored: the scores of all key tiles at once would not fit in memory."""


@dataclass(frozen=True)
class _Layer:
    """One layer's attention as three steps, its heads grouped by pattern."""

    kernels: Kernels
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    estimator: Estimator
    vertical_slash: Mapping[int, VerticalSlash]
    a_shape: Mapping[int, AShape]
    block_sparse: Mapping[int, BlockSparse]
    probed: Mapping[int, Probed]

    def estimate(self) -> _Scores:
        masses: list[tuple[Tensor, Tensor]] = []
        if self.vertical_slash:
            masses = [self._masses(*part) for part in self.estimator.parts(self.q.shape[2])]
        q_means = k_means = None
        if self.block_sparse:
            q_means, k_means = self.kernels.block_means(self.q), self.kernels.block_means(self.k)
        return _Scores(masses, q_means, k_means, self._probed_indices())

    def index(self, scores: _Scores) -> list[Index]:
        parts, a_shape = self._vertical_slash_parts(scores), self._a_shape_index()
        bands: list[Index] = [*parts, *a_shape]
        if len(parts) > 1:
            bands = [PartedIndex(tuple(parts)), *a_shape]
        elif parts and a_shape:
            bands = [join_bands(*parts, *a_shape)]
        return [*bands, *self._block_index(scores), *scores.probed]

    def attend(self, indices: list[Index], lse: Tensor | None = None) -> Tensor:
        """The output; also fills ``lse`` if given, by a variant of the kernels that writes it."""
        out = torch.empty_like(self.q)
        for index in indices:
            for begin, end, part in _served(index):
                banded = isinstance(part, BandIndex)
                run = self.kernels.band_attention if banded else self.kernels.block_attention
                rows, keys = slice(begin, end), slice(end)
                found = run(
                    self.q[:, :, rows], self.k[:, :, keys], self.v[:, :, keys], part,
                    scale=self.scale, out=out[:, :, rows], return_lse=lse is not None,
                )  # fmt: skip
                if lse is not None:
                    lse[:, part.heads.long(), rows] = found[1]
        return out

    def empty_lse(self) -> Tensor:
        wide = torch.promote_types(self.q.dtype, torch.float32)
        return torch.empty(self.q.shape[:3], dtype=wide, device=self.q.device)

    def _masses(self, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """Scores to choose by for the rows from ``begin`` to before ``end``."""
        rows = self.estimator.rows_of(begin, end)
        columns, slashes = self.kernels.row_scores(
            self.q[:, :, begin:end],
            self.k[:, :, :end],
            self._heads(self.vertical_slash),
            rows,
            scale=self.scale,
            **self.estimator.skips,
        )
        return self.estimator.weigh(columns, slashes, rows)

    def _vertical_slash_parts(self, scores: _Scores) -> list[BandIndex]:
        patterns = self.vertical_slash.values()
        return [
            band_index(
                columns,
                slashes,
                self._heads(self.vertical_slash),
                [p.vertical_size for p in patterns],
                [p.slash_size for p in patterns],
                cut_pieces=self.kernels.cut_pieces,
                choose=self.kernels.chosen_bands,
            )
            for columns, slashes in scores.masses
        ]

    def _a_shape_index(self) -> list[BandIndex]:
        if not self.a_shape:
            return []
        patterns = self.a_shape.values()
        return [
            a_shape_index(
                self._heads(self.a_shape),
                [p.n_init for p in patterns],
                [p.n_local for p in patterns],
                batch=self.q.shape[0],
                n_k=self.k.shape[2],
            )
        ]

    def _block_index(self, scores: _Scores) -> list[BlockIndex]:
        if scores.q_means is None or scores.k_means is None:
            return []
        heads = self._heads(self.block_sparse)
        group = self.q.shape[1] // self.k.shape[1]
        return [
            block_index(
                scores.q_means[:, heads],
                scores.k_means[:, heads // group],
                heads,
                [p.top_k for p in self.block_sparse.values()],
                scale=self.scale,
                n_q=self.q.shape[2],
                n_k=self.k.shape[2],
                build=self.kernels.listed_index,
            )
        ]

    def _probed_indices(self) -> list[BlockIndex]:
        return [
            probed_index(
                self.q,
                self.k,
                self._heads(part),
                [p.top_k for p in part.values()],
                rows,
                scale=self.scale,
                tile_shares=self.kernels.shares_of(self.k, kv_heads),
                build=self.kernels.listed_index,
            )
            for rows, kv_heads, part in self._probed_parts()
        ]

    def _probed_parts(self) -> list[tuple[int, range, dict[int, Probed]]]:
        """Heads that are probed at once: number of probing rows, KV heads, and the heads.

        All of one number of rows, unless the keys of their KV heads are more than ``_KEYS``.
        """
        batch, n_kv, n_k, head_dim = self.k.shape
        most, group = max(1, _KEYS // (batch * n_k * head_dim)), self.q.shape[1] // n_kv
        parts: dict[tuple[int, int], dict[int, Probed]] = {}
        for head, pattern in self.probed.items():
            parts.setdefault((pattern.rows, head // group // most), {})[head] = pattern
        return [
            (rows, range(min(part) // group, max(part) // group + 1), part)
            for (rows, _), part in parts.items()
        ]

    def _heads(self, group: Mapping[int, HeadPattern]) -> Tensor:
        return to_device(list(group), self.q.device)


def _served(index: Index) -> Sequence[tuple[int, int, BandIndex | BlockIndex]]:
    """What a kernel runs at once: first row, the row after the last, and the index for them."""
    return index.served() if isinstance(index, PartedIndex) else [(0, index.n_k, index)]
