"""Train the embedded model: ``python -m training.embedded --work DIR [--minutes M]``.

Pieces of any length, each continuing where the last one stopped; the same documents in the
same order whatever the pieces. ``--export`` writes the files that the package ships.
"""

import argparse
import json
import random
import shutil
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from training.documents import MANY_NAMES, SOME_NAMES, Names, document
from training.network import Network, Shape, fastest_backend
from training.positions import jumping_positions

SEED = 1
STEP_TOKENS = 131_072


@dataclass(frozen=True)
class Pass:
    """Stages of (row length, tokens) under one rise and decline of the learning rate.

    ``rate`` is the share of the full rate it reaches, ``decline`` the share of its steps over
    which it falls to ``last``. ``names`` and ``far`` say what documents and positions hold.
    Attention logits are multiplied by a number drawn from ``softest`` to 1 for every step.
    """

    stages: tuple[tuple[int, float], ...]
    rate: float
    decline: float
    last: float
    names: Names
    far: float
    softest: float


LEARN = Pass(
    ((512, 150e6), (2_048, 131e6), (8_192, 165e6), (32_768, 118e6), (131_072, 30e6)),
    rate=1.0, decline=0.3, last=0.05, names=SOME_NAMES, far=0.0, softest=1.0,
)  # fmt: skip

LENGTHEN = Pass(
    ((131_072, 43e6),),
    rate=0.25, decline=1.0, last=0.05, names=MANY_NAMES, far=0.5, softest=0.8,
)  # fmt: skip
"""What the first pass leaves: facts whose other name stands far before them, positions beyond
half a million, and the many more keys of a longer text. Among n keys a logit has to stand out by
about ln n, and ln 1 048 576 / ln 131 072 is 1.18: logits are flattened by up to a fifth."""

MATRIX_RATE = 0.02
OTHER_RATE = 3e-3
WARM_UP_STEPS = 100
CLIP = 1.0
WEIGHTS = (0.1, 3.0, 1.0)
"""Weight of a byte that answers nothing, of an answer's first and of its others: the first alone
has to be found in the text, the others follow it."""


@dataclass(frozen=True)
class Step:
    """What one step trains on; ``rate`` is the share of the full learning rate."""

    rows: int
    length: int
    rate: float
    names: Names
    far: float
    softest: float


