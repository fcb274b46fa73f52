"""Choose the embedded model's head patterns: ``python -m training.patterns MODEL --output FILE``.

Every head is tried with every candidate on whole texts. A head's error is the relative RMS of its
output against dense attention, its cost the share of causal pairs it computes, with ``--probe``
also what probing costs: of those pairs' work, rows / 64 of the products of queries and keys. One
price for all heads decides: each takes the candidate of least error^2 + price * cost, and the
price is the one at which the mean cost is what was asked. Heads that are easy to serve thus
leave their share to those that are not. (MInference searches by error of the output too, at a
fixed cost per head: arXiv 2407.02490, section 3.2.)
"""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minference_green.corpus.haystack import haystack
from minference_green.kernels.index import TILE
from minference_green.methods.dense import Dense
from minference_green.methods.official import PatternFile, write_patterns
from minference_green.methods.patterns import AShape, HeadPattern, Probed, VerticalSlash
from minference_green.methods.sparse import uniform
from minference_green.model.attention import switched
from minference_green.model.loading import load

SEED = 700_001
"""Neither training nor evaluation draws from it."""

BANDS: tuple[HeadPattern, ...] = (
    *(AShape(64, local) for local in (128, 256, 512, 1024)),
    *(
        VerticalSlash(vertical, slash)
        for vertical in (30, 100, 300, 1000)
        for slash in (100, 125, 150, 200, 300, 500)
    ),
)
"""What MInference's own format can say."""

PROBED: tuple[HeadPattern, ...] = (
    *(AShape(64, local) for local in (128, 256, 512, 1024)),
    *(VerticalSlash(vertical, 100) for vertical in (30, 100, 300, 1000)),
    *(Probed(top_k, 8) for top_k in (2, 4, 8, 16)),
)
"""Bands where they are cheap; what needs more of them is probed instead, one launch a layer."""


@dataclass(frozen=True)
class Trial:
    """Runs dense, and beside it every candidate on the same queries, keys and values."""

    dense: Dense
    candidates: tuple[HeadPattern, ...]
    name: str = "trial"
    parameters: Mapping[str, Any] = field(default_factory=dict)
    found: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    """Per (layer, candidate) the error and the density of each head, text by text."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, layer: int) -> Tensor:
        """Dense attention."""
        out = self.dense.attend(q, k, v, scale=scale, layer=layer)
        wanted = out.double()
        for i, pattern in enumerate(self.candidates):
            profile = uniform("trial", pattern).profile(q, k, v, scale=scale, layer=layer)
            off = (profile.out.double() - wanted).square().sum((0, 2, 3))
            error = (off / wanted.square().sum((0, 2, 3))).sqrt().cpu()
            self.found.setdefault((layer, i), []).append((error, profile.density))
        return out


def probing(pattern: HeadPattern) -> float:
    """What probing costs, in causal pairs attended to: two products of the four per pair."""
    return pattern.rows / TILE / 2 if isinstance(pattern, Probed) else 0.0


def choose(error: Tensor, cost: Tensor, density: float) -> Tensor:
    """Numbers of the chosen candidates, ``[heads]``, of ``error, cost [heads, candidates]``."""
    low, high = 0.0, 1e3
    for _ in range(100):
        price = (low + high) / 2
        chosen = (error.square() + price * cost).argmin(1)
        spent = cost.gather(1, chosen[:, None]).mean()
        low, high = (price, high) if spent > density else (low, price)
    return (error.square() + high * cost).argmin(1)


def main() -> None:
    """Parse the command line, search, write the pattern file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--length", type=int, default=16_384)
    parser.add_argument("--texts", type=int, default=2)
    parser.add_argument("--density", type=float, default=0.08, help="mean cost over all heads")
    parser.add_argument("--probe", action="store_true", help="for the method probe")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = load(options.model, device=device, dtype=dtype)
    candidates = PROBED if options.probe else BANDS
    trial = Trial(Dense(), candidates)
    for index in range(options.texts):
        filler = ("prose", "records", "code")[index % 3]
        text = haystack(SEED, index, length=options.length - 1, filler=filler).text
        ids = torch.tensor([[model.bos, *text]], device=device)
        with torch.inference_mode(), switched(model.model, trial, dense=trial.dense):
            model.model(input_ids=ids, logits_to_keep=1)
        print(f"text {index + 1} of {options.texts}", flush=True)
    layers = 1 + max(layer for layer, _ in trial.found)

    def table(which: int) -> Tensor:
        rows = [
            torch.stack([torch.stack([x[which] for x in trial.found[layer, i]]).mean(0)
                         for i in range(len(candidates))], 1)
            for layer in range(layers)
        ]  # fmt: skip
        return torch.stack(rows)

    error, density = table(0), table(1)
    cost = density + torch.tensor([probing(pattern) for pattern in candidates])
    heads = error.shape[1]
    chosen = choose(error.flatten(0, 1), cost.flatten(0, 1), options.density).view(layers, heads)
    patterns, scores = [], []
    for layer in range(layers):
        patterns.append(tuple(candidates[i] for i in chosen[layer].tolist()))
        scores.append(
            tuple(round(float(error[layer, h, chosen[layer, h]]), 4) for h in range(heads))
        )
        for h in range(heads):
            i = int(chosen[layer, h])
            print(f"layer {layer} head {h}: {candidates[i]}, density {density[layer, h, i]:.3f}, "
                  f"error {error[layer, h, i]:.3f}")  # fmt: skip
    write_patterns(options.output, PatternFile(tuple(patterns), tuple(scores)))


if __name__ == "__main__":
    main()
