"""From a name on the command line to a method, the user's own included."""

import hashlib
import importlib
import inspect
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar, get_args

from minference_green.errors import UsageError
from minference_green.methods.auto import Auto
from minference_green.methods.dense import Dense, DenseAgain
from minference_green.methods.estimator import Estimator
from minference_green.methods.method import PrefillMethod
from minference_green.methods.official import read_patterns
from minference_green.methods.patterns import (
    AShape,
    BlockSparse,
    HeadPattern,
    Patterns,
    Probed,
    VerticalSlash,
)
from minference_green.methods.sparse import SparsePrefill, uniform
from minference_green.methods.yardstick import YARDSTICKS, yardstick

T = TypeVar("T")

UNIFORM: dict[str, Callable[..., HeadPattern]] = {
    "vertical-slash": VerticalSlash,
    "a-shape": AShape,
    "block-sparse": BlockSparse,
}
"""Methods that give every head one pattern; the pattern's fields are the options."""

NAMES = ("dense", "minference", "auto", "spread", "probe", *UNIFORM, "dense-again", *YARDSTICKS)
"""Methods that come with the package."""


def method_from_name(
    name: str,
    options: Mapping[str, str],
    *,
    patterns: Patterns | None = None,
    probe_patterns: Patterns | None = None,
) -> PrefillMethod:
    """The method called ``name`` with ``options``, or the user's own from ``module:NAME``.

    ``patterns`` are the model's own; ``minference``, ``auto`` and ``spread`` use them unless
    ``pattern_file`` names others, and without either MInference's default for every head.
    ``probe_patterns`` are the same for ``probe``, which else probes every head alike. A user's
    module is also looked for in the current directory. Raises ``UsageError`` naming
    what is valid.
    """
    if ":" in name:
        return _user_method(name, options)
    if name == "dense":
        return _build(Dense, options, name)
    if name == "dense-again":
        return _build(DenseAgain, options, name)
    if name == "minference":

        def minference(pattern_file: str | None = None) -> SparsePrefill:
            return _minference(pattern_file, patterns)

        return _build(minference, options, name)
    if name == "auto":

        def auto(pattern_file: str | None = None, law: str | None = None) -> Auto:
            sparse = _minference(pattern_file, patterns)
            return Auto(sparse, None if law is None else Path(law))

        return _build(auto, options, name)
    if name == "spread":

        def spread(
            pattern_file: str | None = None,
            vertical_size: int | None = None,
            slash_size: int | None = None,
            rows: int = 64,
            last: int = 8,
            segments: int = 1,
            normalise: str = "raw",
        ) -> SparsePrefill:
            sizes = {"vertical_size": vertical_size, "slash_size": slash_size}
            given = {key: size for key, size in sizes.items() if size is not None}
            if given and pattern_file is not None:
                raise UsageError(f"spread takes a pattern_file or {', '.join(given)}, not both")
            budgets = uniform(name, VerticalSlash(**given)) if given else None
            budgets = budgets or _minference(pattern_file, patterns)
            return _spread(budgets, Estimator(rows, last, segments, normalise, skip_forced=True))

        return _build(spread, options, name)
    if name == "probe":

        def probe(
            pattern_file: str | None = None, top_k: int | None = None, rows: int | None = None
        ) -> SparsePrefill:
            sizes = {"top_k": top_k, "rows": rows}
            given = {key: size for key, size in sizes.items() if size is not None}
            return _probe(given, pattern_file, probe_patterns)

        return _build(probe, options, name)
    if name in YARDSTICKS:

        def drawn(density: float, seed: int = 0) -> PrefillMethod:
            return yardstick(name, density, seed)

        def best(density: float) -> PrefillMethod:
            return yardstick(name, density)

        return _build(drawn if name == "random" else best, options, name)
    if name in UNIFORM:
        return uniform(name, _build(UNIFORM[name], options, name))
    raise UsageError(
        f"{name!r} is not a method; choose from {', '.join(NAMES)}, "
        "or name your own as package.module:NAME"
    )


