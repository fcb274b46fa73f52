"""How long attention takes on a device: linear in what there is to do, fitted to measurements.

A law predicts three steps of one layer, in seconds::

    dense     call + rows + causal pairs
    choose    call + rows estimated + positions chosen + pairs of blocks scored
    attend    call + rows + visible pairs by band + gathered columns + visible pairs by block

each term a count times a coefficient of the head's width. Laws lie in ``laws/``, one file per
compute capability and one for CPUs, with the measurements they were fitted to;
``benchmarks/law.py`` makes them.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from minference_green.errors import UsageError
from minference_green.kernels.index import TILE, causal_pairs
from minference_green.methods.patterns import (
    AShape,
    BlockSparse,
    HeadPattern,
    Probed,
    VerticalSlash,
)

TERMS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "dense": ("call", "row", "causal_pair"),
        "choose": ("call", "row", "position", "block_row", "block_pair"),
        "attend": ("call", "row", "band_pair", "column", "listed_pair"),
    }
)
"""What each step's seconds are made of."""

STEPS = tuple(TERMS)

Work = Mapping[str, float]
"""How much of each term there is to do."""


@dataclass(frozen=True)
class Step:
    """One step's coefficients, seconds per unit of each term."""

    seconds: Mapping[str, float]
    error: float
    """Root mean square of the fit's relative residuals."""
    worst: float
    """Largest relative residual."""

    def predict(self, work: Work) -> float:
        """Seconds for this much work."""
        return sum(self.seconds[term] * amount for term, amount in work.items())


@dataclass(frozen=True)
class Prediction:
    """Seconds of one layer's attention, dense and sparse."""

    dense_seconds: float
    sparse_seconds: float
    """Estimate and index among them."""
    doubt_seconds: float
    """Standard error of their difference, from the errors of the fits."""


@dataclass(frozen=True)
class Law:
    """A device's law: steps by head width."""

    source: str
    """Which file, when measured, and a hash of it."""
    head_dims: Mapping[int, Mapping[str, Step]]

    def predict(
        self,
        head_dim: int,
        patterns: Sequence[HeadPattern],
        density: Sequence[float],
        *,
        batch: int,
        n: int,
    ) -> Prediction:
        """What one layer over ``n`` tokens takes, with one pattern and density per query head.

        Raises ``UsageError`` for a head width that was not measured.
        """
        steps = self._steps(head_dim)
        work = {
            "dense": dense_work(batch, len(patterns), n),
            "choose": choose_work(patterns, batch, n),
            "attend": attend_work(patterns, density, batch, n),
        }
        seconds = {name: steps[name].predict(work[name]) for name in STEPS}
        return Prediction(
            dense_seconds=seconds["dense"],
            sparse_seconds=seconds["choose"] + seconds["attend"],
            doubt_seconds=math.hypot(*(steps[name].error * seconds[name] for name in STEPS)),
        )

    def _steps(self, head_dim: int) -> Mapping[str, Step]:
        if head_dim not in self.head_dims:
            raise UsageError(
                f"the law {self.source} knows head_dim {', '.join(map(str, self.head_dims))}, "
                f"this model has {head_dim}; {_HOW_TO_MEASURE}"
            )
        return self.head_dims[head_dim]


_HOW_TO_MEASURE = (
    "measure one with `python -m benchmarks.law --output law.json` in a clone of the repository "
    "and give it with --method-option auto.law=law.json"
)


def law_for(device: torch.device, file: Path | None = None) -> Law:
    """The law in ``file``, or the one that comes with the package for this kind of device.

    Raises ``UsageError`` if there is none, saying how to measure one, or for a damaged file.
    """
    if file is not None:
        try:
            return read_law(file.read_bytes(), str(file))
        except OSError as error:
            raise UsageError(f"cannot read law {file}: {error.strerror}") from error
    kind = device_kind(device)
    folder = files("minference_green.methods") / "laws"
    shipped = {p.name.removesuffix(".json"): p for p in folder.iterdir() if p.name.endswith("json")}
    if kind not in shipped:
        raise UsageError(
            f"no law of attention times comes with the package for {kind} "
            f"(there are {', '.join(sorted(shipped)) or 'none'}); {_HOW_TO_MEASURE}"
        )
    return read_law(shipped[kind].read_bytes(), f"{kind}.json")


def device_kind(device: torch.device) -> str:
    """What a law is filed under: the compute capability, such as ``9.0``, or ``cpu``."""
    if device.type != "cuda":
        return device.type
    major, minor = torch.cuda.get_device_capability(device)
    return f"{major}.{minor}"


def read_law(content: bytes, name: str) -> Law:
    """A law from its JSON; raises ``UsageError`` naming the file and what is wrong."""
    try:
        data: dict[str, Any] = json.loads(content)
        head_dims = {
            int(head_dim): {step: _step(step, **steps[step]) for step in STEPS}
            for head_dim, steps in data["head_dims"].items()
        }
        measured = data["measured"]["date"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{name} is no law of attention times ({type(error).__name__}: {error}); "
            f"{_HOW_TO_MEASURE}"
        ) from error
    digest = hashlib.sha256(content).hexdigest()[:8]
    return Law(f"{name} of {measured}, sha256 {digest}", head_dims)


def _step(name: str, seconds: dict[str, float], error: float, worst: float) -> Step:
    """One step as its file has it; raises ``ValueError`` for a term or a number that is none."""
    if set(seconds) != set(TERMS[name]):
        raise ValueError(f"{name} has the terms {sorted(seconds)}, not {sorted(TERMS[name])}")
    if not all(math.isfinite(x) for x in (*seconds.values(), error, worst)):
        raise ValueError(f"{name} has a number that is not finite")
    return Step(seconds, error, worst)


def dense_work(batch: int, heads: int, n: int) -> Work:
    """Terms of dense attention."""
    return {"call": 1, "row": batch * heads * n, "causal_pair": batch * heads * causal_pairs(n, n)}


def choose_work(patterns: Sequence[HeadPattern], batch: int, n: int) -> Work:
    """Terms of estimate and index; an A-shape has nothing to estimate.

    Raises ``UsageError`` for a probed head: no law has a term for probing.
    """
    if probed := [p for p in patterns if isinstance(p, Probed)]:
        raise UsageError(f"laws do not know what {probed[0]} costs; run probe by itself, not auto")
    estimated = [p for p in patterns if isinstance(p, VerticalSlash)]
    blocked = [p for p in patterns if isinstance(p, BlockSparse)]
    chosen = sum(min(n, p.vertical_size) + min(n, p.slash_size) for p in estimated)
    return {
        "call": 1,
        "row": batch * len(estimated) * n,
        "position": batch * chosen,
        "block_row": batch * len(blocked) * n,
        "block_pair": batch * len(blocked) * (n / TILE) ** 2,
    }


def attend_work(
    patterns: Sequence[HeadPattern], density: Sequence[float], batch: int, n: int
) -> Work:
    """Terms of sparse attention, from each head's visible over causal pairs."""
    pairs = {True: 0.0, False: 0.0}
    columns = 0
    for pattern, share in zip(patterns, density, strict=True):
        pairs[isinstance(pattern, BlockSparse)] += batch * share * causal_pairs(n, n)
        match pattern:
            case VerticalSlash(vertical_size, _):
                columns += batch * min(n, vertical_size)
            case AShape(n_init, _):
                columns += batch * min(n, n_init)
    return {
        "call": 1,
        "row": batch * len(patterns) * n,
        "band_pair": pairs[False],
        "column": columns,
        "listed_pair": pairs[True],
    }
