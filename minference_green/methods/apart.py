"""Several questions over one cache in one pass, none of which sees another.

A question is some tens of tokens, and most of what it costs alone is not its own: the weights
are read once more, and the cache is copied to grow it. In one pass both are paid once::

    cache  | question 1 | question 2 | question 3
    keys 0 .. N-1, then each question's own, at positions from N on
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor

from minference_green.kernels import cpu
from minference_green.methods.dense import Dense


@dataclass(frozen=True)
class Apart:
    """Dense attention of stretches of tokens, each over the cache and itself alone."""

    lengths: tuple[int, ...]
    """Tokens of each stretch."""

    name: ClassVar[str] = "dense"
    parameters: ClassVar[Mapping[str, Any]] = MappingProxyType({})

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, layer: int) -> Tensor:  # noqa: ARG002
        """Shapes as :meth:`Dense.attend`, ``n_q`` the sum of ``lengths``.

        The stretches' own keys and values may be overwritten: see :func:`in_turn`.
        """
        if q.device.type == "cpu":
            return cpu.stretches_attention(q, k, v, self.lengths, scale=scale)
        return in_turn(q, k, v, self.lengths, scale=scale)


def in_turn(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], *, scale: float) -> Tensor:
    """As :func:`minference_green.kernels.cpu.stretches_attention`, by dense continuations.

    Keys and values of each stretch are moved next to the cache when its turn comes, over those
    of others, so that the cache itself is copied for none of them.
    """
    held = k.shape[2] - sum(lengths)
    keys, values = (x[:, :, held:].clone().split(lengths, 2) for x in (k, v))
    out = []
    for queries, *own in zip(q.split(lengths, 2), keys, values, strict=True):
        end = held + queries.shape[2]
        for x, new in zip((k, v), own, strict=True):
            x[:, :, held:end] = new
        out.append(Dense().attend(queries, k[:, :, :end], v[:, :, :end], scale=scale, layer=0))
    return torch.cat(out, 2)
