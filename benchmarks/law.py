"""Measure and fit the law of attention times that ``auto`` decides by.

    PYTHONPATH=. python -m benchmarks.law --output law.json

Dense by its fastest backend, estimate and index, and sparse attention, each alone, at several
lengths, numbers of heads and budgets; then coefficients that are not negative, fitted to
relative errors. Sparse indices have the structure of real heads (half the slashes local, half
in clusters at log-uniform offsets, columns anywhere) and, once, none at all. On a GPU the host
runs ahead, as it does in a model, so that device time is what counts; on a CPU it is the
process's CPU time on one thread, the least of some rounds.
"""

import argparse
import itertools
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor

from minference_green.fingerprint import cpu_name
from minference_green.kernels.index import NONE, TILE, BandIndex
from minference_green.methods.backend import kernels_for
from minference_green.methods.dense import Dense, time_backends
from minference_green.methods.law import STEPS, attend_work, choose_work, dense_work, device_kind
from minference_green.methods.patterns import AShape, BlockSparse, HeadPattern, VerticalSlash
from minference_green.methods.sparse import uniform

Inputs = tuple[Tensor, Tensor, Tensor]
Sample = dict[str, Any]
"""``step``, ``head_dim``, ``work`` (amount by term), ``seconds`` and what was measured."""

GPU_LENGTHS = (1024, 2048, 4096, 8192, 12288, 16384, 32768, 65536, 131072)
CPU_LENGTHS = (512, 1024, 2048, 4096)

GPU_BUDGETS = ((1000, 6096), (30, 800), (3500, 100), (100, 800))
CPU_BUDGETS = ((64, 192), (30, 160), (300, 100), (1000, 1000))
"""Verticals and slashes: the commonest heads of MInference's file for Llama-3-8B, and of the
planted model for CPUs."""


def timer(device: torch.device, rounds: int) -> Callable[[Callable[[], object]], float]:
    """A function that returns the seconds of one call, the median of ``rounds``."""
    if device.type != "cuda":

        def on_cpu(run: Callable[[], object]) -> float:
            run()
            took = []
            for _ in range(rounds):
                began = time.process_time()
                run()
                took.append(time.process_time() - began)
            return min(took)  # what others disturb only takes longer

        return on_cpu

    ahead = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)

    def on_gpu(run: Callable[[], object]) -> float:
        run()
        torch.cuda.synchronize()
        took = []
        for _ in range(rounds):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            for _ in range(4):  # about 6 ms in which the host gets ahead of the device
                ahead @ ahead
            begin.record()
            run()
            run()
            end.record()
            end.synchronize()
            took.append(begin.elapsed_time(end) / 2e3)
        return statistics.median(took)

    return on_gpu


def drawn(batch: int, heads: int, kv_heads: int, n: int, head_dim: int, like: Tensor) -> Inputs:
    """Random queries, keys and values, laid out as projections leave them."""
    q, k, v = (
        torch.randn(batch, n, h, head_dim, device=like.device, dtype=like.dtype).transpose(1, 2)
        for h in (heads, kv_heads, kv_heads)
    )
    return q, k.contiguous(), v.contiguous()


