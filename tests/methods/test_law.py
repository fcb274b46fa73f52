"""Laws of attention times: what they predict, where they come from, and how they are fitted."""

import importlib.util
import json
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from minference_green.errors import UsageError
from minference_green.kernels.index import causal_pairs
from minference_green.methods.law import (
    STEPS,
    Prediction,
    attend_work,
    choose_work,
    dense_work,
    device_kind,
    law_for,
    read_law,
)
from minference_green.methods.patterns import (
    AShape,
    BlockSparse,
    HeadPattern,
    Probed,
    VerticalSlash,
)

ROOT = Path(__file__).parents[2]
MIXED: list[HeadPattern] = [VerticalSlash(30, 800), AShape(16, 64), BlockSparse(4)]
SHIPPED = sorted(
    (p for p in (files("minference_green.methods") / "laws").iterdir() if p.name.endswith("json")),
    key=lambda p: p.name,
)


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("law", ROOT / "benchmarks" / "law.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def step(error: float = 0.0, **seconds: float) -> dict[str, Any]:
    return {"seconds": seconds, "error": error, "worst": error}


def content(**changes: Any) -> bytes:
    """A law of round numbers for heads of 64."""
    steps = {
        "dense": step(0.03, call=1.0, row=0.0, causal_pair=2.0),
        "choose": step(0.04, call=0.5, row=1.0, position=3.0, block_row=5.0, block_pair=7.0),
        "attend": step(0.0, call=0.25, row=0.0, band_pair=1.0, column=10.0, listed_pair=4.0),
    }
    data = {"device": "cpu", "measured": {"date": "2026-01-02"}, "head_dims": {"64": steps}}
    return json.dumps({**data, **changes}).encode()


def test_a_prediction_is_the_sum_of_all_terms() -> None:
    law = read_law(content(), "law.json")
    n, pairs = 128, causal_pairs(128, 128)
    two = law.predict(64, MIXED, [1.0, 1.0, 1.0], batch=2, n=n)
    assert two.dense_seconds == 1 + 2 * 2 * 3 * pairs
    choosing = 0.5 + n + 3 * (30 + 128) + 5 * n + 7 * 2**2
    attending = 0.25 + 1.0 * (0.5 + 0.25) * pairs + 10 * (30 + 16) + 4 * 0.125 * pairs
    got = law.predict(64, MIXED, [0.5, 0.25, 0.125], batch=1, n=n)
    assert got.sparse_seconds == pytest.approx(choosing + attending)
    doubt = ((0.03 * got.dense_seconds) ** 2 + (0.04 * choosing) ** 2) ** 0.5
    assert got.doubt_seconds == pytest.approx(doubt)
    assert law.source.startswith("law.json of 2026-01-02, sha256 ")


def test_two_prompts_are_twice_the_work_of_one_and_one_call() -> None:
    shares = [0.5, 0.25, 0.125]
    for one, two in (
        (dense_work(1, 3, 100), dense_work(2, 3, 100)),
        (choose_work(MIXED, 1, 100), choose_work(MIXED, 2, 100)),
        (attend_work(MIXED, shares, 1, 100), attend_work(MIXED, shares, 2, 100)),
    ):
        assert two == {term: x if term == "call" else 2 * x for term, x in one.items()}


def test_an_a_shape_costs_nothing_to_choose() -> None:
    work = choose_work([AShape(), AShape()], 1, 1000)
    assert {term: x for term, x in work.items() if x} == {"call": 1}


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (b"{", "broken.json is no law of attention times .*JSONDecodeError"),
        (b"[]", "broken.json is no law"),
        (
            content(head_dims={"64": {"dense": step(call=1.0, row=0.0, causal_pair=2.0)}}),
            "KeyError: 'choose'",
        ),
        (content(measured={}), "KeyError: 'date'"),
        (content(head_dims={"64": {name: {"speed": 1} for name in STEPS}}), "TypeError"),
        (content(head_dims={"64": {name: step(call=1.0) for name in STEPS}}), "has the terms"),
        (
            content().replace(b'"causal_pair": 2.0', b'"causal_pair": NaN'),
            "dense has a number that is not finite",
        ),
        (content().replace(b'"causal_pair": 2.0', b'"causal_pair": "2"'), "TypeError"),
    ],
)
def test_a_damaged_law_is_refused_with_what_is_wrong(wrong: bytes, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        read_law(wrong, "broken.json")


def test_a_head_width_nobody_measured_is_refused_with_those_known() -> None:
    with pytest.raises(UsageError, match=r"knows head_dim 64, this model has 96; measure one with"):
        read_law(content(), "law.json").predict(96, MIXED, [1.0] * 3, batch=1, n=10)


def test_a_file_comes_before_the_law_of_the_package(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_bytes(content())
    assert law_for(torch.device("cpu"), path).source.startswith(f"{path} of 2026-01-02")
    with pytest.raises(UsageError, match=r"cannot read law .*absent\.json: No such file"):
        law_for(torch.device("cpu"), tmp_path / "absent.json")


def test_a_device_without_a_law_is_told_how_to_measure_one() -> None:
    message = r"no law .* for meta \(there are .*cpu.*\); measure one with .*benchmarks\.law"
    with pytest.raises(UsageError, match=message):
        law_for(torch.device("meta"))


def test_the_package_has_a_law_for_this_cpu() -> None:
    assert device_kind(torch.device("cpu")) == "cpu"
    law = law_for(torch.device("cpu"))
    assert set(law.head_dims) >= {64, 128}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.name)
def test_a_shipped_law_is_the_fit_of_its_own_samples(path: Any, bench: ModuleType) -> None:
    data = json.loads(path.read_bytes())
    assert path.name == f"{data['device']}.json"
    assert {"date", "on", "dtype", "software"} <= data["measured"].keys()
    again = bench.fit(data["samples"])
    assert again.keys() == data["head_dims"].keys()
    for head_dim, steps in data["head_dims"].items():
        for name, stored in steps.items():
            assert again[head_dim][name]["seconds"] == pytest.approx(stored["seconds"], rel=1e-6)
            assert again[head_dim][name]["error"] == pytest.approx(stored["error"], rel=1e-6)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.name)