def plan(passes: tuple[Pass, ...], step_tokens: int) -> tuple[Step, ...]:
    """Every step of the passes; a step has ``step_tokens`` tokens, or one longer row."""
    steps: list[Step] = []
    for one in passes:
        lengths = [
            length
            for length, tokens in one.stages
            for _ in range(round(tokens / max(step_tokens, length)))
        ]
        for i, length in enumerate(lengths):
            decline = min(1.0, (len(lengths) - i) / (one.decline * len(lengths)))
            rate = one.rate * min((i + 1) / WARM_UP_STEPS, one.last + (1 - one.last) * decline)
            rows = max(1, step_tokens // length)
            steps.append(Step(rows, length, rate, one.names, one.far, one.softest))
    return tuple(steps)


class Steps(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Ids, answer marks and positions, ``[rows, length]`` each, of every step from ``first`` on."""

    def __init__(self, whole: tuple[Step, ...], first: int, seed: int) -> None:
        self.plan, self.first, self.seed = whole, first, seed

    def __len__(self) -> int:
        return len(self.plan) - self.first

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        number = self.first + i
        step = self.plan[number]
        made = [
            document(self.seed, number * step.rows * step.length + row, step.length, step.names)
            for row in range(step.rows)
        ]
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        return (
            torch.from_numpy(np.stack([one.ids for one in made])),
            torch.from_numpy(np.stack([one.answer for one in made])),
            jumping_positions(step.rows, step.length, generator, step.far),
        )


class Trainer:
    """Network, optimisers and the step reached; saved and loaded as one folder."""

    def __init__(
        self, whole: tuple[Step, ...], shape: Shape, device: torch.device, seed: int
    ) -> None:
        self.plan, self.device, self.seed, self.step = whole, device, seed, 0
        self.network = Network(shape, compiled=device.type == "cuda")
        self.network.initialise(seed)
        self.network.to(device)
        matrices = [
            p for n, p in self.network.named_parameters() if p.dim() == 2 and "emb" not in n
        ]
        others = [p for n, p in self.network.named_parameters() if p.dim() == 1 or "emb" in n]
        self.muon = torch.optim.Muon(matrices, lr=MATRIX_RATE, momentum=0.95, weight_decay=0.0)
        self.adam = torch.optim.AdamW(others, lr=OTHER_RATE, betas=(0.9, 0.98), weight_decay=0.0)

    def train(self, ids: Tensor, marks: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """One step; the loss, and the share of answers whose first byte came out right."""
        rate = self.plan[self.step].rate
        for optimiser, full in ((self.muon, MATRIX_RATE), (self.adam, OTHER_RATE)):
            for group in optimiser.param_groups:
                group["lr"] = full * rate
        ids, marks, positions = (
            t.to(self.device, non_blocking=True) for t in (ids.long(), marks, positions)
        )
        drawn = random.Random(f"{self.seed} {self.step}").random()  # noqa: S311 - no secret
        softest = self.plan[self.step].softest
        hidden = self.network.hidden(ids, positions, softest + (1 - softest) * drawn)
        targets, answers = ids.roll(-1, 1), marks.roll(-1, 1).long()
        weight = torch.tensor(WEIGHTS, device=self.device)[answers]
        weight[:, -1] = 0.0
        losses, right = self.network.losses(hidden, targets.reshape(-1))
        loss = (losses * weight.view(-1)).sum() / weight.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), CLIP)
        for optimiser in (self.muon, self.adam):
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.step += 1
        firsts = (answers == 1).view(-1)
        return loss.detach(), (right & firsts).sum() / firsts.sum().clamp(min=1)

    def save(self, folder: Path) -> None:
        """Write weights, optimiser states and the step; a cut leaves the last whole save."""
        fresh, old = _fresh(folder), folder.with_name(folder.name + ".old")
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
        fresh.mkdir(parents=True)
        save_file(_cpu(self.network.state_dict()), fresh / "weights.safetensors")
        for name, optimiser in (("muon", self.muon), ("adam", self.adam)):
            states = optimiser.state_dict()["state"]
            flat = {f"{i}.{k}": v for i, s in states.items() for k, v in s.items()}
            save_file(
                _cpu({k: torch.as_tensor(v) for k, v in flat.items()}),
                fresh / f"{name}.safetensors",
            )
        (fresh / "step.json").write_text(json.dumps({"step": self.step, "seed": self.seed}))
        if folder.exists():
            folder.rename(old)
        fresh.rename(folder)
        shutil.rmtree(old, ignore_errors=True)

    def load(self, folder: Path) -> None:
        """Continue from what ``save`` wrote."""
        self.network.load_state_dict(load_file(folder / "weights.safetensors"))
        for name, optimiser in (("muon", self.muon), ("adam", self.adam)):
            state: dict[int, dict[str, Tensor]] = {}
            for key, tensor in load_file(folder / f"{name}.safetensors").items():
                number, _, field = key.partition(".")
                state.setdefault(int(number), {})[field] = tensor
            optimiser.load_state_dict({**optimiser.state_dict(), "state": state})
        self.step = json.loads((folder / "step.json").read_text())["step"]


def saved(folder: Path) -> bool:
    """Whether there is a save to continue from; one that was cut before it got its name gets it."""
    fresh = _fresh(folder)
    # The step is written last.
    if not folder.exists() and (fresh / "step.json").exists():
        fresh.rename(folder)
    return folder.exists()


def _fresh(folder: Path) -> Path:
    return folder.with_name(folder.name + ".new")


def _cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def run(trainer: Trainer, work: Path, *, seconds: float, workers: int, every: int = 20) -> None:
    """Train for about ``seconds`` or to the end, logging to ``log.jsonl``, saving at the end."""
    start = time.monotonic()
    recent: list[tuple[Tensor, Tensor]] = []
    lately = 0
    batches = DataLoader(
        Steps(trainer.plan, trainer.step, trainer.seed),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        pin_memory=trainer.device.type == "cuda",
    )
    with (work / "log.jsonl").open("a") as log:
        for batch in batches:
            rows, length = batch[0].shape
            if length != lately and trainer.device.type == "cuda":
                trainer.network.backend = fastest_backend(trainer.network.shape, rows, length)
                print(f"{length} tokens a row: {trainer.network.backend}", flush=True)
            lately = length
            recent.append(trainer.train(*batch))
            elapsed = time.monotonic() - start
            if trainer.step % every == 0 or elapsed > seconds:
                loss, right = (float(torch.stack(x).mean()) for x in zip(*recent, strict=True))
                record = {
                    "step": trainer.step,
                    "length": length,
                    "loss": round(loss, 4),
                    "first_bytes_right": round(right, 4),
                    "seconds": round(elapsed, 2),
                }
                print(json.dumps(record), flush=True)
                log.write(json.dumps(record) + "\n")
                recent.clear()
            if elapsed > seconds:
                break
    trainer.save(work / "checkpoint")


def export(network: Network, folder: Path) -> None:
    """Write the model as transformers loads it: ``config.json`` and bfloat16 weights."""
    folder.mkdir(parents=True, exist_ok=True)
    shape = asdict(network.shape)
    theta = shape.pop("rope_theta")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": True,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "pad_token_id": 258,
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "minference_green_bytes": True,
        **shape,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    weights = {name: t.to(torch.bfloat16) for name, t in _cpu(network.state_dict()).items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    """Parse the command line and train or export."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder of checkpoint and log")
    parser.add_argument("--minutes", type=float, default=600.0, help="stop this piece after")
    parser.add_argument("--workers", type=int, default=12, help="processes that write documents")
    parser.add_argument("--scale", type=float, default=1.0, help="share of every stage's tokens")
    parser.add_argument("--export", type=Path, help="write the trained model here and stop")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    passes = tuple(
        replace(
            one, stages=tuple((length, tokens * options.scale) for length, tokens in one.stages)
        )
        for one in (LEARN, LENGTHEN)
    )
    trainer = Trainer(plan(passes, STEP_TOKENS), Shape(), device, SEED)
    checkpoint = options.work / "checkpoint"
    if saved(checkpoint):
        trainer.load(checkpoint)
    elif options.export:
        parser.error(f"there is no {checkpoint} to export; train first")
    if options.export:
        export(trainer.network, options.export)
        return
    options.work.mkdir(parents=True, exist_ok=True)
    run(trainer, options.work, seconds=60 * options.minutes, workers=options.workers)


if __name__ == "__main__":
    main()
