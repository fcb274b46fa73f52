"""Several questions over one cache in one pass on a CPU, none of which sees another.

A question is some tens of tokens, and most of what it costs alone is not its own: the weights
are read once more, and the cache is copied to grow it. In one pass both are paid once::

    cache  | question 1 | question 2 | question 3
    keys 0 .. N-1, then each question's own, at positions from N on
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

from torch import Tensor

from minference_green.kernels.cpu import stretches_attention


@dataclass(frozen=True)
class Apart:
    """Dense attention of stretches of tokens, each over the cache and itself alone."""

    lengths: tuple[int, ...]
    """Tokens of each stretch."""

    name: ClassVar[str] = "dense"
    parameters: ClassVar[Mapping[str, Any]] = MappingProxyType({})

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, layer: int) -> Tensor:  # noqa: ARG002
        """Shapes as :meth:`Dense.attend`, ``n_q`` the sum of ``lengths``."""
        return stretches_attention(q, k, v, self.lengths, scale=scale)
