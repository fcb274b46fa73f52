"""Dense or sparse, layer by layer and length by length, whichever is predicted to be faster.

Decided before anything is estimated: from the length, the heads' budgets and the density that
each head was seen to have at this length, by a law of this device (see ``law``). A layer that
runs dense is the dense path itself; nothing of the sparse method runs in it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from minference_green.errors import UsageError
from minference_green.methods.dense import Dense
from minference_green.methods.law import Law, Prediction, law_for
from minference_green.methods.method import LayerProfile, Parts
from minference_green.methods.sparse import SparsePrefill


@dataclass(frozen=True)
class Choice:
    """What is predicted for one layer at one length."""

    density: float
    """Mean over heads of visible over causal pairs, as seen."""
    prediction: Prediction

    @property
    def sparse(self) -> bool:
        """Whether the layer runs sparse: only where it wins by more than the law may be wrong."""
        found = self.prediction
        return found.sparse_seconds + found.doubt_seconds < found.dense_seconds


@dataclass(frozen=True)
class Auto:
    """A prefill method that runs ``sparse`` only in layers where that pays.

    ``choices`` holds what was decided, by tokens and layer; :class:`Deciding` finds it. Another
    length does as the longest decided one that is not longer, since density falls with length,
    and runs dense below all of them.
    """

    sparse: SparsePrefill
    law_file: Path | None = None
    dense: Dense = field(default_factory=Dense)
    choices: Mapping[tuple[int, int], Choice] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """One word, shown in reports."""
        return "auto"

    @property
    def parameters(self) -> Mapping[str, Any]:
        """The sparse method's, and which law decides."""
        law = "of the device" if self.law_file is None else self.law_file.name
        return {"sparse": self.sparse.name, **self.sparse.parameters, "law": law}

    def decided(self, dense: Dense, choices: Mapping[tuple[int, int], Choice]) -> "Auto":
        """The same method with its choices made and ``dense`` as its dense path."""
        return replace(self, dense=dense, choices=dict(choices))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, layer: int) -> Tensor:
        """As :meth:`PrefillMethod.attend`, dense or sparse as chosen for this layer and length.

        Raises ``UsageError`` if nothing was decided at all.
        """
        return self._chosen(q, layer).attend(q, k, v, scale=scale, layer=layer)

    def profile(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, layer: int) -> LayerProfile:
        """As :meth:`attend`, with the account of the work done."""
        return self._chosen(q, layer).profile(q, k, v, scale=scale, layer=layer)

    def parts(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, layer: int) -> Parts:
        """See :class:`methods.method.PartedMethod`; a dense layer is attention alone."""
        chosen = self._chosen(q, layer)
        if isinstance(chosen, SparsePrefill):
            return chosen.parts(q, k, v, scale=scale, layer=layer)
        return {"attention": lambda: chosen.attend(q, k, v, scale=scale, layer=layer)}

    def _chosen(self, q: Tensor, layer: int) -> Dense | SparsePrefill:
        if not self.choices:
            raise UsageError(
                "auto has decided nothing yet; prefill once with methods.auto.Deciding and give "
                "its choices to Auto.decided"
            )
        known = [n for n, of_layer in self.choices if of_layer == layer and n <= q.shape[2]]
        runs_sparse = bool(known) and self.choices[max(known), layer].sparse
        return self.sparse if runs_sparse else self.dense


class Deciding:
    """A prefill that runs sparse everywhere and decides, from what it sees, for the next ones."""

    def __init__(self, auto: Auto) -> None:
        self._auto = auto
        self.name, self.parameters = auto.name, auto.parameters
        self.law: Law | None = None
        self.choices: dict[tuple[int, int], Choice] = {}

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, layer: int) -> Tensor:
        """Sparse attention; notes the choice for this layer and length.

        Raises ``UsageError`` if there is no law for the device or the head width.
        """
        if self.law is None:
            self.law = law_for(q.device, self._auto.law_file)
        account = self._auto.sparse.profile(q, k, v, scale=scale, layer=layer)
        density: Sequence[float] = account.density.tolist()
        batch, heads, n, head_dim = q.shape
        patterns = self._auto.sparse.head_patterns(layer, heads)
        self.choices[n, layer] = Choice(
            density=sum(density) / heads,
            prediction=self.law.predict(
                head_dim, [patterns[h] for h in range(heads)], density, batch=batch, n=n
            ),
        )
        return account.out
