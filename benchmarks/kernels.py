"""Kernels side by side in one process: dense by several ways, sparse by MInference and by us.

Run on a CUDA machine from the repository root, nothing installed but torch and triton::

    PYTHONPATH=. python benchmarks/kernels.py --lengths 131072 524288 --output kernels.json

Default shape: Llama-3-8B's attention, 32 query heads, 8 KV heads, head_dim 128, bfloat16, batch 1.
Queries, keys and values are random; indices have the structure of real heads: half of the
slashes local, half in clusters of 8 to 63 at log-uniform offsets, columns anywhere after the
first 30. Every time is a median over repeats after a warm-up, by device events, the variants in
turn; the spread is the range of the repeats. Attention times are of the whole call, its
preparation included, each on an idle device. Estimate and index are timed as a model runs them,
one layer's steps after the other and the host ahead of the device; their share is of that layer.
``mix`` is a layer whose heads have the budgets that MInference published for Llama-3-8B, each
for its share of the heads. TFLOP/s count the 64 x 64 tiles that are computed. The error is
relative, of sampled rows from the prompt's begin, middle and end, against products in float32 and
a softmax in float64. What cannot run is named with its reason.

Queries and keys with planted structure, from which estimate and index find what attention then
computes, are what ``green-bench run -m planted:llama-3-8b --breakdown`` replays, step by step.

``--minference PATH`` is a checkout of MInference; its kernel needs its CUDA index extension,
which is built from the checkout's ``csrc`` (nvcc needed). It runs head by head, as shipped.
``--joules`` repeats each variant for two seconds and more between two edges of the GPU's
energy counter (needs nvidia-ml-py). ``--roofline`` draws an SVG.
"""

import argparse
import importlib.util
import itertools
import json
import math
import random
import statistics
import sys
import threading
import time
import types
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from minference_green.kernels.cut import cut_pieces
from minference_green.kernels.estimate import row_scores
from minference_green.kernels.index import NONE, PIECE, TILE, BandIndex, causal_pairs
from minference_green.kernels.selection import FORCED_COLUMNS, band_index
from minference_green.kernels.top import chosen_bands
from minference_green.kernels.vertical_slash import band_attention

Budget = tuple[int, int]
"""Columns and slashes of a head."""

BUDGETS: tuple[Budget, ...] = ((1000, 6096), (30, 800), (3500, 100))
MIX: tuple[tuple[float, Budget], ...] = (
    (0.46, (1000, 6096)),
    (0.27, (30, 800)),
    (0.15, (100, 800)),
    (0.09, (3500, 100)),
    (0.03, (500, 700)),
)
"""Shares of heads in MInference's pattern file for Llama-3-8B-Instruct-262k."""

BACKENDS = (
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
)
JOULE_SECONDS = 2.2

Work = Callable[[], object]


class CannotRunError(Exception):
    """Why a variant is left out."""


@dataclass(frozen=True)
class Case:
    """One prompt: its shape and the seed of everything drawn for it."""

    tokens: int
    heads: int
    group: int
    head_dim: int
    seed: int

    @property
    def scale(self) -> float:
        """Of the logits."""
        return float(self.head_dim**-0.5)


@dataclass(frozen=True)
class Row:
    """One measured variant."""

    case: Case
    variant: str
    budget: Budget | str | None
    milliseconds: float | None
    spread_milliseconds: float | None
    tflops: float | None
    density: float
    relative_error: float | None
    joules: float | None
    watts: float | None
    why_not: str | None
    share_of_layer: float | None = None
    """Of estimate, index and attention after each other."""


