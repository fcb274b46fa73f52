"""Sparse against dense prefill attention on the CPU.

    python benchmarks/cpu_attention.py [--tokens 8192] [--threads 2] [--rounds 7] [--cpu-time]

Inputs have the structure sparse prefill lives on: rotary positions (attention decays with
distance), a few strong columns, noise. Dense is the fastest backend. ``sparse`` is the whole
method, estimate and index included. Rounds alternate between the arms, so that both see the
same machine; figures are medians, ``least`` is the smallest ratio of any round. Wall time needs
an idle machine; --cpu-time counts the process's CPU seconds instead, which others hardly move.
That the sparse result is right is the business of tests/kernels/test_cpu.py.
"""

import argparse
import platform
import statistics
import time

import torch
from torch import Tensor

from minference_green.methods.dense import Dense, time_backends
from minference_green.methods.method import PrefillMethod
from minference_green.methods.patterns import AShape, BlockSparse, HeadPattern, VerticalSlash
from minference_green.methods.sparse import uniform

HEADS, KV_HEADS, HEAD_DIM = 8, 2, 64
SCALE = HEAD_DIM**-0.5

PATTERNS: dict[str, HeadPattern] = {
    "vertical-slash": VerticalSlash(300, 220),
    "a-shape": AShape(128, 700),
    "block-sparse": BlockSparse(12),
}


def structured(tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values with local decay by rotary positions and strong columns."""
    random = torch.Generator().manual_seed(0)
    rates = 10_000.0 ** -(torch.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))
    angle = torch.arange(tokens)[:, None] * rates
    position = torch.cat([angle.cos(), angle.sin()], -1)
    q = 1.5 * position + 0.5 * torch.randn(1, HEADS, tokens, HEAD_DIM, generator=random)
    k = 1.5 * position + 0.5 * torch.randn(1, KV_HEADS, tokens, HEAD_DIM, generator=random)
    strong = torch.randint(0, tokens, (20,), generator=random)
    k[:, :, strong] += 0.5 * q.mean((1, 2), keepdim=True)
    v = torch.randn(1, KV_HEADS, tokens, HEAD_DIM, generator=random)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def milliseconds(method: PrefillMethod, inputs: tuple[Tensor, Tensor, Tensor], cpu: bool) -> float:
    """Time of one call: wall, or CPU time of the process."""
    clock = time.process_time if cpu else time.perf_counter
    began = clock()
    method.attend(*inputs, scale=SCALE, layer=0)
    return (clock() - began) * 1e3


def main() -> None:
    """Print one line per dtype and method."""
    parser = argparse.ArgumentParser(description="sparse against dense prefill on the CPU")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cpu-time", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    print(
        f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, "
        f"{platform.machine()}, {asked.threads} threads, {asked.tokens} tokens, "
        f"{HEADS} query heads, {KV_HEADS} KV heads, head_dim {HEAD_DIM}, "
        f"{'CPU' if asked.cpu_time else 'wall'} time, median of {asked.rounds} rounds"
    )
    print(f"{'dtype':9} {'method':15} {'dense ms':>9} {'sparse ms':>9} density ratio least")
    for dtype in (torch.float32, torch.bfloat16):
        inputs = structured(asked.tokens, dtype)
        dense = Dense(time_backends(*inputs, scale=SCALE).fastest)
        for name, pattern in PATTERNS.items():
            sparse = uniform(name, pattern)
            density = sparse.profile(*inputs, scale=SCALE, layer=0).density.mean().item()
            rounds = [
                (
                    milliseconds(dense, inputs, asked.cpu_time),
                    milliseconds(sparse, inputs, asked.cpu_time),
                )
                for _ in range(asked.rounds)
            ]
            dense_ms = statistics.median(d for d, _ in rounds)
            sparse_ms = statistics.median(s for _, s in rounds)
            print(
                f"{str(dtype).removeprefix('torch.'):9} {name:15} {dense_ms:9.1f} {sparse_ms:9.1f} "
                f"{density:7.3f} {dense_ms / sparse_ms:5.2f} {min(d / s for d, s in rounds):5.2f}"
            )


if __name__ == "__main__":
    main()
