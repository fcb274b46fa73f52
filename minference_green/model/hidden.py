"""What flows between a model's layers, seen while it prefills."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from minference_green.model.attention import attention_layers


@contextmanager
def tapped(
    model: PreTrainedModel,
    *,
    layer: Callable[[int, Tensor], None],
    last: Callable[[Tensor], None],
) -> Iterator[None]:
    """Show what each decoder layer hands on, and what the head is given; hooks end with it.

    ``layer(number, hidden)`` gets the residual stream after a layer and ``last(hidden)`` the
    hidden states after the last norm, both ``[B, N, width]``; they are the model's own tensors.
    """
    names = {module: name for name, module in model.named_modules()}
    handles = [model.base_model.register_forward_hook(lambda _m, _i, out: last(_hidden(out)))]
    for attention in attention_layers(model):
        decoder = model.get_submodule(names[attention].rpartition(".")[0])
        number = int(attention.layer_idx)  # type: ignore[arg-type]

        def show(_module: nn.Module, _inputs: Any, out: Any, number: int = number) -> None:
            layer(number, _hidden(out))

        handles.append(decoder.register_forward_hook(show))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def head(model: PreTrainedModel) -> tuple[Tensor, Tensor | None] | None:
    """Weight ``[vocabulary, width]`` and bias of the layer that makes logits, if it has one."""
    found = model.get_output_embeddings()
    if not isinstance(found, nn.Linear):
        return None
    return found.weight, found.bias


def _hidden(out: Any) -> Tensor:
    """A layer returns its hidden states alone or first of a tuple, a model names them."""
    if isinstance(out, Tensor):
        return out
    hidden: Tensor = out[0]
    return hidden
