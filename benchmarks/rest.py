"""Everything of a prefill but attention, by each way of running a layer's small steps.

    PYTHONPATH=. python -m benchmarks.rest --lengths 8192 32768 --output rest.json

Attention returns its queries, so that what is left are matrix products, norms, rotations, MLP
gates and the cache. Ways: ``stock`` as transformers runs it; ``fused`` by ``kernels/rest.py``;
``compiled``, the same pieces as torch.compile makes them; ``products``, the matrix products alone,
which is the floor. Rounds go there and back over the ways, so that a drift hits
them alike. Joules by the product's own meter.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from minference_green.api import measure
from minference_green.methods.dense import Dense
from minference_green.model.attention import switched
from minference_green.model.loading import LoadedModel, load
from minference_green.model.rest import Pieces, fused, triton_pieces
from minference_green.torch_device import resolve_device
from minference_green.workload import Workload

WAYS = ("stock", "fused", "compiled", "products")


class _ReturnsQueries:
    """Attention that costs nothing."""

    name = "none"
    parameters: Mapping[str, Any] = MappingProxyType({})

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, layer: int) -> Tensor:  # noqa: ARG002
        return q


def compiled_pieces() -> Pieces:
    """The stock formulas, each as one compiled function."""

    @torch.compile(fullgraph=True)
    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        return weight * wide.to(x.dtype)

    @torch.compile(fullgraph=True)
    def gated_silu(gate: Tensor, up: Tensor) -> Tensor:
        return functional.silu(gate) * up

    @torch.compile(fullgraph=True)
    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]

    return Pieces(rms_norm, gated_silu, rotate)


def products(model: LoadedModel, ids: Tensor) -> None:
    """The matrix products of all layers, one after another on inputs of a layer's size."""
    x = model.model.get_input_embeddings()(ids)
    for layer in model.model.base_model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        queries = attention.q_proj(x)
        attention.k_proj(x), attention.v_proj(x), attention.o_proj(queries)
        inner = mlp.gate_proj(x)
        mlp.up_proj(x), mlp.down_proj(inner)


def pieces_of(way: str, device: torch.device) -> Pieces | None:
    """What a way puts in place of the stock steps, if anything."""
    match way:
        case "stock" | "products":
            return None
        case "fused":
            return triton_pieces(device)
        case "compiled":
            return compiled_pieces()
    raise SystemExit(f"{way!r} is not a way; choose from {', '.join(WAYS)}")


def cost(
    model: LoadedModel, way: str, pieces: Pieces | None, ids: Tensor, window: float, meter: str
) -> dict[str, Any]:
    """Seconds and joules per million tokens of one way, and what it fused."""
    method, dense = _ReturnsQueries(), Dense()
    on_gpu = ids.device.type == "cuda"
    context = nullcontext("nothing") if pieces is None else fused(model.model, pieces)
    with torch.inference_mode(), context as what, switched(model.model, method, dense=dense):

        def prefill() -> None:
            if way == "products":
                products(model, ids)
            else:
                model.model(input_ids=ids, use_cache=True, logits_to_keep=1)

        began = time.monotonic()
        prefill()
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        first = time.monotonic() - began
        took = measure(prefill, window_seconds=window, meter=meter)
    tokens = ids.numel()
    return {
        "fused": what,
        "first_seconds": first,
        "seconds_per_mtok": 1e6 * took.seconds / took.repeats / tokens,
        "joules_per_mtok": None if took.joules is None else 1e6 * took.joules / tokens,
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
    }


def last_logits(model: LoadedModel, pieces: Pieces | None, ids: Tensor) -> Tensor:
    """Logits of the last position with the model's own dense attention."""
    context = nullcontext() if pieces is None else fused(model.model, pieces)
    with torch.inference_mode(), context, switched(model.model, Dense(), dense=Dense()):
        logits: Tensor = model.model(input_ids=ids, use_cache=False, logits_to_keep=1).logits
    return logits.double()


def main() -> None:
    """Print one line per way and length, and write all rounds as JSON."""
    parser = argparse.ArgumentParser(description="everything but attention, way by way")
    parser.add_argument("--model", default="planted:llama-3-8b")
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--ways", nargs="+", default=list(WAYS))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--window", type=float, default=2.0)
    parser.add_argument("--meter", default="auto")
    parser.add_argument("--output", type=Path)
    asked = parser.parse_args()
    device = resolve_device("auto")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = load(asked.model, device=device, dtype=dtype)
    ways = {way: pieces_of(way, device) for way in asked.ways}
    found = []
    for length in asked.lengths:
        ids = model.prompt(Workload(asked.model, (length,)), length)
        for number in range(asked.rounds):
            order = list(ways) if number % 2 == 0 else list(ways)[::-1]
            for way in order:
                took = cost(model, way, ways[way], ids, asked.window, asked.meter)
                found.append({"way": way, "length": length, "round": number, **took})
        for way in ways:
            mine = [f for f in found if f["way"] == way and f["length"] == length]
            seconds = statistics.fmean(f["seconds_per_mtok"] for f in mine)
            joules = statistics.fmean(f["joules_per_mtok"] or math.nan for f in mine)
            print(
                f"{length:7} {way:9} {seconds:8.3f} s/Mtok {joules:9.0f} J/Mtok "
                f"first {mine[0]['first_seconds']:6.2f} s  "
                f"peak {(mine[0]['peak_bytes'] or 0) / 1e9:6.2f} GB  fused: {mine[0]['fused']}",
                flush=True,
            )
    ids = model.prompt(Workload(asked.model, (1000,)), 1000)
    stock = last_logits(model, None, ids)
    errors = {
        way: float((last_logits(model, pieces, ids) - stock).norm() / stock.norm())
        for way, pieces in ways.items()
        if way in ("fused", "compiled")
    }
    print(f"relative error of the last logits against stock, 1000 tokens: {errors}")
    if asked.output:
        versions = {"torch": torch.__version__, "model": asked.model, "dtype": str(dtype)}
        asked.output.write_text(
            json.dumps({**versions, "errors": errors, "rounds": found}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
