"""An arm that chooses, and another rest of the model: decided once, told, kept apart."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from minference_green.comparable import differences
from minference_green.render.rows import facts
from minference_green.results import Decision, Observation, Run, Window, load
from minference_green.workload import format_length

GreenBench = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def law(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dense costs a second a pair, sparse 1,000,000 s a call: even at 499 tokens and 8 heads."""

    def step(**seconds: float) -> dict[str, object]:
        return {"seconds": seconds, "error": 0.0, "worst": 0.0}

    steps = {
        "dense": step(call=0, row=0, causal_pair=1),
        "choose": step(call=1e6, row=0, position=0, block_row=0, block_pair=0),
        "attend": step(call=0, row=0, band_pair=0, column=0, listed_pair=0),
    }
    path = tmp_path_factory.mktemp("law") / "law.json"
    path.write_text(json.dumps({"measured": {"date": "2026-01-02"}, "head_dims": {"64": steps}}))
    return path


@pytest.fixture(scope="module")
def finished(
    green_bench: GreenBench,
    small: tuple[str, ...],
    law: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[subprocess.CompletedProcess[str], Run]:
    output = tmp_path_factory.mktemp("finished")
    done = green_bench(
        "run", *small, "--context", "400,600", "--methods", "dense,auto,minference",
        "--method-option", f"auto.law={law}", "--output", output,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (directory,) = output.iterdir()
    return done, load(directory)


def test_every_layer_is_decided_once_a_run_before_any_window(
    finished: tuple[subprocess.CompletedProcess[str], Run],
) -> None:
    _, run = finished
    made = list(run.of(Decision))
    assert [(d.block, d.context_length) for d in made] == [(0, 400), (0, 600)]
    assert {w.block for w in run.windows} == {0, 1}
    kinds = [e.event for e in run.events]
    assert max(i for i, kind in enumerate(kinds) if kind == "decision") < kinds.index("window")
    for decision, runs in zip(made, ("dense", "sparse"), strict=True):
        assert [one.layer for one in decision.layers] == [0, 1, 2]
        assert {one.runs for one in decision.layers} == {runs}
        pairs = decision.context_length * (decision.context_length + 1) / 2
        assert all(one.dense_seconds == 8 * pairs for one in decision.layers)
        assert all(one.sparse_seconds == 1e6 for one in decision.layers)


def test_what_was_decided_is_what_ran(
    finished: tuple[subprocess.CompletedProcess[str], Run],
) -> None:
    _, run = finished
    seen = {(o.context_length, o.method): o for o in run.of(Observation)}
    assert seen[400, "auto"].density == 1
    assert seen[400, "auto"].estimate_seconds == 0
    assert seen[400, "auto"].notes == ()
    assert seen[600, "auto"].density == seen[600, "minference"].density
    decided = {d.context_length: d for d in run.of(Decision)}
    mean = sum(one.density for one in decided[600].layers) / 3
    assert mean == pytest.approx(seen[600, "minference"].density)
    assert {w.method for w in run.of(Window) if w.context_length == 400} == {
        "dense",
        "auto",
        "minference",
    }


def test_the_report_tells_where_it_ran_what_and_by_which_law(
    finished: tuple[subprocess.CompletedProcess[str], Run], law: Path
) -> None:
    done, run = finished
    text = dict(facts(run))["Auto"]
    assert text.startswith(f"400 dense; 600 sparse; predicted by {law} of 2026-01-02, sha256 ")
    assert "400 dense; 600 sparse" in done.stdout


def test_layers_that_differ_are_counted(
    make_run: Callable[..., Run], finished: tuple[subprocess.CompletedProcess[str], Run]
) -> None:
    _, run = finished
    made = next(run.of(Decision))
    first, *others = made.layers
    mixed = (first.model_copy(update={"runs": "sparse"}), *others)
    shown = make_run(
        {(8192, "dense"): [[1.0]], (8192, "auto"): [[1.0]]},
        events=(made.model_copy(update={"context_length": 8192, "layers": mixed}),),
    )
    assert format_length(8192) == "8k"
    assert dict(facts(shown))["Auto"].startswith("8k sparse in 1 of 3 layers, else dense; pred")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rest", "fused"], "--rest fused needs a CUDA device, the model is on cpu"),
        (["--rest", "fast"], "--rest 'fast' is not known; use stock or fused"),
        (
            ["--methods", "dense,auto", "--method-option", "auto.law=absent.json"],
            "cannot read law absent.json",
        ),
        (
            ["--methods", "dense,auto", "--method-option", "auto.pattern_file=one_head.json"],
            "the pattern file of auto is for 1 layers of 1 heads",
        ),
    ],
)
def test_what_cannot_run_ends_with_exit_2_and_the_reason(
    arguments: list[str],
    message: str,
    green_bench: GreenBench,
    small: tuple[str, ...],
    tmp_path: Path,
) -> None:
    done = green_bench("run", *small, *arguments, "--output", tmp_path)
    assert done.returncode == 2
    assert message in done.stderr


def test_runs_with_another_rest_of_the_model_do_not_compare(make_run: Callable[..., Run]) -> None:
    energy = {(8192, "dense"): [[9.0]], (8192, "auto"): [[5.0]]}
    stock = make_run(energy)
    fused = make_run(energy, fingerprint={"rest": "32 MLPs, 65 norms"})
    (found,) = differences(stock, fused).hard
    assert str(found) == "rest: stock -> 32 MLPs, 65 norms"
    assert dict(facts(fused))["Rest of the model"] == "fused: 32 MLPs, 65 norms"
    assert "Rest of the model" not in dict(facts(stock))
