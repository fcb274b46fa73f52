"""Small models and methods that watch what reaches them."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from minference_green.kernels.reference import attention, causal_mask


@dataclass
class Watching:
    """Exact attention in float64, limited to a window if asked, that notes its calls."""

    name: str = "watching"
    window: int | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    calls: list[tuple[int, tuple[int, ...], tuple[int, ...], float]] = field(default_factory=list)
    inputs: dict[int, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, layer: int) -> Tensor:
        self.calls.append((layer, tuple(q.shape), tuple(k.shape), scale))
        self.inputs[layer] = (q, k, v)
        n_q, n_k = q.shape[2], k.shape[2]
        mask = causal_mask(n_q, n_k)
        if self.window is not None:
            mask &= ~causal_mask(n_q, n_k).tril(n_k - n_q - self.window)
        visible = mask.expand(q.shape[0], q.shape[1], -1, -1)
        return attention(q, k, v, visible, scale=scale)[0].to(q.dtype)


@dataclass
class Failing(Watching):
    """A method that breaks down in the middle of a forward pass."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, layer: int) -> Tensor:
        if layer > 0:
            raise ArithmeticError("broken on purpose")
        return super().attend(q, k, v, scale=scale, layer=layer)


@pytest.fixture
def watching() -> Callable[..., Watching]:
    return Watching


@pytest.fixture
def failing() -> Watching:
    return Failing()


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture
def build() -> Callable[..., PreTrainedModel]:
    """A two-layer model from a transformers configuration class, random weights, float32."""

    def make(config_name: str, **settings: Any) -> PreTrainedModel:
        import transformers

        config = getattr(transformers, config_name)(
            **{
                "vocab_size": 97,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 256,
                "pad_token_id": None,
                "bos_token_id": 1,
                "eos_token_id": None,
                **settings,
            }
        )
        torch.manual_seed(7)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        # The library's initial weights are so small that attention would hardly show.
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
        return model.eval()

    return make


@pytest.fixture
def ids() -> Callable[..., Tensor]:
    def make(length: int, batch: int = 1, seed: int = 3) -> Tensor:
        draw = torch.Generator().manual_seed(seed)
        return torch.randint(2, 97, (batch, length), generator=draw)

    return make