def offsets(rng: random.Random, n: int, count: int, *, clustered: bool) -> list[int]:
    """Slashes: half local, half in clusters of 8 to 63 at log-uniform offsets, or anywhere."""
    count = min(count, n)
    if not clustered:
        return sorted(rng.sample(range(n), count))
    chosen = set(range((count + 1) // 2))
    while len(chosen) < count:
        begin = int(math.exp(rng.uniform(math.log(min(TILE, n // 2)), math.log(n))))
        for o in range(begin, min(begin + rng.randint(8, 63), n)):
            if len(chosen) < count:
                chosen.add(o)
        if len(chosen) > 0.9 * n:  # nearly everything: clusters would hardly find the last ones
            chosen |= set(range(count))
    return sorted(chosen)[:count]


def band(
    n: int, budgets: Sequence[tuple[int, int]], device: torch.device, *, clustered: bool = True
) -> BandIndex:
    """An index of one head per budget."""
    rng = random.Random(0)
    slashes = [offsets(rng, n, max(50, s), clustered=clustered) for _, s in budgets]
    columns = [sorted(rng.sample(range(n), min(n, max(30, v)))) for v, _ in budgets]
    heads = torch.arange(len(budgets), dtype=torch.int32, device=device)
    cut = kernels_for(device).cut_pieces
    return BandIndex(heads, cut(padded(slashes, device), n), padded(columns, device), n)


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Int32 ``[1, rows, longest]``."""
    table = torch.full((1, len(rows), max(map(len, rows))), NONE, dtype=torch.int32)
    for i, row in enumerate(rows):
        table[0, i, : len(row)] = torch.tensor(row, dtype=torch.int32)
    return table.to(device)


def measure(
    device: torch.device,
    dtype: torch.dtype,
    lengths: Sequence[int],
    shapes: Sequence[tuple[int, int]],
    head_dims: Sequence[int],
    rounds: int,
) -> list[Sample]:
    """Every step at every length, shape and head width."""
    seconds_of = timer(device, rounds)
    like = torch.empty(0, device=device, dtype=dtype)
    given = GPU_BUDGETS if device.type == "cuda" else CPU_BUDGETS
    samples: list[Sample] = []
    for n, (heads, kv_heads) in itertools.product(lengths, shapes):
        layouts = [([budget] * heads, True) for budget in given]
        layouts.append(([given[h % len(given)] for h in range(heads)], True))
        layouts.append(([given[1]] * heads, False))
        bands = [(budgets, band(n, budgets, device, clustered=c)) for budgets, c in layouts]
        densities = [index.density(n).mean(0).tolist() for _, index in bands]
        for head_dim in head_dims:
            q, k, v = drawn(1, heads, kv_heads, n, head_dim, like)
            scale = head_dim**-0.5
            about: Sample = {"tokens": n, "heads": heads, "kv_heads": kv_heads}

            def add(
                step: str,
                work: Mapping[str, float],
                run: Callable[[], object],
                head_dim: int = head_dim,
                about: Sample = about,
                **more: object,
            ) -> None:
                fields = {"step": step, "head_dim": head_dim, "work": dict(work)}
                samples.append({**about, **more, **fields, "seconds": seconds_of(run)})

            backend = time_backends(q, k, v, scale=scale).fastest
            dense = Dense(backend)
            add(
                "dense",
                dense_work(1, heads, n),
                lambda d=dense, q=q, k=k, v=v, s=scale: d.attend(q, k, v, scale=s, layer=0),
                backend=backend,
            )
            for (budgets, index), density in zip(bands, densities, strict=True):
                patterns = [VerticalSlash(*budget) for budget in budgets]
                add(
                    "attend",
                    attend_work(patterns, density, 1, n),
                    lambda i=index, q=q, k=k, v=v, s=scale: kernels_for(q.device).band_attention(
                        q, k, v, i, scale=s
                    ),
                    pattern=names(patterns),
                )
            everywhere: list[HeadPattern] = [VerticalSlash(*budget) for budget in given]
            for pattern in (*everywhere, AShape(128, 3968), BlockSparse(100), BlockSparse(16)):
                patterns_of_all = [pattern] * heads
                method = uniform("measured", pattern)
                parts = method.parts(q, k, v, scale=scale, layer=0)
                estimate, index_of = parts["estimate"], parts["index"]
                add(
                    "choose",
                    choose_work(patterns_of_all, 1, n),
                    lambda e=estimate, i=index_of: (e(), i()),
                    pattern=names(patterns_of_all),
                )
                if not isinstance(pattern, VerticalSlash):
                    account = method.profile(q, k, v, scale=scale, layer=0)
                    add(
                        "attend",
                        attend_work(patterns_of_all, account.density.tolist(), 1, n),
                        parts["attention"],
                        pattern=names(patterns_of_all),
                    )
    return samples


def names(patterns: Sequence[HeadPattern]) -> str:
    """The kinds of head in a layer."""
    return " ".join(sorted({str(p) for p in patterns}))


def fit(samples: Sequence[Sample]) -> dict[str, Any]:
    """Coefficients and residuals by head width and step; least squares of relative errors."""
    fitted: dict[str, Any] = {}
    for head_dim in sorted({s["head_dim"] for s in samples}):
        steps: dict[str, Any] = {}
        for step in STEPS:
            mine = [s for s in samples if s["step"] == step and s["head_dim"] == head_dim]
            terms = list(mine[0]["work"])
            work = np.array([[s["work"][t] for t in terms] for s in mine], dtype=float)
            relative = work / np.array([s["seconds"] for s in mine])[:, None]
            # Of one size, whatever a term's unit.
            size = np.abs(relative).max(0)
            size[size == 0] = 1
            found, _ = nnls(relative / size, np.ones(len(mine)))
            coefficients = found / size
            residuals = relative @ coefficients - 1
            steps[step] = {
                "seconds": {t: float(c) for t, c in zip(terms, coefficients, strict=True)},
                "error": float(np.sqrt(np.mean(residuals**2))),
                "worst": float(np.abs(residuals).max()),
            }
        fitted[str(head_dim)] = steps
    return fitted


def provenance(device: torch.device, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Where, when and with what the samples were taken."""
    on_gpu = device.type == "cuda"
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "on": torch.cuda.get_device_name(device) if on_gpu else cpu_name(),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": None if on_gpu else torch.get_num_threads(),
        "rounds": rounds,
        "software": {name: metadata.version(name) for name in ("torch", "triton")},
    }


def main() -> None:
    """Measure, fit, print the residuals, write the law."""
    parser = argparse.ArgumentParser(description="measure and fit the law of attention times")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--lengths", type=int, nargs="+")
    parser.add_argument("--shapes", nargs="+", help="query heads:KV heads")
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    dtype = torch.bfloat16 if on_gpu else torch.float32
    if not on_gpu:
        torch.set_num_threads(1)
    shapes = asked.shapes or (["32:8", "8:2"] if on_gpu else ["4:2"])
    torch.manual_seed(0)
    with torch.inference_mode():
        samples = measure(
            device,
            dtype,
            asked.lengths or (GPU_LENGTHS if on_gpu else CPU_LENGTHS),
            [(int(h), int(g)) for h, g in (text.split(":") for text in shapes)],
            asked.head_dims,
            asked.rounds,
        )
    fitted = fit(samples)
    law = {
        "device": device_kind(device),
        "measured": provenance(device, dtype, asked.rounds),
        "head_dims": fitted,
    }
    lines = ",\n".join(json.dumps(sample) for sample in samples)
    body = json.dumps(law, indent=1)
    asked.output.write_text(body[:-2] + ',\n "samples": [\n' + lines + "\n]\n}\n")
    print(f"{law['device']}: {len(samples)} samples, {law['measured']}")
    for head_dim, steps in fitted.items():
        for step, found in steps.items():
            print(
                f"head_dim {head_dim:4} {step:7} rms {found['error']:.3f} "
                f"worst {found['worst']:.3f} {found['seconds']}"
            )


if __name__ == "__main__":
    main()
