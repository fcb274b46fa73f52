"""One arm at one context length, run as often as a window needs."""

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from minference_green.methods.backend import synchronize
from minference_green.methods.dense import Dense
from minference_green.methods.method import PrefillMethod
from minference_green.model.attention import switched
from minference_green.model.decode import Decoder
from minference_green.model.loading import LoadedModel


class Interval(NamedTuple):
    """One timed stretch of repeated work."""

    start: float
    """Monotonic clock, as ``end``."""
    end: float
    device_seconds: float | None
    """The same stretch by device events; null on a CPU."""
    repeats: int

    @property
    def seconds_each(self) -> float:
        """Mean seconds of one repeat."""
        return (self.end - self.start) / self.repeats


class Cell:
    """One arm at one context length, ready to prefill."""

    def __init__(
        self, model: LoadedModel, method: PrefillMethod, dense: Dense, ids: Tensor
    ) -> None:
        self.model, self.method, self.dense, self.ids = model, method, dense, ids
        self.decoder: Decoder | None = None
        """Holds what prefill leaves for decode; without one each prefill has a cache of its own."""
        self.seconds = 0.0
        self.decode_seconds = 0.0

    @torch.inference_mode()
    def prefill(self, keep: int | Tensor = 1) -> Tensor:
        """Logits ``[B, kept, vocabulary]`` of one prefill that fills an empty cache."""
        with switched(self.model.model, self.method, dense=self.dense):
            return self._forward(keep)

    def _forward(self, keep: int | Tensor = 1) -> Tensor:
        cache = self.decoder.emptied() if self.decoder else None
        out = self.model.model(
            input_ids=self.ids, past_key_values=cache, use_cache=True, logits_to_keep=keep
        )
        logits: Tensor = out.logits
        return logits

    @torch.inference_mode()
    def repeat(self, times: int, least_seconds: float = 0.0) -> Interval:
        """Prefill ``times`` times; on a CPU also until ``least_seconds`` have passed."""
        with switched(self.model.model, self.method, dense=self.dense):
            return self._timed(times, least_seconds, self._forward)

    @torch.inference_mode()
    def capture(self) -> str | None:
        """Prefill, and capture the decoder's steps; why not, if the model's code refuses."""
        with switched(self.model.model, self.method, dense=self.dense):
            return self._prefilled().capture()

    @torch.inference_mode()
    def decode(
        self, times: int, ready: Callable[[], object], least_seconds: float = 0.0
    ) -> Interval:
        """Generate the decoder's tokens greedily over one prompt's cache, ``times`` times.

        The prefill, which produces the first of them, is done before ``ready`` is called, and
        the interval begins after it. Each repeat begins again at the prompt's end. Attention is
        dense over the cache that the method's prefill left.
        """
        with switched(self.model.model, self.method, dense=self.dense):
            decoder = self._prefilled()
            synchronize(self.ids.device)
            ready()
            return self._timed(times, least_seconds, decoder.generate)

    @torch.inference_mode()
    def request(self, times: int, least_seconds: float = 0.0) -> Interval:
        """Prefill and generate the decoder's tokens, ``times`` times."""
        with switched(self.model.model, self.method, dense=self.dense):
            return self._timed(times, least_seconds, lambda: self._prefilled().generate())

    def _prefilled(self) -> Decoder:
        """The decoder after one prefill."""
        assert self.decoder is not None, "a cell decodes with a decoder"
        self.decoder.begin(self._forward())
        return self.decoder

    @torch.inference_mode()
    def repeat_step(
        self, times: int, step: Callable[[], object], least_seconds: float = 0.0
    ) -> Interval:
        """Repeat anything on the model's device."""
        return self._timed(times, least_seconds, step)

    def _timed(self, times: int, least_seconds: float, step: Callable[[], object]) -> Interval:
        synchronize(self.ids.device)
        marks = _events(self.ids.device)
        start = time.monotonic()
        if marks:
            marks[0].record()
        # A GPU's clock would have to be waited for; its times are steady enough to plan by.
        until = start + (0.0 if marks else least_seconds)
        repeats = 0
        while repeats < times or time.monotonic() < until:
            step()
            repeats += 1
        if marks:
            marks[1].record()
        synchronize(self.ids.device)
        end = time.monotonic()
        device_seconds = marks[0].elapsed_time(marks[1]) / 1e3 if marks else None
        return Interval(start, end, device_seconds, repeats)


def _events(device: torch.device) -> tuple[torch.cuda.Event, torch.cuda.Event] | None:
    if device.type != "cuda":
        return None
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)


def repeats_for(window_seconds: float, seconds: float) -> int:
    """How often to repeat what takes ``seconds``, so that a window is filled."""
    # A twentieth more than asked, so that a slightly faster repeat is not a short window.
    return max(1, math.ceil(1.05 * window_seconds / seconds))
