"""Kernels side by side in one process: dense by every SDPA backend, then vertical-slash.

Run on a CUDA machine from the repository root, nothing installed but torch and triton::

    PYTHONPATH=. python benchmarks/kernels.py --lengths 131072 524288 --output kernels.json

Shape: Llama-3-8B's attention, 32 query heads, 8 KV heads, head_dim 128, bfloat16, batch 1.
Queries, keys and values are random; indices have the structure of real heads: half of the
slashes local, half in clusters of 8 to 63 at log-uniform offsets, columns anywhere after the
first 30. Every figure is a median over repeats after a warm-up, timed by device events.
TFLOP/s count the
64 x 64 tiles that are computed. The error is that of the last query tile against float64.
"""

import argparse
import json
import math
import random
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from minference_green.kernels import reference
from minference_green.kernels.cut import cut_tiles
from minference_green.kernels.estimate import row_scores
from minference_green.kernels.index import TILE, BandIndex
from minference_green.kernels.selection import FORCED_COLUMNS, band_index
from minference_green.kernels.top import top_positions
from minference_green.kernels.vertical_slash import band_attention

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
BUDGETS = ((1000, 6096), (30, 800), (3500, 100))
BACKENDS = (
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
)


def milliseconds(run: Callable[[], object], repeats: int) -> float:
    """Median of ``repeats`` runs after one, by device events."""
    run()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


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


def structured_index(n: int, vertical_size: int, slash_size: int) -> BandIndex:
    """One clustered pattern per head, of exactly the budget."""
    rng = random.Random(0)
    offsets = [clustered_offsets(rng, n, slash_size) for _ in range(HEADS)]
    after = range(FORCED_COLUMNS, n)
    columns = [
        [*range(FORCED_COLUMNS), *sorted(rng.sample(after, vertical_size - FORCED_COLUMNS))]
        for _ in range(HEADS)
    ]
    slashes, verticals = (
        torch.tensor([rows], dtype=torch.int32, device="cuda") for rows in (offsets, columns)
    )
    heads = torch.arange(HEADS, dtype=torch.int32, device="cuda")
    return BandIndex(heads, cut_tiles(slashes), verticals, n)


def computed_tiles(index: BandIndex) -> int:
    """Key tiles over all heads and query tiles, masked ones among them."""
    r0 = torch.arange(0, index.n_k, TILE, dtype=torch.int32, device="cuda")
    r0 = r0.expand(*index.columns.shape[:2], -1).contiguous()
    bands = torch.searchsorted(index.tile_starts, r0)
    columns = torch.searchsorted(index.columns, r0)
    return int((1 + bands + (columns + TILE - 1) // TILE).sum())


def last_tile_error(q: Tensor, k: Tensor, v: Tensor, index: BandIndex, out: Tensor) -> float:
    """Relative RMS error of the last query tile of two heads, against float64 on the CPU."""
    two = BandIndex(index.heads[:2], index.tile_starts[:, :2], index.columns[:, :2], index.n_k)
    mask = two.mask(TILE, index.n_k).cpu()
    q, k, v = (x.cpu() for x in (q[:, :2, -TILE:], k[:, :1], v[:, :1]))
    want, _ = reference.attention(q, k, v, mask, scale=HEAD_DIM**-0.5)
    got = out[:, :2, -TILE:].cpu().double()
    return float((got - want).norm() / want.norm())


def dense(q: Tensor, k: Tensor, v: Tensor, repeats: int) -> dict[str, float | None]:
    """Milliseconds of causal SDPA by backend; ``None`` where the backend refuses the shape."""

    def run() -> Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    times: dict[str, float | None] = {}
    for backend in BACKENDS:
        with sdpa_kernel(backend):
            try:
                times[backend.name] = milliseconds(run, repeats)
            except RuntimeError as error:
                print(f"{backend.name} refuses {tuple(q.shape)}: {str(error).splitlines()[0]}")
                times[backend.name] = None
    return times


def measure(n: int, dense_up_to: int, repeats: int, portable: bool) -> dict[str, object]:
    """Every figure of one length."""
    g = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(1, h, n, HEAD_DIM, device="cuda", dtype=torch.bfloat16, generator=g)
        for h in (HEADS, KV_HEADS, KV_HEADS)
    )
    heads = torch.arange(HEADS, dtype=torch.int32, device="cuda")
    scale = HEAD_DIM**-0.5
    result: dict[str, object] = {"tokens": n}
    if n <= dense_up_to:
        times = dense(q, k, v, repeats)
        result["dense_ms"] = times
        print(f"{n} tokens, dense: {times}")
    last = range(n - 64, n)
    scores = row_scores(q, k, heads, last, scale=scale)
    result["estimate_ms"] = milliseconds(
        lambda: row_scores(q, k, heads, last, scale=scale), repeats
    )
    print(f"{n} tokens, estimate: {result['estimate_ms']:.3f} ms")
    rows = []
    out = torch.empty_like(q)
    pairs = False if portable else None
    for vertical_size, slash_size in BUDGETS:
        if vertical_size > n:
            continue
        index = structured_index(n, vertical_size, slash_size)
        attend_ms = milliseconds(
            lambda index=index: band_attention(q, k, v, index, scale=scale, out=out, pairs=pairs),
            repeats,
        )
        tiles = computed_tiles(index)
        sizes = [vertical_size] * HEADS, [slash_size] * HEADS
        row = {
            "vertical_size": vertical_size,
            "slash_size": slash_size,
            "attend_ms": attend_ms,
            "index_ms": milliseconds(
                lambda sizes=sizes: band_index(
                    *scores, heads, *sizes, cut_tiles=cut_tiles, choose=top_positions
                ),
                repeats,
            ),
            "tflops": tiles * 4 * TILE * TILE * HEAD_DIM / attend_ms / 1e9,
            "density": float(index.density(n).mean()),
            "relative_error": last_tile_error(q, k, v, index, out),
        }
        rows.append(row)
        print(" ", {key: round(x, 6) if isinstance(x, float) else x for key, x in row.items()})
    result["vertical_slash"] = rows
    return result


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--dense-up-to", type=int, default=131072, help="longest dense run")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--portable", action="store_true", help="the portable kernel on a Hopper GPU too"
    )
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    machine = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "portable": options.portable,
    }
    print(machine)
    runs = [
        measure(n, options.dense_up_to, options.repeats, options.portable) for n in options.lengths
    ]
    if options.output is not None:
        options.output.write_text(json.dumps({"machine": machine, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