def test_a_shipped_law_predicts_dense_to_grow_and_sparse_to_shrink_with_density(path: Any) -> None:
    law = read_law(path.read_bytes(), path.name)
    heads = [VerticalSlash(1000, 6096)] * 8
    for head_dim in law.head_dims:

        def predict(n: int, share: float, head_dim: int = head_dim) -> Prediction:
            return law.predict(head_dim, heads, [share] * 8, batch=1, n=n)

        dense = [predict(n, 1.0).dense_seconds for n in (1024, 4096, 65536)]
        assert 0 < dense[0] < dense[1] < dense[2]
        assert dense[2] > 50 * dense[1]
        some, more = (predict(65536, share).sparse_seconds for share in (0.02, 0.5))
        assert 0 < some < more


def test_the_fit_finds_the_coefficients_that_made_the_samples(bench: ModuleType) -> None:
    true = {"call": 1e-5, "row": 3e-9, "causal_pair": 2e-12}
    samples = []
    for n in (256, 1000, 4096, 20000):
        for heads in (2, 32):
            work = dense_work(1, heads, n)
            seconds = sum(true[t] * x for t, x in work.items())
            samples += [
                {"step": name, "head_dim": 64, "work": dict(work), "seconds": seconds}
                for name in STEPS
            ]
    fitted = bench.fit(samples)["64"]
    for name in STEPS:
        assert fitted[name]["seconds"] == pytest.approx(true, rel=1e-6)
        assert fitted[name]["worst"] < 1e-9


def test_a_fit_never_pays_back_time_and_tells_how_far_it_is_off(bench: ModuleType) -> None:
    samples = [
        {"step": s, "head_dim": 64, "work": {"call": 1, "row": r}, "seconds": t}
        for s in STEPS
        for r, t in ((1, 2.0), (2, 1.0))
    ]
    found = bench.fit(samples)["64"]["dense"]
    assert found["seconds"]["row"] == 0
    # One constant for 2 s and 1 s: c/2 - 1 and c - 1 are least at c = 1.2.
    assert found["seconds"]["call"] == pytest.approx(1.2)
    assert found["worst"] == pytest.approx(0.4)
    assert found["error"] == pytest.approx(((0.4**2 + 0.2**2) / 2) ** 0.5)


def test_the_script_measures_fits_and_writes_a_law_that_can_be_used(tmp_path: Path) -> None:
    out = tmp_path / "law.json"
    small = ["--lengths", "64", "200", "--shapes", "4:2", "--head-dims", "64", "--rounds", "1"]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "benchmarks.law", *small, "--output", str(out)],
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "head_dim 64   dense" in done.stdout
    law = law_for(torch.device("cpu"), out)
    heads = [VerticalSlash(30, 60)] * 4
    assert law.predict(64, heads, [0.5] * 4, batch=1, n=200).sparse_seconds > 0
    samples = json.loads(out.read_text())["samples"]
    assert {s["step"] for s in samples} == set(STEPS)
    assert all(s["seconds"] > 0 for s in samples)


@pytest.mark.parametrize("n", [1, 7, 100, 5000])
@pytest.mark.parametrize("clustered", [True, False])
def test_measured_slashes_are_exactly_the_budget(
    n: int, clustered: bool, bench: ModuleType
) -> None:
    import random

    found = bench.offsets(random.Random(0), n, 800, clustered=clustered)
    assert len(found) == min(n, 800)
    assert found == sorted(set(found))
    assert found[0] >= 0
    assert found[-1] < n


def test_a_law_refuses_what_it_has_no_term_for() -> None:
    with pytest.raises(
        UsageError, match=r"what Probed\(top_k=8, rows=4\) costs; run probe by itself"
    ):
        choose_work([AShape(), Probed(8, 4)], 1, 1000)
