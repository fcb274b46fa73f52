"""Make a loaded transformers model prefill with a method of ours, and give it back unchanged.

One function is registered with transformers' attention interface. It is called for every
attention layer and decides from the lengths alone::

    q length == k length > 1     a whole prompt           -> method
    q length <  k length         decode, question, chunk  -> dense
    one-token prompt                                      -> dense

Nothing of the model is copied or patched: arms of a comparison share one set of weights.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from minference_green.errors import UsageError
from minference_green.methods.method import PrefillMethod

IMPLEMENTATION = "minference_green"
"""The name under which transformers knows our attention."""

_NO_EFFECT_ON_ATTENTION = frozenset(
    {
        "cache_position",
        "logits_to_keep",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "position_ids",
        "return_dict",
        "sliding_window",  # acts through the mask, which is checked
        "use_cache",
    }
)


class UnsupportedModelError(UsageError):
    """The model's attention is not the full causal attention the methods compute."""


class UnsupportedCallError(UsageError):
    """A supported model was called in a way the methods cannot honour."""


@dataclass(frozen=True)
class Switched:
    """What a switched model runs."""

    method: PrefillMethod
    dense: PrefillMethod
    dense_layers: Mapping[int, str]
    """Layers that keep their own dense path, with the reason."""


_switched: dict[nn.Module, Switched] = {}
"""Attention modules of the models switched at the moment."""


@contextmanager
def switched(
    model: PreTrainedModel, method: PrefillMethod, *, dense: PrefillMethod
) -> Iterator[Switched]:
    """Let ``model`` prefill whole prompts with ``method``; restores it on exit, whatever happens.

    Continuations over a cache go to ``dense``, which must accept fewer queries than keys
    (queries are the last positions). Layers with a sliding window or another kind of
    attention, where only some layers differ, run transformers' own SDPA with their own mask
    and are listed in ``dense_layers``.

    Raises ``UnsupportedModelError`` on entry for a model that cannot be measured this way, and
    ``UnsupportedCallError`` during a forward pass with padding, packed sequences, a static cache,
    dropout or an argument that would be ignored.
    """
    layers = attention_layers(model)
    state = Switched(method, dense, _own_paths(model, layers))
    outer = {layer: _switched[layer] for layer in layers if layer in _switched}
    previous = model.config._attn_implementation  # noqa: SLF001  # has no public reader
    AttentionInterface.register(IMPLEMENTATION, _attention)
    AttentionMaskInterface.register(IMPLEMENTATION, _mask)
    try:
        _switched.update(dict.fromkeys(layers, state))
        model.set_attn_implementation(IMPLEMENTATION)
        if model.config._attn_implementation != IMPLEMENTATION:  # noqa: SLF001
            raise UnsupportedModelError(
                f"{type(model).__name__} does not use transformers' attention interface, so its "
                "attention cannot be replaced; measure a Llama, Qwen, Mistral, Phi or GLM model"
            )
        yield state
    finally:
        model.set_attn_implementation(previous)
        for layer in layers:
            del _switched[layer]
        _switched.update(outer)


