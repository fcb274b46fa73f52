"""The arms of an audit: the methods asked for, what they are measured by, and their budgets."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from torch import Tensor

from minference_green.auditing.plan import DENSE
from minference_green.errors import UsageError
from minference_green.ledger import NOISE_FLOOR, Computed
from minference_green.methods.choose import method_from_name
from minference_green.methods.dense import Dense
from minference_green.methods.method import PrefillMethod
from minference_green.methods.patterns import (
    AShape,
    BlockSparse,
    HeadPattern,
    Probed,
    VerticalSlash,
)
from minference_green.methods.sparse import SparsePrefill
from minference_green.methods.yardstick import YARDSTICKS, TileYardstick, yardstick
from minference_green.model.loading import LoadedModel
from minference_green.worker import methods_by_name


@dataclass(frozen=True)
class EqualDensity:
    """A yardstick that takes over another arm's densities, once they are known."""

    name: str
    of: str
    """The arm whose densities it takes, head by head."""
    seed: int

    @property
    def parameters(self) -> Mapping[str, Any]:
        """In words, since the densities differ with the length."""
        drawn = {"seed": self.seed} if self.name == "random" else {}
        return {"density": f"that of {self.of}, head by head", **drawn}

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, layer: int) -> Tensor:  # noqa: ARG002
        """Not before :meth:`at` has made it what it is to be."""
        raise AssertionError(f"{self.name} has no densities yet")

    def at(self, computed: Mapping[str, Computed]) -> PrefillMethod:
        """The yardstick at the densities seen; raises ``UsageError`` if there are none."""
        found = computed.get(self.of)
        if found is None or not found.density_by_layer:
            raise UsageError(
                f"{self.name} takes its density from {self.of}, which did not tell any; give one "
                f"with --method-option {self.name}.density=0.1"
            )
        return yardstick(self.name, found.density_by_layer, self.seed)


def arms(
    asked: Sequence[str],
    options: Mapping[str, Mapping[str, str]],
    model: LoadedModel,
    *,
    budgets: Sequence[float],
    seed: int,
    own: Mapping[str, PrefillMethod] = MappingProxyType({}),
) -> dict[str, PrefillMethod]:
    """Every arm by its name: dense first, yardsticks behind the methods, the noise floor last.

    A yardstick without a density of its own takes that of the first sparse method. ``budgets``
    are multiples of each sparse method's own at which it runs as well. Names in ``own`` mean
    these objects. Raises ``UsageError`` for a method or option that does not exist, or a
    yardstick with nothing to be held against.
    """
    unsized = (n for n in asked if n in YARDSTICKS and "density" not in options.get(n, {}))
    equal = [n for n in unsized if n not in own]
    named = [name for name in asked if name not in equal and name not in own]
    made = methods_by_name(named, {n: o for n, o in options.items() if n not in equal}, model)
    # A name on the command line may be a path to a method that calls itself otherwise.
    methods = {**({DENSE: own[DENSE]} if DENSE in own else {}), **made, **own}
    found = with_budgets(methods, budgets)
    for name in equal:
        found[name] = EqualDensity(
            name, _measured_against(name, methods), _drawn_from(name, options.get(name, {}), seed)
        )
    return {**found, NOISE_FLOOR: noise_floor()}


def _drawn_from(name: str, options: Mapping[str, str], seed: int) -> int:
    """The seed among a yardstick's options, else the audit's; refuses what it does not take."""
    if name == "random":
        options = {"seed": str(seed), **options}
    made = method_from_name(name, {**options, "density": "1"})
    return made.seed if isinstance(made, TileYardstick) else seed


def _measured_against(name: str, methods: Mapping[str, PrefillMethod]) -> str:
    sparse = [n for n, m in methods.items() if not isinstance(m, Dense) and n not in YARDSTICKS]
    if not sparse:
        raise UsageError(
            f"{name} takes its density from a sparse method, and none is audited; add one, or "
            f"give --method-option {name}.density=0.1"
        )
    return sparse[0]


def noise_floor() -> SparsePrefill:
    """Every causal pair, through the kernels of the sparse methods: what it flips is rounding."""
    everything = AShape(n_init=0, n_local=2**31 - 1)
    return SparsePrefill(NOISE_FLOOR, everything, {"pairs": "all, by the sparse kernels"})


def with_budgets(
    methods: Mapping[str, PrefillMethod], budgets: Sequence[float]
) -> dict[str, PrefillMethod]:
    """Methods made of head patterns at each multiple of their budgets, others as they are."""
    found: dict[str, PrefillMethod] = {}
    for name, method in methods.items():
        if not budgets or not isinstance(method, SparsePrefill):
            found[name] = method
            continue
        for factor in sorted({1.0, *budgets}):
            if factor == 1.0:
                found[name] = method
            else:
                scaled = f"{name} x{factor:g}"
                found[scaled] = _scaled(method, scaled, factor)
    return found


def _scaled(method: SparsePrefill, name: str, factor: float) -> SparsePrefill:
    if isinstance(method.patterns, tuple):
        return replace(
            method,
            name=name,
            patterns=tuple(tuple(_times(p, factor) for p in layer) for layer in method.patterns),
            parameters={**method.parameters, "budgets": f"times {factor:g}"},
        )
    return replace(
        method,
        name=name,
        patterns=_times(method.patterns, factor),
        parameters={**method.parameters, "budgets": f"times {factor:g}"},
    )


def _times(pattern: HeadPattern, factor: float) -> HeadPattern:
    match pattern:
        case VerticalSlash(vertical, slash):
            return VerticalSlash(round(vertical * factor), round(slash * factor))
        case AShape(n_init, n_local):
            return AShape(n_init, max(1, round(n_local * factor)))
        case BlockSparse(top_k):
            return BlockSparse(max(1, round(top_k * factor)))
        case Probed(top_k, rows):
            return Probed(max(1, round(top_k * factor)), rows)
