"""Small models and methods that watch what reaches them."""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from minference_green.kernels import cpu
from minference_green.kernels.index import BandIndex
from minference_green.kernels.reference import attention, causal_mask, last_rows_scores
from minference_green.kernels.selection import a_shape_index, band_index
from minference_green.methods.dense import Dense
from minference_green.methods.patterns import AShape, HeadPattern, VerticalSlash
from minference_green.model.attention import switched
from minference_green.model.planted import SHAPES, PlantedHead, Shape
from minference_green.model.planting import plant
from minference_green.workload import synthetic_tokens


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


@dataclass
class Keeping:
    """Dense attention of the product that keeps every layer's inputs."""

    name: str = "keeping"
    parameters: Mapping[str, Any] = field(default_factory=dict)
    inputs: dict[int, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, layer: int) -> Tensor:
        self.inputs[layer] = (q, k, v)
        return Dense().attend(q, k, v, scale=scale, layer=layer)


@dataclass(frozen=True)
class Planted:
    """A planted model run over one synthetic prompt."""

    shape: Shape
    tokens: Tensor
    inputs: dict[int, tuple[Tensor, Tensor, Tensor]]
    residuals: list[Tensor]
    """After every layer, ``[N, hidden]``."""
    logits: Tensor

    def last_rows(self, layer: int, head: int) -> Tensor:
        """Attention weights of the last 64 rows of a head, ``[64, N]``."""
        q, k, _ = self.inputs[layer]
        group = q.shape[1] // k.shape[1]
        logits = q[0, head, -64:].float() @ k[0, head // group].float().T * q.shape[-1] ** -0.5
        visible = causal_mask(64, k.shape[2])
        return torch.softmax(logits.masked_fill(~visible, -torch.inf), -1)

    def index(self, layer: int, head: int) -> BandIndex:
        """What the head's own budget selects."""
        q, k, _ = self.inputs[layer]
        group = q.shape[1] // k.shape[1]
        pattern = self.shape.patterns[layer][head]
        number = torch.tensor([head], dtype=torch.int32)
        n_k = k.shape[2]
        if isinstance(pattern, AShape):
            return a_shape_index(number, [pattern.n_init], [pattern.n_local], batch=1, n_k=n_k)
        assert isinstance(pattern, VerticalSlash)
        one_q, one_k = q[:, head, None, -64:], k[:, head // group, None]
        columns, slashes = last_rows_scores(one_q, one_k, scale=q.shape[-1] ** -0.5)
        return band_index(
            columns.float(),
            slashes.float(),
            number,
            [pattern.vertical_size],
            [pattern.slash_size],
            cut_pieces=cpu.cut_pieces,
        )


@pytest.fixture(scope="session")
def run_planted() -> Callable[..., Planted]:
    """Plant a shape and prefill a synthetic prompt, densely unless ``attend`` is given."""

    def run(
        shape: Shape, length: int, *, dtype: torch.dtype = torch.float32, attend: Any = None
    ) -> Planted:
        cpu = torch.device("cpu")
        model = plant(shape, device=cpu, dtype=dtype, seed=0)
        first = shape.config.bos_token_id
        drawn = torch.from_numpy(synthetic_tokens(0, 0, length - 1, first))
        tokens = torch.cat([torch.tensor([first]), drawn])
        method = Keeping()
        if attend is not None:
            method.attend = attend(method)  # type: ignore[method-assign]
        residuals: list[Tensor] = []
        for layer in model.model.layers:
            layer.register_forward_hook(lambda module, args, out: residuals.append(out[0]))
        with torch.inference_mode(), switched(model, method, dense=Dense()):
            logits = model(tokens[None], use_cache=False, logits_to_keep=64).logits
        return Planted(shape, tokens, method.inputs, residuals, logits)

    return run


@pytest.fixture(scope="session")
def narrow() -> Callable[..., Shape]:
    """A published shape's heads, one of every kind in each of two layers, in a narrow model.

    Peaks depend on head width, rotary base and budgets only, and these are the shape's own.
    """

    def make(name: str, n_layers: int = 2) -> Shape:
        shape = SHAPES[name]()
        by_kind: dict[HeadPattern, list[PlantedHead]] = {}
        for head in (head for layer in shape.heads for head in layer):
            by_kind.setdefault(head.pattern, []).append(head)
        kinds = sorted(by_kind, key=str)
        heads = tuple(
            tuple(by_kind[kinds[n % len(kinds)]][(n + 8 * layer) // len(kinds)] for n in range(8))
            for layer in range(n_layers)
        )
        config = copy.deepcopy(shape.config)
        config.head_dim = shape.config.hidden_size // shape.config.num_attention_heads
        config.hidden_size, config.intermediate_size = 256, 128
        config.num_hidden_layers = n_layers
        config.num_attention_heads, config.num_key_value_heads = 8, 2
        config.vocab_size, config.bos_token_id = 8192, 8191
        return Shape(config, heads)

    return make