def tensors(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Random queries, keys and values."""
    g = torch.Generator("cuda").manual_seed(case.seed)
    kv_heads = case.heads // case.group
    q, k, v = (
        torch.randn(
            1, h, case.tokens, case.head_dim, device="cuda", dtype=torch.bfloat16, generator=g
        )
        for h in (case.heads, kv_heads, kv_heads)
    )
    return q, k, v


def clustered_offsets(rng: random.Random, n: int, count: int) -> list[int]:
    """``count`` slashes, half of them local, half in clusters at log-uniform offsets."""
    count = min(count, n)
    chosen = set(range(count // 2))
    while len(chosen) < count:
        begin = int(math.exp(rng.uniform(math.log(TILE), math.log(n))))
        for o in range(begin, min(begin + rng.randint(8, 63), n)):
            if len(chosen) < count:
                chosen.add(o)
    return sorted(chosen)


def budgets_of(budget: Budget | str, heads: int) -> list[Budget]:
    """One per head: the same, or the mix by its shares, the largest remainders rounded up."""
    if not isinstance(budget, str):
        return [budget] * heads
    counts = [int(share * heads) for share, _ in MIX]
    by_remainder = sorted(range(len(MIX)), key=lambda i: counts[i] - MIX[i][0] * heads)
    for i in by_remainder[: heads - sum(counts)]:
        counts[i] += 1
    return [budget for (_, budget), n in zip(MIX, counts, strict=True) for _ in range(n)]


@dataclass(frozen=True)
class Pattern:
    """One clustered pattern per head, of exactly its budget: ascending offsets and columns."""

    slashes: tuple[list[int], ...]
    columns: tuple[list[int], ...]

    @classmethod
    def drawn(cls, case: Case, budgets: Sequence[Budget]) -> "Pattern":
        """From the case's seed."""
        rng = random.Random(case.seed)
        n = case.tokens
        slashes = tuple(clustered_offsets(rng, n, size) for _, size in budgets)
        after = range(FORCED_COLUMNS, n)
        columns = tuple(
            [*range(FORCED_COLUMNS), *sorted(rng.sample(after, size - FORCED_COLUMNS))]
            for size, _ in budgets
        )
        return cls(slashes, columns)

    def index(self, n: int) -> BandIndex:
        """What our kernel reads."""
        heads = torch.arange(len(self.columns), dtype=torch.int32, device="cuda")
        return BandIndex(heads, cut_pieces(padded(self.slashes), n), padded(self.columns), n)


def padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """Int32 ``[1, rows, longest]`` on the GPU."""
    table = torch.full((1, len(rows), max(map(len, rows))), NONE, dtype=torch.int32)
    for i, row in enumerate(rows):
        table[0, i, : len(row)] = torch.tensor(row, dtype=torch.int32)
    return table.cuda()


def computed_tiles(index: BandIndex) -> int:
    """Key tiles over all heads and query tiles, masked ones among them."""
    r0 = torch.arange(0, index.n_k, TILE, dtype=torch.int32, device="cuda")
    r0 = r0.expand(*index.columns.shape[:2], -1).contiguous()
    pieces = torch.searchsorted(index.pieces, r0)
    columns = torch.searchsorted(index.columns, r0)
    bands = (pieces * PIECE + TILE - 1) // TILE
    return int((1 + bands + (columns + TILE - 1) // TILE).sum())


def milliseconds(works: dict[str, Work], repeats: int) -> dict[str, tuple[float, float]]:
    """Median and range of each, by device events, after one run; the works in turn."""
    for work in works.values():
        work()
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            work()
            end.record()
            end.synchronize()
            times[name].append(begin.elapsed_time(end))
    return {name: (statistics.median(x), max(x) - min(x)) for name, x in times.items()}


def chained_milliseconds(steps: dict[str, Work], repeats: int) -> dict[str, tuple[float, float]]:
    """Median and range of each step, run after each other without a wait, as layers of a model.

    A product runs before them, so that the host is ahead of the device from the first step on.
    """
    for work in steps.values():
        work()
    ahead = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    torch.cuda.synchronize()
    for _ in range(8):  # some 12 ms
        ahead @ ahead
    marks = []
    for _ in range(repeats):
        for name, work in steps.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            work()
            end.record()
            marks.append((name, begin, end))
    torch.cuda.synchronize()
    times = {name: [b.elapsed_time(e) for mark, b, e in marks if mark == name] for name in steps}
    return {name: (statistics.median(x), max(x) - min(x)) for name, x in times.items()}


def joules_and_watts(work: Work, once_ms: float) -> tuple[float, float]:
    """Joules of one call and mean watts, between two edges of the counter."""
    import pynvml  # here: only --joules needs it

    pynvml.nvmlInit()
    uuid = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
    gpu = pynvml.nvmlDeviceGetHandleByUUID(uuid)
    edges: list[tuple[float, float]] = []

    def edge() -> tuple[float, float]:
        first = now = pynvml.nvmlDeviceGetTotalEnergyConsumption(gpu)
        while now == first:
            now = pynvml.nvmlDeviceGetTotalEnergyConsumption(gpu)
        return now / 1000, time.monotonic()

    def watch() -> None:
        time.sleep(0.3)
        edges.append(edge())
        time.sleep(JOULE_SECONDS)
        edges.append(edge())

    # The device has calls waiting until the last edge is seen, some 50 ms of them.
    ahead = deque[torch.cuda.Event](maxlen=max(2, math.ceil(50 / once_ms)))
    begin = torch.cuda.Event(enable_timing=True)
    begin.record()
    watcher = threading.Thread(target=watch)
    watcher.start()
    count = 0
    while watcher.is_alive():
        if len(ahead) == ahead.maxlen:
            ahead[0].synchronize()
        work()
        count += 1
        ahead.append(torch.cuda.Event(enable_timing=True))
        ahead[-1].record()
    if len(edges) < 2:
        raise RuntimeError("the energy counter could not be read, see above")
    ahead[-1].synchronize()
    (joules_0, seconds_0), (joules_1, seconds_1) = edges
    watts = (joules_1 - joules_0) / (seconds_1 - seconds_0)
    return watts * begin.elapsed_time(ahead[-1]) / 1000 / count, watts


def sampled_error(
    case: Case, q: Tensor, k: Tensor, v: Tensor, index: BandIndex | None, out: Tensor
) -> float:
    """Largest relative error of query tiles of the first and last head.

    Against products in float32 (a row of a million float64 keys is a gigabyte) and a softmax in
    float64. Three tiles of the begin, the middle and the end; ``index`` ``None`` is dense.
    """
    worst = 0.0
    last = (case.tokens - 1) // TILE
    for h in (0, case.heads - 1):
        for m in sorted({min(1, last), last // 2, last}):
            i = torch.arange(m * TILE, min((m + 1) * TILE, case.tokens), device="cuda")
            n = int(i[-1]) + 1
            seen = torch.arange(n, device="cuda")[None] <= i[:, None]
            if index is not None:
                seen &= visible_columns(index, h, m * TILE, n)[None]
            rows = q[0, h, i].float()
            logits = (rows @ k[0, h // case.group, :n].float().T).double() * case.scale
            weights = torch.softmax(logits.masked_fill(~seen, -torch.inf), -1)
            want = weights.float() @ v[0, h // case.group, :n].float()
            worst = max(worst, float((out[0, h, i].float() - want).norm() / want.norm()))
    return worst


def visible_columns(index: BandIndex, h: int, r0: int, n: int) -> Tensor:
    """Keys below ``n`` that the query tile at ``r0`` of listed head ``h`` may see."""
    one = BandIndex(
        index.heads[h : h + 1], index.pieces[:, h : h + 1], index.columns[:, h : h + 1],
        index.n_k,
    )  # fmt: skip
    e = r0 - 1 - torch.arange(n, device="cuda")
    seen = (e < 0) | (one.banded()[0, 0, e.clamp(min=0)] & (e >= 0))
    columns = one.columns[0, 0].long()
    seen[columns[columns < n]] = True
    return seen


def sdpa(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend) -> Work:
    """Causal SDPA by one backend; raises :class:`CannotRunError` where it refuses the shape."""

    def run() -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    try:
        run()
    except RuntimeError as error:
        raise CannotRunError(str(error).splitlines()[0]) from error
    return run


def flex(q: Tensor, k: Tensor, v: Tensor, index: BandIndex, limit: int) -> Work:
    """FlexAttention over the same pairs; it knows whole blocks, so it gathers no columns."""
    n = index.n_k
    if n > limit:
        raise CannotRunError(f"a block mask takes memory quadratic in tokens, limit {limit}")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    banded = index.banded()[0]
    is_column = torch.zeros(len(index.heads), n + 1, dtype=torch.bool, device="cuda")
    is_column.scatter_(1, index.columns[0].long().clamp(max=n), True)

    def seen(_: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        e = i // TILE * TILE - 1 - j
        return (i >= j) & ((e < 0) | banded[h, e.clamp(min=0)] | is_column[h, j])

    try:
        mask = create_block_mask(seen, 1, q.shape[1], n, n, _compile=True)
        attend = torch.compile(flex_attention)
        attend(q, k, v, block_mask=mask, enable_gqa=True)
    except Exception as error:  # the compiler fails in many ways; all are shown
        raise CannotRunError(f"{type(error).__name__}: {str(error).splitlines()[0]}") from error
    return lambda: attend(q, k, v, block_mask=mask, enable_gqa=True)


def minference(checkout: Path) -> Callable[..., Tensor]:
    """``vertical_slash_sparse_attention`` of a checkout, its index extension built here."""
    csrc = checkout / "csrc"
    kernel = checkout / "minference" / "ops" / "pit_sparse_flash_attention_v2.py"
    sources = [csrc / "kernels.cpp", csrc / "vertical_slash_index.cu"]
    missing = [str(x) for x in (kernel, *sources) if not x.is_file()]
    if missing:
        raise CannotRunError(f"not a checkout of MInference, lacks {', '.join(missing)}")
    from torch.utils.cpp_extension import load

    try:
        built = load("minference_index", [str(x) for x in sources])
    except (OSError, RuntimeError, ImportError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise CannotRunError(f"its CUDA extension does not build: {reason}") from error
    # The kernel's file alone: the package imports models and more. Its own extension's name.
    for name, attributes in (
        ("minference", {"__path__": []}),
        ("minference.ops", {"__path__": []}),
        (
            "minference.cuda",
            {"convert_vertical_slash_indexes": built.convert_vertical_slash_indexes},
        ),
    ):
        module = types.ModuleType(name)
        vars(module).update(attributes)
        sys.modules[name] = module
    spec = importlib.util.spec_from_file_location(f"minference.ops.{kernel.stem}", kernel)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.vertical_slash_sparse_attention  # type: ignore[no-any-return]


def minference_work(
    attend: Callable[..., Tensor], case: Case, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern
) -> Work:
    """Head by head, as its models call it; index and attention together."""
    out = torch.empty_like(q)
    chosen = [
        (padded([columns]), padded([slashes]))
        for columns, slashes in zip(pattern.columns, pattern.slashes, strict=True)
    ]

    def run() -> Tensor:
        for h, (columns, slashes) in enumerate(chosen):
            kv = slice(h // case.group, h // case.group + 1)
            one = slice(h, h + 1)
            out[:, one] = attend(q[:, one], k[:, kv], v[:, kv], columns, slashes)
        return out

    try:
        run()
    except Exception as error:  # another project's code; its failure is shown
        raise CannotRunError(f"{type(error).__name__}: {error}") from error
    return run


def measured(
    case: Case,
    budget: Budget | str | None,
    works: dict[str, Work],
    refusals: dict[str, str],
    flops: dict[str, float],
    density: float,
    error_of: Callable[[str, Tensor], float | None],
    options: argparse.Namespace,
) -> list[Row]:
    """Time the works in turn, then check each and, if asked, weigh it; print as they come."""
    rows = []
    timed = milliseconds(works, options.repeats)
    for name, (median, spread) in timed.items():
        out = works[name]()
        assert isinstance(out, Tensor)
        joules = watts = None
        if options.joules:
            joules, watts = joules_and_watts(works[name], median)
        tflops = flops[name] / median / 1e9 if name in flops else None
        error = error_of(name, out)
        rows.append(
            Row(case, name, budget, median, spread, tflops, density, error, joules, watts, None)
        )
    for name, reason in refusals.items():
        rows.append(Row(case, name, budget, None, None, None, density, None, None, None, reason))
    for row in rows:
        print(line(row), flush=True)
    return rows


def line(row: Row) -> str:
    """One row for a terminal."""
    what = f"{row.case.tokens:>8} {row.budget or 'dense'!s:<13} {row.variant:<22}"
    if row.milliseconds is None:
        return f"{what} left out: {row.why_not}"
    parts = [f"{row.milliseconds:9.3f} ms +-{(row.spread_milliseconds or 0) / 2:.3f}"]
    parts += [f"{row.tflops:6.1f} TFLOP/s"] if row.tflops is not None else []
    parts += [f"density {row.density:.4f}"]
    parts += [f"error {row.relative_error:.1e}"] if row.relative_error is not None else []
    if row.share_of_layer is not None:
        parts += [f"{100 * row.share_of_layer:.1f} % of the layer"]
    parts += [f"{row.joules:.3f} J at {row.watts:.0f} W"] if row.joules is not None else []
    return f"{what} {'  '.join(parts)}"


def dense_rows(
    case: Case, q: Tensor, k: Tensor, v: Tensor, options: argparse.Namespace
) -> list[Row]:
    """SDPA by backend, and our pair kernel over every tile."""
    works: dict[str, Work] = {}
    refusals: dict[str, str] = {}
    for backend in BACKENDS:
        try:
            works[f"SDPA {backend.name.split('_')[0].lower()}"] = sdpa(q, k, v, backend)
        except CannotRunError as reason:
            refusals[f"SDPA {backend.name.split('_')[0].lower()}"] = str(reason)
    n = case.tokens
    pieces = torch.arange(0, n, PIECE, dtype=torch.int32, device="cuda")
    every = BandIndex(
        torch.arange(case.heads, dtype=torch.int32, device="cuda"),
        pieces.expand(1, case.heads, -1).contiguous(),
        torch.empty(1, case.heads, 0, dtype=torch.int32, device="cuda"),
        n,
    )
    pairs = False if options.portable else None
    works["ours, every tile"] = lambda: band_attention(
        q, k, v, every, scale=case.scale, pairs=pairs
    )
    flops = dict.fromkeys(works, 4.0 * case.heads * case.head_dim * causal_pairs(n, n))
    return measured(
        case, None, works, refusals, flops, 1.0,
        lambda _, out: sampled_error(case, q, k, v, None, out), options,
    )  # fmt: skip


def sparse_rows(
    case: Case,
    budget: Budget | str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    other: Callable[..., Tensor] | CannotRunError,
    options: argparse.Namespace,
) -> list[Row]:
    """One budget, or the mix: ours and its preparing steps, FlexAttention, MInference."""
    budgets = budgets_of(budget, case.heads)
    pattern = Pattern.drawn(case, budgets)
    index = pattern.index(case.tokens)
    heads, last = index.heads, range(max(0, case.tokens - TILE), case.tokens)
    sizes = [columns for columns, _ in budgets], [slashes for _, slashes in budgets]
    pairs = False if options.portable else None
    works: dict[str, Work] = {
        "ours": lambda: band_attention(q, k, v, index, scale=case.scale, pairs=pairs)
    }
    refusals: dict[str, str] = {}
    makers: dict[str, Callable[[], Work]] = {
        "FlexAttention": lambda: flex(q, k, v, index, options.flex_up_to),
        "MInference": lambda: minference_work(_given(other), case, q, k, v, pattern),
    }
    for name, make in makers.items():
        try:
            works[name] = make()
        except CannotRunError as reason:
            refusals[name] = str(reason)
    flops = {"ours": computed_tiles(index) * 4.0 * TILE * TILE * case.head_dim}
    density = float(index.density(case.tokens).mean())

    def error_of(name: str, out: Tensor) -> float | None:
        # MInference computes other pairs than the index shows: no error against our oracle.
        return None if name == "MInference" else sampled_error(case, q, k, v, index, out)

    rows = measured(case, budget, works, refusals, flops, density, error_of, options)
    scores = row_scores(q, k, heads, last, scale=case.scale)
    steps: dict[str, Work] = {
        "estimate": lambda: row_scores(q, k, heads, last, scale=case.scale),
        "index": lambda: band_index(
            *scores, heads, *sizes, cut_pieces=cut_pieces, choose=chosen_bands
        ),
    }
    layer = chained_milliseconds({**steps, "attend": works["ours"]}, options.repeats)
    whole = sum(median for median, _ in layer.values())
    for name in steps:
        median, spread = layer[name]
        row = Row(
            case, name, budget, median, spread, None, density, None, None, None, None,
            share_of_layer=median / whole,
        )  # fmt: skip
        print(line(row), flush=True)
        rows.append(row)
    return rows


def _given(other: Callable[..., Tensor] | CannotRunError) -> Callable[..., Tensor]:
    if isinstance(other, CannotRunError):
        raise other
    return other


def roofline(rows: list[Row], ceiling_tflops: float) -> str:
    """SVG: TFLOP/s of computed tiles over tokens, and what a large product reaches here."""
    shown = [r for r in rows if r.tflops is not None]
    width, height, left, bottom = 860, 460, 60, 420
    tokens = [r.case.tokens for r in shown]
    low, high = math.log2(min(tokens)) - 0.3, math.log2(max(tokens)) + 0.3
    top = ceiling_tflops * 1.1

    def x_of(n: int) -> float:
        return left + (math.log2(n) - low) / (high - low) * 560

    def y_of(tflops: float) -> float:
        return bottom - tflops / top * 380

    names = sorted({(r.variant, str(r.budget or "")) for r in shown})
    marks = []
    for k, (variant, budget) in enumerate(names):
        color = f"hsl({360 * k // len(names)} 65% 40%)"
        label = f"{variant} {budget}".strip()
        y = 40 + 18 * k
        marks.append(f'<circle cx="660" cy="{y}" r="4" fill="{color}"/>')
        marks.append(f'<text x="670" y="{y + 4}">{label}</text>')
        for r in shown:
            if (r.variant, str(r.budget or "")) == (variant, budget):
                x, y_dot = x_of(r.case.tokens), y_of(r.tflops or 0.0)
                marks.append(f'<circle cx="{x:.1f}" cy="{y_dot:.1f}" r="4" fill="{color}"/>')
    for n in sorted(set(tokens)):
        text = f'<text x="{x_of(n):.1f}" y="{bottom + 16}" text-anchor="middle">{n // 1024}K</text>'
        marks.append(text)
    for tflops in range(0, int(top) + 1, 100):
        y_tick = y_of(tflops)
        marks.append(f'<path d="M{left} {y_tick:.1f}H{left + 560}" stroke="#ddd"/>')
        marks.append(f'<text x="{left - 6}" y="{y_tick + 4:.1f}" text-anchor="end">{tflops}</text>')
    y_top = y_of(ceiling_tflops)
    marks.append(f'<path d="M{left} {y_top:.1f}H{left + 560}" stroke="black"/>')
    marks.append(f'<text x="{left + 6}" y="{y_top - 5:.1f}">matrix product, 8192 cubed</text>')
    marks.append(f'<text x="{left}" y="20">TFLOP/s of computed tiles over tokens</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="12">{"".join(marks)}</svg>\n'
    )


def product_tflops() -> float:
    """What a large bfloat16 product reaches on this device."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    median, _ = milliseconds({"product": lambda: a @ b}, 20)["product"]
    return 2 * 8192**3 / median / 1e9


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    several: Any = {"type": int, "nargs": "+"}
    parser.add_argument("--lengths", **several, default=[8192, 32768, 131072])
    parser.add_argument("--heads", type=int, default=32, help="query heads")
    parser.add_argument("--groups", **several, default=[4], help="query heads per KV head")
    parser.add_argument("--head-dims", **several, default=[128])
    parser.add_argument("--seeds", **several, default=[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dense-up-to", type=int, default=131072, help="longest dense run")
    parser.add_argument("--flex-up-to", type=int, default=32768, help="longest FlexAttention run")
    parser.add_argument("--minference", type=Path, help="checkout of MInference")
    parser.add_argument("--joules", action="store_true", help="also energy, three seconds each")
    parser.add_argument(
        "--portable", action="store_true", help="the portable kernel on a Hopper GPU too"
    )
    parser.add_argument("--output", type=Path, help="JSON file to write after each case")
    parser.add_argument("--roofline", type=Path, help="SVG file to write")
    return parser.parse_args()


def main() -> None:
    """Parse, measure case by case, write after each."""
    options = parsed()
    if not torch.cuda.is_available():
        sys.exit("these kernels are timed on a CUDA GPU, and torch sees none here")
    other: Callable[..., Tensor] | CannotRunError = CannotRunError(
        "no checkout given with --minference"
    )
    if options.minference is not None:
        try:
            other = minference(options.minference)
        except CannotRunError as reason:
            other = reason
    ceiling = product_tflops()
    machine = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "portable": options.portable,
        "product_tflops": ceiling,
    }
    print(machine)
    rows: list[Row] = []
    for n, group, head_dim, seed in itertools.product(
        options.lengths, options.groups, options.head_dims, options.seeds
    ):
        case = Case(n, options.heads, group, head_dim, seed)
        print(case)
        q, k, v = tensors(case)
        if n <= options.dense_up_to:
            rows += dense_rows(case, q, k, v, options)
        for budget in (*BUDGETS, "mix"):
            if max(map(max, budgets_of(budget, case.heads))) <= n:
                rows += sparse_rows(case, budget, q, k, v, other, options)
        if options.output is not None:
            found = {"machine": machine, "rows": [asdict(row) for row in rows]}
            options.output.write_text(json.dumps(found, indent=1) + "\n")
        if options.roofline is not None:
            options.roofline.write_text(roofline(rows, ceiling))


if __name__ == "__main__":
    main()
