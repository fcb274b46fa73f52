"""What a prefill method is, and what it may tell about its work."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from minference_green.corpus.records import Haystack
from minference_green.kernels.index import Index


@runtime_checkable
class PrefillMethod(Protocol):
    """Attention of a whole prompt, dense or not. Anything with these three members is one.

    ``parameters`` is what a report must show to make the method repeatable.
    """

    @property
    def name(self) -> str:
        """One word, shown in reports."""

    @property
    def parameters(self) -> Mapping[str, Any]:
        """JSON-able settings."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, layer: int) -> Tensor:
        """Causal attention of a prompt without padding.

        Shapes: ``q [B, Hq, N, D]``, ``k, v [B, Hkv, N, D]`` with ``Hq`` a multiple of
        ``Hkv``; returns ``[B, Hq, N, D]``.
        """


@dataclass(frozen=True)
class LayerProfile:
    """What one call of a method did; seconds are of synchronised, separately timed steps."""

    out: Tensor
    density: Tensor
    """Visible over causal pairs per query head, float64 ``[Hq]`` on the CPU, mean over batch."""
    estimate_seconds: float
    index_seconds: float
    attend_seconds: float
    lse: Tensor | None = None
    """Log-sum-exp of each row's scores over the pairs attended to, ``[B, Hq, N]``; what a row
    kept of its attention follows from it. ``None`` if the method does not tell."""
    indices: tuple[Index, ...] = ()
    """The pairs, every query head in one index; empty if the method has none to show."""


@runtime_checkable
class ProfiledMethod(PrefillMethod, Protocol):
    """A method that also tells how much it computed and where its time went."""

    def profile(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, layer: int) -> LayerProfile:
        """As :meth:`PrefillMethod.attend`, slower, with the account of the work done."""


Parts = Mapping[str, Callable[[], object]]
"""Names of a method's steps to calls that repeat each alone."""


@runtime_checkable
class PartedMethod(PrefillMethod, Protocol):
    """A method whose steps can be repeated apart, to see what each costs."""

    def parts(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, layer: int) -> Parts:
        """The steps of one call of ``attend``, each fed with what the step before it found."""


TokenSpans = Callable[[int, int], tuple[int, int]]
"""From bytes ``[start, end)`` of a text to the tokens ``[first, last)`` of the prompt that hold
them."""


@runtime_checkable
class SeeingMethod(PrefillMethod, Protocol):
    """A method that wants to know what it prefills: a yardstick, or one broken on purpose."""

    def see(self, haystack: Haystack, spans: TokenSpans) -> None:
        """Called by an audit before each prefill; what it costs counts as the prefill's."""
