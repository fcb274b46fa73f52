"""auto: dense where dense is predicted faster, the sparse method where that is, decided before."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minference_green.errors import UsageError
from minference_green.methods.auto import Auto, Choice, Deciding
from minference_green.methods.choose import method_from_name
from minference_green.methods.dense import Dense
from minference_green.methods.law import Prediction
from minference_green.methods.method import (
    LayerProfile,
    PartedMethod,
    PrefillMethod,
    ProfiledMethod,
)
from minference_green.methods.patterns import AShape, BlockSparse, VerticalSlash
from minference_green.methods.sparse import SparsePrefill, uniform

SCALE = 0.125
PATTERN = AShape(n_init=1, n_local=32)


def inputs(n: int, head_dim: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(n)
    q = torch.randn(1, 4, n, head_dim, generator=draw)
    k, v = (torch.randn(1, 2, n, head_dim, generator=draw) for _ in range(2))
    return q, k, v


def choice(dense: float, sparse: float, doubt: float = 0.0) -> Choice:
    return Choice(density=0.5, prediction=Prediction(dense, sparse, doubt))


def auto(**choices: float) -> Auto:
    """Layers ``l0``, ``l1``... at 200 tokens, by predicted seconds of sparse over dense."""
    made = {(200, int(name[1:])): choice(1.0, ratio) for name, ratio in choices.items()}
    return Auto(uniform("a-shape", PATTERN)).decided(Dense("math"), made)


class Untouchable(SparsePrefill):
    """A sparse method that must not be asked for anything."""

    def attend(self, *args: Any, **more: Any) -> Tensor:
        raise AssertionError("the sparse method ran in a dense layer")

    def profile(self, *args: Any, **more: Any) -> LayerProfile:
        raise AssertionError("the sparse method was profiled in a dense layer")


def test_auto_is_a_method_whose_steps_can_be_told_apart() -> None:
    method = auto(l0=0.5)
    for kind in (PrefillMethod, ProfiledMethod, PartedMethod):
        assert isinstance(method, kind)
    assert method.name == "auto"
    assert method.parameters == {
        "sparse": "a-shape",
        "n_init": 1,
        "n_local": 32,
        "law": "of the device",
    }


def test_each_layer_runs_what_was_chosen_for_it() -> None:
    method, (q, k, v) = auto(l0=2.0, l1=0.5), inputs(200)
    dense = Dense("math").attend(q, k, v, scale=SCALE, layer=0)
    sparse = uniform("a-shape", PATTERN).attend(q, k, v, scale=SCALE, layer=0)
    assert torch.equal(method.attend(q, k, v, scale=SCALE, layer=0), dense)
    assert torch.equal(method.attend(q, k, v, scale=SCALE, layer=1), sparse)
    assert not torch.allclose(dense, sparse)
    profiles = [method.profile(q, k, v, scale=SCALE, layer=n) for n in (0, 1)]
    assert profiles[0].density.tolist() == [1.0] * 4
    assert profiles[0].estimate_seconds == 0
    assert max(profiles[1].density.tolist()) < 1
    assert set(method.parts(q, k, v, scale=SCALE, layer=0)) == {"attention"}
    assert set(method.parts(q, k, v, scale=SCALE, layer=1)) == {"estimate", "index", "attention"}


def test_a_dense_layer_never_reaches_the_sparse_method() -> None:
    untouchable = Untouchable("untouchable", PATTERN, {})
    method, (q, k, v) = replace(auto(l0=2.0), sparse=untouchable), inputs(200)
    method.attend(q, k, v, scale=SCALE, layer=0)
    method.profile(q, k, v, scale=SCALE, layer=0)
    method.parts(q, k, v, scale=SCALE, layer=0)["attention"]()
    with pytest.raises(AssertionError):
        replace(auto(l0=0.5), sparse=untouchable).attend(q, k, v, scale=SCALE, layer=0)


@pytest.mark.parametrize(
    ("sparse", "doubt", "runs_sparse"),
    [(0.74, 0.25, True), (0.75, 0.25, False), (0.9, 0.25, False), (0.99, 0, True), (1, 0, False)],
)
def test_sparse_must_win_by_more_than_the_laws_own_error(
    sparse: float, doubt: float, runs_sparse: bool
) -> None:
    assert choice(1.0, sparse, doubt).sparse is runs_sparse


def test_another_length_does_as_the_longest_decided_one_below_it() -> None:
    made = {(100, 0): choice(1, 2), (300, 0): choice(1, 0.5), (300, 1): choice(1, 0.5)}
    method = Auto(uniform("a-shape", PATTERN)).decided(Dense("math"), made)

    def density(n: int, layer: int = 0) -> float:
        q, k, v = inputs(n)
        return float(method.profile(q, k, v, scale=SCALE, layer=layer).density.max())

    assert density(99) == 1
    assert density(299) == 1
    assert density(300) < 1
    assert density(450) < 1
    assert density(450, layer=2) == 1  # nothing is known of it


def test_without_decisions_it_says_how_to_get_them() -> None:
    q, k, v = inputs(10)
    with pytest.raises(UsageError, match=r"auto has decided nothing yet; prefill once with .*Dec"):
        Auto(uniform("a-shape", PATTERN)).attend(q, k, v, scale=SCALE, layer=0)


@pytest.fixture
def law_file(tmp_path: Path) -> Callable[..., Path]:
    """A law in which dense costs a second a pair, and sparse as asked."""

    def write(call: float = 0.0, pair: float = 1.0, error: float = 0.0) -> Path:
        import json

        def step(**seconds: float) -> dict[str, Any]:
            return {"seconds": seconds, "error": error, "worst": error}

        steps = {
            "dense": step(call=0, row=0, causal_pair=1),
            "choose": step(call=call, row=0, position=0, block_row=0, block_pair=0),
            "attend": step(call=0, row=0, band_pair=pair, column=0, listed_pair=pair),
        }
        path = tmp_path / "law.json"
        data = {"measured": {"date": "2026-01-02"}, "head_dims": {"64": steps}}
        path.write_text(json.dumps(data))
        return path

    return write


def decide(law: Path, *lengths: int, head_dim: int = 64) -> tuple[Deciding, list[Tensor]]:
    mixed = (PATTERN, VerticalSlash(30, 60), BlockSparse(1), AShape(0, 1))
    sparse = SparsePrefill("mixed", (mixed, mixed), {})
    deciding = Deciding(Auto(sparse, law))
    outs = []
    for n in lengths:
        q, k, v = inputs(n, head_dim)
        outs += [deciding.attend(q, k, v, scale=SCALE, layer=layer) for layer in (0, 1)]
    return deciding, outs


def test_deciding_predicts_every_layer_and_length_from_the_density_it_sees(
    law_file: Callable[..., Path],
) -> None:
    deciding, outs = decide(law_file(call=5.0), 200, 450)
    assert set(deciding.choices) == {(n, layer) for n in (200, 450) for layer in (0, 1)}
    sparse = deciding._auto.sparse
    q, k, v = inputs(450)
    account = sparse.profile(q, k, v, scale=SCALE, layer=0)
    assert torch.equal(outs[2], account.out)
    made = deciding.choices[450, 0]
    assert made.density == pytest.approx(float(account.density.mean()))
    pairs = 450 * 451 / 2
    assert made.prediction.dense_seconds == 4 * pairs
    assert made.prediction.sparse_seconds == pytest.approx(5 + 4 * made.density * pairs)
    assert made.prediction.doubt_seconds == 0
    assert made.sparse


@pytest.mark.parametrize(
    ("law", "sparse"),
    [({}, True), ({"call": 1e9}, False), ({"pair": 9.0}, False), ({"error": 0.9}, False)],
)
def test_what_choosing_computing_or_doubt_costs_can_make_dense_the_choice(
    law: dict[str, float], sparse: bool, law_file: Callable[..., Path]
) -> None:
    deciding, _ = decide(law_file(**law), 450)
    assert [c.sparse for c in deciding.choices.values()] == [sparse, sparse]


def test_a_width_the_law_does_not_know_ends_with_how_to_measure_it(
    law_file: Callable[..., Path],
) -> None:
    with pytest.raises(UsageError, match="this model has 128; measure one with"):
        decide(law_file(), 100, head_dim=128)


def test_the_name_takes_the_models_own_patterns_a_file_and_a_law(tmp_path: Path) -> None:
    own = ((BlockSparse(3), BlockSparse(3)),)
    method = method_from_name("auto", {"law": "mine.json"}, patterns=own)
    assert isinstance(method, Auto)
    assert method.sparse.patterns == own
    assert method.law_file == Path("mine.json")
    assert method.parameters["law"] == "mine.json"
    path = tmp_path / "patterns.json"
    path.write_text('[{"0": ["stream_llm", 1, 2, 0.5]}]')
    from_file = method_from_name("auto", {"pattern_file": str(path)}, patterns=own)
    assert isinstance(from_file, Auto)
    assert from_file.sparse.patterns == ((AShape(1, 2),),)
    with pytest.raises(UsageError, match="auto has no option 'margin'; its options are pattern_fi"):
        method_from_name("auto", {"margin": "0"})