def attention_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Modules that call the attention interface: they know their layer and their causality."""
    return [
        module
        for module in model.modules()
        if isinstance(getattr(module, "layer_idx", None), int) and hasattr(module, "is_causal")
    ]


def _own_paths(model: PreTrainedModel, layers: list[nn.Module]) -> dict[int, str]:
    """Layers that keep their own path; raises ``UnsupportedModelError`` if none is left."""
    name = type(model).__name__
    if reason := _refusal(model, layers):
        raise UnsupportedModelError(
            f"{name} cannot run a prefill method: {reason}; "
            "measure a decoder with full causal attention (Llama, Qwen, Mistral, Phi, GLM)"
        )
    own = {
        int(layer.layer_idx): reason  # type: ignore[arg-type]
        for layer in layers
        if (reason := _own_path(layer, model.config))
    }
    if len(own) == len(layers):
        raise UnsupportedModelError(
            f"every layer of {name} keeps its own attention: {next(iter(own.values()))}; "
            "measure a decoder with full causal attention (Llama, Qwen, Mistral, Phi, GLM)"
        )
    return own


def _refusal(model: PreTrainedModel, layers: list[nn.Module]) -> str | None:
    """Why no layer of this model can be served, if so."""
    config = model.config
    parts = [key for key in config.sub_configs if getattr(config, key, None) is not None]
    if parts:
        return f"it is composed of several models ({', '.join(parts)})"
    if not layers:
        return "it has no layer that uses transformers' attention interface"
    if model.training:
        return "it is in training mode (call model.eval())"
    if any(not layer.is_causal for layer in layers) or not getattr(config, "is_causal", True):
        return "its attention is bidirectional"
    if getattr(config, "kv_lora_rank", None) is not None:
        return (
            f"its attention is latent (MLA, kv_lora_rank {config.kv_lora_rank}): "
            "keys and values have different widths"
        )
    if (cap := getattr(config, "attn_logit_softcapping", None)) is not None:
        return f"its attention scores are soft-capped at {cap}"
    if any(hasattr(layer, "sinks") for layer in layers):
        return "its attention has learned sink logits"
    return None


def _own_path(layer: Any, config: Any) -> str | None:
    """Why this layer cannot run a prefill method, if so."""
    kinds = getattr(config, "layer_types", None)
    kind = kinds[layer.layer_idx] if kinds else "full_attention"
    if kind not in ("full_attention", "sliding_attention"):
        return kind.replace("_", " ")
    # Where the layer does not say, the model reads the window from its configuration.
    source = layer if hasattr(layer, "sliding_window") else config
    window = getattr(source, "sliding_window", None)
    if window is not None and window < config.max_position_embeddings:
        return f"sliding window of {window} tokens"
    return None


def _mask(
    *,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> Tensor | None:
    """No mask for plain causal attention, transformers' SDPA mask for anything else."""
    if attention_mask is not None and not bool(attention_mask.all()):
        lengths = attention_mask.sum(-1).tolist()
        raise UnsupportedCallError(
            f"the attention mask marks padding (real tokens per prompt: {lengths}); "
            "give every prompt of a batch the same length and no padding"
        )
    if local_size is None and int(q_offset) + q_length != kv_offset + kv_length:
        raise UnsupportedCallError(
            f"the cache holds {kv_offset + kv_length} positions for a sequence of "
            f"{int(q_offset) + q_length} tokens, as a static cache does; use DynamicCache"
        )
    if allow_is_causal_skip and (local_size is None or kv_offset + kv_length <= local_size):
        return None
    mask: Tensor | None = sdpa_mask(
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=allow_is_causal_skip,
        **kwargs,
    )
    return mask


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention interface of transformers: ``q [B, Hq, n_q, D]`` to ``[B, n_q, Hq, D]``."""
    state = _switched[module]
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    own_path = layer in state.dense_layers
    if own_path and attention_mask is not None:
        out, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **kwargs
        )
        return out, None
    _check_call(layer, query, key, value, attention_mask, dropout, kwargs)
    n_q, n_k = query.shape[2], key.shape[2]
    method = state.dense if own_path or n_q < n_k or n_k == 1 else state.method
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = method.attend(query, key, value, scale=scale, layer=layer)
    if out.shape != query.shape or out.dtype != query.dtype:
        raise UsageError(
            f"method {method.name!r} returned {_describe(out)} for queries {_describe(query)} in "
            f"layer {layer}; attend must return the shape and dtype of q"
        )
    return out.transpose(1, 2).contiguous(), None


def _check_call(
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float,
    kwargs: Mapping[str, Any],
) -> None:
    if attention_mask is not None:
        raise UnsupportedCallError(
            f"layer {layer} got an attention mask {tuple(attention_mask.shape)} that is not plain "
            "causal (packed sequences, a mask of the caller's, or a prompt longer than the "
            "layer's window); call the model with token ids of one sequence per row only"
        )
    if dropout:
        raise UnsupportedCallError(
            f"layer {layer} asks for attention dropout {dropout}; use eval mode"
        )
    if key.shape != value.shape or query.shape[-1] != key.shape[-1]:
        raise UnsupportedCallError(
            f"layer {layer} has queries {_describe(query)}, keys {_describe(key)} and values "
            f"{_describe(value)}; the methods need one head width and one key per value"
        )
    if query.shape[2] > key.shape[2]:
        raise UnsupportedCallError(
            f"layer {layer} has {query.shape[2]} queries for {key.shape[2]} keys; "
            "causal attention needs a key for every query"
        )
    if kwargs.get("is_causal") is False:
        raise UnsupportedCallError(
            f"layer {layer} was called with is_causal=False; prefill methods are causal"
        )
    for name in sorted(kwargs.keys() - _NO_EFFECT_ON_ATTENTION - {"is_causal"}):
        setting = kwargs[name]
        if setting is not None and setting is not False:
            shown = _describe(setting) if isinstance(setting, torch.Tensor) else repr(setting)
            raise UnsupportedCallError(
                f"layer {layer} passes {name}={shown}, which the prefill methods would ignore; "
                "call the model without it, or measure another model"
            )


def _describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
