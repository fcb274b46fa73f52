"""Greedy decode as a server does it: the GPU is not kept waiting for Python between kernels.

A step of one token asks a GPU for some milliseconds of work, and Python takes several times as
long to say so. A server therefore captures its steps once, as CUDA graphs, and replays them. For
that nothing may move: keys and values lie in buffers with room for the tokens to come, and each
step reads the token where the step before it has written it::

    prefill        keys, values of 0 .. N - 1     logits -> tokens[0]
    step i         keys, values of N + i          tokens[i] -> tokens[i + 1]

A step has a graph of its own, because attention's length is one of its constants. On a CPU, and
for a model whose code cannot be captured, the same steps run eagerly.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from minference_green.methods.backend import synchronize
from minference_green.model.attention import UnsupportedModelError


class RoomyLayer(DynamicLayer):
    """Keys and values of one layer in buffers ``[B, H, room, D]`` that are allocated once.

    What it gives to attention is views of the exact length, as a ``DynamicLayer`` gives tensors
    of the exact length. With a ``window`` attention gets the positions that a
    ``DynamicSlidingWindowLayer`` would have kept; all of them stay in memory.
    """

    def __init__(self, room: int, window: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.room, self.window = room, window
        self.is_sliding = window is not None
        self._buffers: tuple[Tensor, ...] = ()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the buffers, of the shape and dtype of these states; they hold nothing yet."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self._buffers = tuple(
            x.new_empty((*x.shape[:2], self.room, x.shape[3])) for x in (key_states, value_states)
        )
        self.is_initialized = True
        self.keep(0)

    def keep(self, length: int) -> None:
        """Hold the first ``length`` positions of the buffers."""
        if self.is_initialized:
            self.keys, self.values = (x[:, :, :length] for x in self._buffers)

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        *args: Any,  # noqa: ARG002
        **kwargs: Any,  # noqa: ARG002
    ) -> tuple[Tensor, Tensor]:
        """Write ``[B, H, n, D]`` behind what is held; returns views of what attention is to see.

        Raises ``ValueError`` if there is no room.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        held, new = self.get_seq_length(), key_states.shape[-2]
        if held + new > self.room:
            raise ValueError(
                f"a cache with room for {self.room} positions holds {held}, {new} more do not fit"
            )
        first, end = self._first_seen(held), held + new
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, held:end] = states
        self.keep(end)
        keys, values = (buffer[:, :, first:end] for buffer in self._buffers)
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of keys that attention will see, and the position of the first."""
        held = self.get_seq_length()
        first = self._first_seen(held)
        return held + query_length - first, first

    def _first_seen(self, held: int) -> int:
        return 0 if self.window is None else max(0, held - self.window + 1)


class RoomyCache(Cache):
    """A model's cache with room for a number of positions, in memory that stays where it is."""

    def __init__(self, model: PreTrainedModel, room: int) -> None:
        stock = DynamicCache(config=model.config).layers
        self._roomy = [_roomy(type(model).__name__, layer, room) for layer in stock]
        super().__init__(layers=list(self._roomy))

    def keep(self, length: int) -> None:
        """Hold the first ``length`` positions; what is written next comes behind them."""
        for layer in self._roomy:
            layer.keep(length)


def check_cache(model: PreTrainedModel) -> None:
    """Raise ``UnsupportedModelError`` if the model's cache keeps more than keys and values.

    What tokens have left in a recurrent state cannot be taken out of it again.
    """
    for layer in DynamicCache(config=model.config).layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise UnsupportedModelError(
                f"{type(model).__name__} keeps a {type(layer).__name__} in its cache, from which "
                "a question cannot be taken back; audit a model with attention in every layer"
            )


def _roomy(model: str, layer: Any, room: int) -> RoomyLayer:
    # By exact type: subclasses keep more than keys and values.
    if type(layer) is DynamicLayer:
        return RoomyLayer(room)
    if type(layer) is DynamicSlidingWindowLayer:
        return RoomyLayer(room, layer.sliding_window)
    raise UnsupportedModelError(
        f"{model} keeps a {type(layer).__name__} in its cache, which is not keys and values "
        "alone; measure its prefill, without --decode"
    )


class Decoder:
    """Greedy decode of ``tokens`` tokens after prompts ``[batch, length]`` of one length.

    Attention is the model's own or what it is switched to at the time of each call; graphs keep
    what it was switched to when they were captured. To be used in inference mode.
    """

    def __init__(self, model: PreTrainedModel, *, batch: int, length: int, tokens: int) -> None:
        self.model, self.length = model, length
        # The last token is produced and not read.
        self.cache = RoomyCache(model, length + tokens - 1)
        self.tokens = torch.zeros(tokens, batch, 1, dtype=torch.int64, device=model.device)
        """What was generated; the first of them by the prefill."""
        self._graphs: list[torch.cuda.CUDAGraph] = []

    def emptied(self) -> Cache:
        """The cache, for the next prefill to fill."""
        self.cache.keep(0)
        return self.cache

    def begin(self, logits: Tensor) -> None:
        """Note the first token, from a prefill's last logits ``[batch, 1, vocabulary]``."""
        self.tokens[0] = logits.argmax(-1)

    def generate(self) -> None:
        """Tokens after the first, each finished before the next is begun, as a server does.

        Without the wait the host would prepare a good part of a request's decode while the GPU
        still prefills: a request would be shorter than its parts. Begins at the prompt's end,
        as often as it is called.
        """
        for i in range(len(self.tokens) - 1):
            synchronize(self.tokens.device)
            if self._graphs:
                self._graphs[i].replay()
            else:
                self._step(i)

    def capture(self) -> str | None:
        """Capture every step as a CUDA graph, if on a GPU; to be called after a prefill.

        Returns the reason if the model's code cannot be captured, and decode stays eager.
        """
        if self.tokens.device.type != "cuda":
            return None
        steps = range(len(self.tokens) - 1)
        stream = torch.cuda.Stream(self.tokens.device)
        stream.wait_stream(torch.cuda.current_stream(self.tokens.device))
        # One pool: no graph leaves anything in it that another reads.
        pool = torch.cuda.graph_pool_handle()
        graphs: list[torch.cuda.CUDAGraph] = []
        try:
            with torch.cuda.stream(stream):
                # What is done once is done now: libraries' handles, workspaces, lazy loading.
                self._step(steps[0])
                # Code that waits for the GPU would break a capture off; here it is told cleanly.
                with _waiting_is_an_error():
                    self._step(steps[-1])
                for i in steps:
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph, pool=pool, stream=stream):
                        self._step(i)
                    graphs.append(graph)
        except RuntimeError as error:
            return str(error).strip().splitlines()[0]
        torch.cuda.current_stream(self.tokens.device).wait_stream(stream)
        self._graphs = graphs
        return None

    def _step(self, i: int) -> None:
        self.cache.keep(self.length + i)
        out = self.model(
            input_ids=self.tokens[i],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.tokens[i + 1] = out.logits.argmax(-1)


@contextmanager
def _waiting_is_an_error() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