def _minference(pattern_file: str | None, own: Patterns | None) -> SparsePrefill:
    if pattern_file is None and own is None:
        default = VerticalSlash()
        told = {"patterns": f"MInference's default for every head: {default}"}
        return SparsePrefill("minference", default, told)
    source, chosen = _per_head(pattern_file, own)
    if any(isinstance(pattern, Probed) for layer in chosen for pattern in layer):
        raise UsageError(
            f"{pattern_file} has probed heads, which MInference does not know; give it to probe"
        )
    return SparsePrefill("minference", chosen, _parameters(source, chosen))


def _probe(
    budgets: dict[str, int], pattern_file: str | None, own: Patterns | None
) -> SparsePrefill:
    if budgets and pattern_file is not None:
        raise UsageError(f"probe takes a pattern_file or {', '.join(budgets)}, not both")
    if budgets or (pattern_file is None and own is None):
        return uniform("probe", Probed(**budgets))
    source, chosen = _per_head(pattern_file, own)
    return SparsePrefill("probe", chosen, _parameters(source, chosen))


def _per_head(pattern_file: str | None, own: Patterns | None) -> tuple[str, Patterns]:
    """Patterns and where they are from: the file, or else the model's own; one is given."""
    if pattern_file is None:
        assert own is not None
        return "the model's own", own
    path = Path(pattern_file)
    return f"file {path.name}", read_patterns(path).patterns


def _spread(budgets: SparsePrefill, estimator: Estimator) -> SparsePrefill:
    """The same budgets, head by head, filled from rows all over the prompt."""
    parameters = {**budgets.parameters, **asdict(estimator)}
    return replace(budgets, name="spread", parameters=parameters, estimator=estimator)


def _parameters(source: str, patterns: Patterns) -> dict[str, Any]:
    """What a report shows of per-head patterns: where from, how many of each, and their hash."""
    counts = Counter(str(pattern) for layer in patterns for pattern in layer)
    return {
        "patterns": source,
        "heads": dict(counts.most_common()),
        "sha256": hashlib.sha256(repr(patterns).encode()).hexdigest()[:16],
    }


def _user_method(name: str, options: Mapping[str, str]) -> PrefillMethod:
    """Import ``module:NAME``; a class is made with the options, an object is taken as it is."""
    module_name, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), attribute)):
        raise UsageError(f"{name!r} does not name a method; write package.module:NAME")
    if sys.path[:1] != [here := str(Path.cwd())]:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UsageError(f"cannot import {module_name!r} for the method {name}: {error}") from error
    if not hasattr(module, attribute):
        raise UsageError(f"the module {module_name!r} has no {attribute!r}")
    found = getattr(module, attribute)
    if isinstance(found, type):
        found = _build(found, options, name)
    elif options:
        raise UsageError(f"{name} is an object, not a class, and takes no options: {dict(options)}")
    for member in ("name", "parameters", "attend"):
        if not hasattr(found, member):
            raise UsageError(f"{name} is not a prefill method: it has no {member!r}")
    method: PrefillMethod = found
    return method


def _build(target: Callable[..., T], options: Mapping[str, str], name: str) -> T:
    """Call ``target`` with ``options`` read as its annotations say."""
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(target, eval_str=True).parameters
    takes = {key: parameter for key, parameter in parameters.items() if parameter.kind in by_name}
    for key in options:
        if key not in takes:
            valid = f"its options are {', '.join(takes)}" if takes else "it has none"
            raise UsageError(f"{name} has no option {key!r}; {valid}")
    for key, parameter in takes.items():
        if parameter.default is inspect.Parameter.empty and key not in options:
            raise UsageError(f"{name} needs the option {key}=VALUE")
    return target(**{key: _read(name, takes[key], text) for key, text in options.items()})


def _read(name: str, parameter: inspect.Parameter, text: str) -> Any:
    annotation = parameter.annotation
    # "int | None" is read as int.
    wanted = next((t for t in get_args(annotation) if t is not type(None)), annotation)
    truth = {"true": True, "false": False}
    try:
        if wanted is bool:
            return truth[text.lower()]
        if wanted in (int, float):
            return wanted(text)
    except (ValueError, KeyError) as error:
        kinds = {bool: "true or false", int: "a whole number", float: "a number"}
        raise UsageError(
            f"{name}: {parameter.name} must be {kinds[wanted]}, got {text!r}"
        ) from error
    return text
