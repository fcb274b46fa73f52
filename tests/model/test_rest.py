"""The small steps of a layer fused: the same model, changed only for as long as it is asked for."""

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from minference_green.errors import UsageError
from minference_green.kernels import reference
from minference_green.methods.dense import Dense
from minference_green.model import rest
from minference_green.model.attention import switched
from minference_green.model.rest import Pieces, fused, triton_pieces

Build = Callable[..., PreTrainedModel]


class Oracles:
    """The pieces by their float64 formulas, counting calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        self.calls.append("norm")
        return reference.rms_norm(x, weight, eps).to(x.dtype)

    def gated_silu(self, gate: Tensor, up: Tensor) -> Tensor:
        self.calls.append(f"gate of {gate.shape[-2]}")
        return gate.copy_(reference.gated_silu(gate, up))

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        self.calls.append("rotate")
        return reference.rotate(x, cos, sin).to(x.dtype)

    @property
    def pieces(self) -> Pieces:
        return Pieces(self.rms_norm, self.gated_silu, self.rotate)


def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with switched(model, Dense(), dense=Dense()):
        found: Tensor = model(input_ids=ids, use_cache=True).logits
    return found


@pytest.mark.parametrize(
    ("config", "settings", "what"),
    [
        ("LlamaConfig", {}, "2 MLPs, 5 norms, 2 rotations"),
        ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}, "2 MLPs, 5 norms, 2 rotations"),
        ("Qwen2Config", {}, "2 MLPs, 5 norms, 2 rotations"),
        ("Qwen3Config", {"head_dim": 8}, "2 MLPs, 9 norms, 2 rotations"),
        ("MistralConfig", {"sliding_window": None}, "2 MLPs, 5 norms, 2 rotations"),
    ],
)
def test_a_fused_model_gives_the_logits_of_the_stock_one(
    config: str, settings: dict[str, Any], what: str, build: Build, ids: Callable[..., Tensor]
) -> None:
    model, prompt = build(config, **settings), ids(37, batch=2)
    want = logits(model, prompt)
    oracles = Oracles()
    with fused(model, oracles.pieces) as said:
        oracles.calls.clear()
        got = logits(model, prompt)
    assert said == what
    counts = [int(word) for word in what.split() if word.isdigit()]
    assert [sum(kind in c for c in oracles.calls) for kind in ("gate", "norm", "rotate")] == [
        counts[0],
        counts[1],
        2 * counts[2],
    ]
    assert float((got - want).norm() / want.norm()) < 1e-5


def test_generated_tokens_pass_through_the_pieces_too(
    build: Build, ids: Callable[..., Tensor]
) -> None:
    model, prompt = build("LlamaConfig"), ids(20)
    want = model(input_ids=prompt).logits[:, -1]
    with fused(model, Oracles().pieces), switched(model, Dense(), dense=Dense()):
        cache = model(input_ids=prompt[:, :-1], use_cache=True).past_key_values
        got = model(input_ids=prompt[:, -1:], past_key_values=cache).logits[:, -1]
    assert float((got - want).norm() / want.norm()) < 1e-5


def test_the_model_is_itself_again_afterwards_also_after_an_error(
    build: Build, ids: Callable[..., Tensor]
) -> None:
    model, prompt = build("LlamaConfig"), ids(20)
    want = logits(model, prompt)
    with pytest.raises(ArithmeticError), fused(model, Oracles().pieces):
        raise ArithmeticError
    assert torch.equal(logits(model, prompt), want)
    assert not any("forward" in vars(module) for module in model.modules())


def test_another_model_of_the_same_class_keeps_its_own_steps(
    build: Build, ids: Callable[..., Tensor]
) -> None:
    model, other, prompt = build("LlamaConfig"), build("LlamaConfig"), ids(20)
    oracles = Oracles()
    with fused(model, oracles.pieces):
        oracles.calls.clear()
        logits(other, prompt)
        assert oracles.calls == []


def test_a_piece_of_another_formula_stays_stock(build: Build, ids: Callable[..., Tensor]) -> None:
    model, prompt = build("LlamaConfig", hidden_act="gelu"), ids(20)
    want = logits(model, prompt)
    with fused(model, Oracles().pieces) as said:
        assert said == "5 norms, 2 rotations"
        assert float((logits(model, prompt) - want).norm() / want.norm()) < 1e-5


def test_a_rotation_of_part_of_a_head_stays_stock(build: Build, ids: Callable[..., Tensor]) -> None:
    partial = {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.5}
    model, prompt = build("PhiConfig", rope_parameters=partial), ids(20)
    want = logits(model, prompt)
    oracles = Oracles()
    with pytest.raises(UsageError, match="PhiForCausalLM has no norm, MLP or rotation"):
        fused(model, oracles.pieces).__enter__()
    assert torch.equal(logits(model, prompt), want)


def test_a_piece_that_is_wrong_is_never_put_in(build: Build) -> None:
    oracles = Oracles()
    doubled = Pieces(
        lambda x, weight, eps: 1.01 * oracles.rms_norm(x, weight, eps),
        lambda gate, up: gate.copy_(functional.gelu(gate) * up),
        lambda x, cos, sin: oracles.rotate(x, cos, -sin),
    )
    with (
        pytest.raises(UsageError, match="use --rest stock"),
        fused(build("LlamaConfig"), doubled),
    ):
        pass


def test_a_long_prompt_passes_an_mlp_in_pieces_with_the_same_result(
    build: Build, ids: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompt = build("LlamaConfig"), ids(37, batch=2)
    want = logits(model, prompt)
    monkeypatch.setattr(rest, "MLP_ROWS", 20)
    oracles = Oracles()
    with fused(model, oracles.pieces):
        oracles.calls.clear()
        got = logits(model, prompt)
    gates = [call for call in oracles.calls if "gate" in call]
    assert gates == [*["gate of 20"] * 3, "gate of 14"] * 2
    assert float((got - want).norm() / want.norm()) < 1e-5


def test_without_a_gpu_the_kernels_are_refused_by_name() -> None:
    with pytest.raises(UsageError, match="--rest fused needs a CUDA device, the model is on cpu"):
        triton_pieces(torch.device("cpu"))


IN_THE_INTERPRETER = """
import torch
from minference_green.kernels import rest
from minference_green.model.loading import load
from minference_green.model.rest import Pieces, fused
model = load("planted:tiny", device=torch.device("cpu"), dtype=torch.float32).model
ids = torch.randint(0, 4000, (2, 65), generator=torch.Generator().manual_seed(0))
with torch.inference_mode():
    want = model(ids).logits
    with fused(model, Pieces(rest.rms_norm, rest.gated_silu, rest.rotate)) as said:
        got = model(ids).logits
print(said, float((got - want).norm() / want.norm()), sep="|")
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU directly")
def test_a_model_with_the_kernels_themselves_is_the_stock_model_up_to_rounding() -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-c", IN_THE_INTERPRETER],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    said, error = done.stdout.split("|")
    assert said == "3 MLPs, 7 norms, 3 rotations"
    assert float(error) < 3e-6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_in_bfloat16_the_kernels_change_the_logits_less_than_the_dtype_does() -> None:
    from minference_green.model.loading import load

    device = torch.device("cuda")
    exact = load("planted:tiny", device=device, dtype=torch.float32).model
    model = load("planted:tiny", device=device, dtype=torch.bfloat16).model
    exact.load_state_dict(model.state_dict())
    ids = torch.randint(0, 4000, (1, 1000), generator=torch.Generator().manual_seed(0)).to(device)
    want = exact(ids).logits
    stock = model(ids).logits.float()
    with fused(model, triton_pieces(device)) as said:
        got = model(ids).logits.float()
    assert said == "3 MLPs, 7 norms, 3 rotations"
    assert (got - want).norm() <= 1.1 * (stock - want).norm()
