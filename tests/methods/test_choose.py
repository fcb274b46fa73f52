"""From a name and options to a method; every wrong one is told what would be right."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from minference_green.errors import UsageError
from minference_green.methods.choose import NAMES, method_from_name
from minference_green.methods.dense import Dense
from minference_green.methods.estimator import Estimator
from minference_green.methods.method import PrefillMethod, ProfiledMethod
from minference_green.methods.patterns import AShape, BlockSparse, Probed, VerticalSlash
from minference_green.methods.sparse import SparsePrefill
from minference_green.methods.yardstick import YARDSTICKS, KeyOracle, TileYardstick


def patterns_of(method: PrefillMethod) -> Any:
    assert isinstance(method, SparsePrefill)
    return method.patterns


@pytest.mark.parametrize("name", NAMES)
def test_every_name_gives_a_profiled_method_whose_parameters_are_json(name: str) -> None:
    method = method_from_name(name, {"density": "0.25"} if name in YARDSTICKS else {})
    assert isinstance(method, ProfiledMethod)
    assert method.name == name
    assert json.loads(json.dumps(dict(method.parameters))) == method.parameters


def test_options_set_the_fields_of_the_pattern() -> None:
    options = {"vertical_size": "30", "slash_size": "800"}
    assert patterns_of(method_from_name("vertical-slash", options)) == VerticalSlash(30, 800)
    assert patterns_of(method_from_name("vertical-slash", {})) == VerticalSlash(1000, 6096)
    assert patterns_of(method_from_name("a-shape", {"n_local": "64"})) == AShape(128, 64)
    assert patterns_of(method_from_name("block-sparse", {"top_k": "7"})) == BlockSparse(7)
    assert method_from_name("dense", {"backend": "math"}) == Dense("math")
    assert method_from_name("dense", {}) == Dense(None)
    assert method_from_name("oracle", {"density": "0.5"}) == TileYardstick("oracle", 0.5)
    drawn = {"density": "0.5", "seed": "3"}
    assert method_from_name("random", drawn) == TileYardstick("random", 0.5, 3)
    assert method_from_name("oracle-keys", {"density": "1"}) == KeyOracle(1.0)


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("fast", {}, "'fast' is not a method; choose from dense, minference, auto, spread, p"),
        ("a-shape", {"top_k": "1"}, "no option 'top_k'; its options are n_init, n_local"),
        ("minference", {"file": "x"}, "no option 'file'; its options are pattern_file"),
        ("a-shape", {"n_init": "many"}, "n_init must be a whole number, got 'many'"),
        ("a-shape", {"n_init": "1.5"}, "n_init must be a whole number, got '1.5'"),
        ("a-shape", {"n_local": "0"}, "n_local must be at least 1"),
        ("dense", {"backend": "flesh"}, "'flesh' is not a dense backend"),
        ("oracle", {}, "oracle needs the option density=VALUE"),
        ("oracle", {"density": "0.1", "seed": "1"}, "no option 'seed'; its options are density"),
        ("random", {"density": "0"}, r"density must be above 0 and at most 1, got 0\.0"),
        ("oracle-keys", {"density": "1.5"}, r"above 0 and at most 1, got 1\.5"),
        ("spread", {"rows": "65"}, "rows must be between 1 and 64, got 65"),
        ("spread", {"rows": "0"}, "rows must be between 1 and 64, got 0"),
        ("spread", {"last": "0"}, "last must be between 1 and rows = 64, got 0"),
        ("spread", {"rows": "4"}, "last must be between 1 and rows = 4, got 8"),
        ("spread", {"normalise": "no"}, "normalise must be one of raw, tile, got 'no'"),
        (
            "spread",
            {"slash_size": "9", "pattern_file": "x"},
            "pattern_file or slash_size, not both",
        ),
        ("probe", {"rows": "0"}, "rows must be a whole number of at least 1, got 0"),
        ("probe", {"last": "0"}, "no option 'last'; its options are pattern_file, top_k, rows"),
        ("probe", {"top_k": "9", "pattern_file": "x"}, "pattern_file or top_k, not both"),
    ],
)
def test_what_is_wrong_is_told_with_what_is_valid(
    name: str, options: dict[str, str], match: str
) -> None:
    with pytest.raises(UsageError, match=match):
        method_from_name(name, options)


def test_minference_takes_the_file_before_the_models_own_patterns(tmp_path: Path) -> None:
    path = tmp_path / "patterns.json"
    path.write_text(json.dumps([{"0": ["stream_llm", 1, 2, 0.5]}]))
    own = ((BlockSparse(3), BlockSparse(3)), (AShape(), AShape()))

    from_file = method_from_name("minference", {"pattern_file": str(path)}, patterns=own)
    assert patterns_of(from_file) == ((AShape(1, 2),),)
    assert from_file.parameters["patterns"] == "file patterns.json"

    from_model = method_from_name("minference", {}, patterns=own)
    assert patterns_of(from_model) == own
    assert from_model.parameters["heads"] == {
        "BlockSparse(top_k=3)": 2,
        "AShape(n_init=128, n_local=3968)": 2,
    }
    assert from_model.parameters["sha256"] != from_file.parameters["sha256"]

    without = method_from_name("minference", {})
    assert patterns_of(without) == VerticalSlash(1000, 6096)


def test_spread_has_the_budgets_of_minference_and_rows_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "patterns.json"
    path.write_text(json.dumps([{"0": ["vertical_and_slash", 30, 80, 0.5]}]))
    own = ((VerticalSlash(1, 2), AShape()),)
    for options, patterns in (({}, None), ({}, own), ({"pattern_file": str(path)}, own)):
        spread = method_from_name("spread", options, patterns=patterns)
        assert patterns_of(spread) == patterns_of(
            method_from_name("minference", options, patterns=patterns)
        )
    sized: Any = method_from_name("spread", {"slash_size": "70", "rows": "32", "last": "16"})
    assert sized.patterns == VerticalSlash(1000, 70)
    assert sized.estimator == Estimator(rows=32, last=16, skip_forced=True)
    assert sized.parameters["rows"] == 32


def test_probe_takes_sizes_then_a_file_then_the_models_own_patterns(tmp_path: Path) -> None:
    path = tmp_path / "probe.json"
    path.write_text(json.dumps([{"0": ["probed", 8, 2, 0.5]}]))
    own = ((Probed(3, 4), AShape()),)

    def found(options: dict[str, str]) -> Any:
        theirs = ((BlockSparse(1), BlockSparse(1)),)
        return patterns_of(method_from_name("probe", options, patterns=theirs, probe_patterns=own))

    assert found({}) == own
    assert found({"pattern_file": str(path)}) == ((Probed(8, 2),),)
    assert found({"top_k": "5"}) == Probed(5, Probed().rows)
    assert patterns_of(method_from_name("probe", {})) == Probed()


@pytest.mark.parametrize("name", ["minference", "auto", "spread"])
def test_a_file_with_probed_heads_is_not_minferences(name: str, tmp_path: Path) -> None:
    path = tmp_path / "probe.json"
    path.write_text(json.dumps([{"0": ["probed", 8, 2, 0.5]}]))
    with pytest.raises(UsageError, match="probed heads, which MInference does not know; give it"):
        method_from_name(name, {"pattern_file": str(path)})


OWN = '''
from dataclasses import dataclass
from sibling import SCALE

@dataclass(frozen=True)
class Mine:
    """Averages the values and uses each type an option can have."""
    size: int
    share: float = 0.5
    loud: bool = False
    note: str = ""
    limit: int | None = None
    name = "mine"

    @property
    def parameters(self):
        return {"size": self.size}

    def attend(self, q, k, v, *, scale, layer):
        return v.mean(2, keepdim=True).expand_as(q) * SCALE

class Half:
    name = "half"
    parameters = {}

ready = Mine(3)
untyped = type("Untyped", (Mine,), {"__init__": lambda self, size="x": None})
'''


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A user's module in the current directory, in a package with a neighbour it imports."""
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "methods.py").write_text(OWN)
    (tmp_path / "ours" / "broken.py").write_text("import no_such_dependency\n")
    (tmp_path / "sibling.py").write_text("SCALE = 2.0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in ("ours", "ours.methods", "ours.broken", "sibling"):
        sys.modules.pop(name, None)


@pytest.mark.usefixtures("own_module")
def test_a_users_class_is_found_in_the_current_directory_and_made_with_the_options() -> None:
    options = {"size": "7", "share": "0.25", "loud": "true", "note": "a b", "limit": "9"}
    method: Any = method_from_name("ours.methods:Mine", options)
    assert isinstance(method, PrefillMethod)
    made = (method.size, method.share, method.loud, method.note, method.limit)
    assert made == (7, 0.25, True, "a b", 9)
    x = torch.ones(1, 1, 4, 2)
    assert torch.equal(method.attend(x, x, x, scale=1.0, layer=0), 2 * x)


@pytest.mark.usefixtures("own_module")
def test_a_users_object_is_taken_as_it_is() -> None:
    method: Any = method_from_name("ours.methods:ready", {})
    assert method.size == 3
    with pytest.raises(
        UsageError, match=r"is an object, not a class, and takes no options: .*size"
    ):
        method_from_name("ours.methods:ready", {"size": "3"})


@pytest.mark.usefixtures("own_module")
@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("nowhere:Mine", {}, "cannot import 'nowhere'.*No module named 'nowhere'"),
        ("ours.broken:Mine", {}, "cannot import 'ours.broken'.*'no_such_dependency'"),
        ("ours.methods:Yours", {}, "'ours.methods' has no 'Yours'"),
        ("ours.methods:Half", {}, "ours.methods:Half is not a prefill method: it has no 'attend'"),
        ("ours.methods:SCALE", {}, "it has no 'name'"),
        ("ours.methods:Mine", {}, "needs the option size=VALUE"),
        (
            "ours.methods:Mine",
            {"size": "1", "big": "2"},
            "no option 'big'; its options are size, s",
        ),
        (
            "ours.methods:Mine",
            {"size": "1", "loud": "yes"},
            "loud must be true or false, got 'yes'",
        ),
        ("ours.methods:Mine", {"size": "1", "share": "x"}, "share must be a number, got 'x'"),
        ("ours.methods:Half", {"size": "1"}, "has no option 'size'; it has none"),
        (":Mine", {}, "write package.module:NAME"),
        ("ours.methods:", {}, "write package.module:NAME"),
    ],
)
def test_a_users_method_that_cannot_be_used_is_refused_with_the_reason(
    name: str, options: dict[str, str], match: str
) -> None:
    with pytest.raises(UsageError, match=match):
        method_from_name(name, options)
