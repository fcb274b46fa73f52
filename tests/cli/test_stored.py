"""``verify``, ``history``, ``calibrate`` and ``init`` from the command line."""

import csv
import io
import json
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from minference_green import bench
from minference_green.errors import MeasurementError
from minference_green.results import load

GreenBench = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def measured(
    green_bench: GreenBench, small: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    output = tmp_path_factory.mktemp("measured")
    done = green_bench("run", *small, "--blocks", "2", "--quiet", "--output", output)
    assert done.returncode == 0, done.stderr
    (directory,) = output.iterdir()
    return directory


def test_a_run_just_measured_verifies(call, measured):
    code, out, _ = call("verify", measured)
    assert code == 0, out
    assert out.startswith(f"OK {measured.name}: sealed and unchanged; 8 windows, ")
    (data,) = json.loads(call("verify", measured, "--json")[1])
    # Per block: setup, two idles, four windows.
    assert (data["windows"], data["readings"], data["problems"]) == (8, 14, [])


def test_a_baseline_verifies_run_by_run(call, measured):
    call("baseline", "save", "main", measured)
    code, out, _ = call("verify", "baseline:main", measured)
    assert code == 0
    assert out.count("OK ") == 2
    assert call("verify", "baseline:none")[0] == 4


def test_a_run_without_a_seal_is_an_open_question(call, measured, tmp_path):
    text = (measured / "run.jsonl").read_text()
    (tmp_path / "run.jsonl").write_text(text[: text.index('{"event":"seal"')])
    code, out, _ = call("verify", tmp_path)
    assert code == 3
    assert "not sealed" in out


def test_wrong_figures_under_a_new_seal_are_still_found(call, six_blocks, store):
    code, out, _ = call("verify", store(six_blocks))
    assert code == 5
    assert out.startswith("WRONG ")
    assert "come without the numbers behind them" in out


@pytest.fixture
def two_runs(make_run, store):
    energy = {(8192, "dense"): [[100.0]] * 2, (8192, "minference"): [[60.0]] * 2}
    dearer = {(8192, "dense"): [[100.0]] * 2, (8192, "minference"): [[66.0]] * 2}
    later = {"created_at": "2026-06-01T10:00:00+00:00"}
    return store(make_run(dearer, header=later), "later"), store(make_run(energy), "earlier")


def test_history_is_in_order_of_time_with_the_change(call, two_runs):
    code, out, _ = call("history", *two_runs)
    assert code == 0
    lines = [line.split() for line in out.splitlines() if "minference" in line]
    assert [line[-1] for line in lines] == ["earlier", "later"]
    assert "first" in lines[0]
    assert "+10.0" in lines[1]


def test_history_reads_folders_baselines_and_each_run_once(call, two_runs):
    call("baseline", "save", "main", two_runs[1])
    call("baseline", "promote", "main", two_runs[0])
    for sources in ([], [two_runs[0].parent], ["baseline:main", two_runs[0].parent, two_runs[0]]):
        out = call("history", *sources, "--format", "csv")[1]
        rows = list(csv.DictReader(io.StringIO(out)))
        assert [r["run_id"] for r in rows] == ["earlier", "earlier", "later", "later"], sources
    assert float(rows[3]["joules_per_mtok"]) == pytest.approx(66.0)
    assert rows[3]["created_at"].startswith("2026-06-01")


def test_history_as_openmetrics_is_read_by_a_parser_of_it(call, two_runs, tmp_path):
    from prometheus_client.openmetrics.parser import text_string_to_metric_families

    file = tmp_path / "metrics" / "history.txt"
    call("history", *two_runs, "--format", "openmetrics", "--output", file)
    families = {f.name: f for f in text_string_to_metric_families(file.read_text())}
    samples = families["green_bench_joules_per_mtok"].samples
    assert [(s.labels["run_id"], s.labels["method"], round(s.value)) for s in samples] == [
        ("earlier", "dense", 100),
        ("earlier", "minference", 60),
        ("later", "dense", 100),
        ("later", "minference", 66),
    ]
    assert float(samples[0].timestamp) == 1777629600
    # The density was not observed in these runs: no sample rather than a zero.
    assert not families["green_bench_density"].samples


def test_no_stored_runs_are_an_error_and_not_an_empty_table(call, tmp_path):
    for sources in ([], [tmp_path]):
        code, out, err = call("history", *sources)
        assert (code, out) == (2, "")
        assert "no stored runs" in err


def test_calibrate_measures_dense_twice_and_stores_it(
    green_bench: GreenBench, small: tuple[str, ...], tmp_path: Path
) -> None:
    done = green_bench(
        "calibrate", *small, "--json", "--quiet",
        "--output", tmp_path / "runs", "--baselines", tmp_path / "baselines",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    floor = json.loads(done.stdout)
    assert floor["blocks"] == 2
    assert floor["joules_spread"] > 0
    least = floor["detectable"]["seconds"]
    assert least["16"] < least["6"]
    (file,) = (tmp_path / "baselines" / "calibration").glob("*.jsonl")
    run = load(file)
    assert [m.name for m in run.header.methods] == ["dense", "dense-again"]
    assert {w.method for w in run.windows} == {"dense", "dense-again"}
    assert not any("leave almost" in line for o in run.events for line in getattr(o, "notes", ()))


def test_init_writes_settings_that_the_commands_accept(call, monkeypatch):
    asked = []

    def measure(request, output, progress):
        asked.append(request)
        raise MeasurementError("not measured in this test")

    monkeypatch.setattr(bench, "run", measure)
    code, out, _ = call("init")
    assert code == 0
    assert "Wrote green-bench.toml" in out
    call("run", "--quiet")
    assert asked[0].methods == ("dense", "minference")
    # Also with every line in use.
    text = Path("green-bench.toml").read_text()
    observed = ("memory", "density", "output_error", "kl", "top1", "recall")
    for line in ("context", "country", "latency", *observed):
        assert f"# {line} =" in text
        text = text.replace(f"# {line} =", f"{line} =")
    tomllib.loads(text)
    Path("green-bench.toml").write_text(text)
    call("run", "--quiet")
    assert asked[1].context_lengths == (8192, 32768, 131072)


def test_init_overwrites_nothing_unasked(call):
    Path("green-bench.toml").write_text("# mine\n")
    code, _, err = call("init")
    assert code == 2
    assert "green-bench.toml exists; nothing was written" in err
    assert not Path(".github").exists()
    assert call("init", "--force")[0] == 0
    assert Path("green-bench.toml").read_text() != "# mine\n"


def test_the_workflow_of_init_is_one_that_github_accepts(call):
    call("init")
    done = subprocess.run(
        [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows",
         ".github/workflows/energy.yml"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def gpu_baseline(call, make_run, store, measured):
    """A baseline of a GPU whose figures follow from evidence: the CPU run under another device."""
    run = load(measured)
    gpu = run.header.fingerprint.devices[0].model_copy(update={"kind": "gpu", "name": "H200"})
    print_ = run.header.fingerprint.model_copy(update={"devices": (gpu,)})
    header = run.header.model_copy(update={"fingerprint": print_})
    events = tuple(e for e in run.events if e.event != "seal")
    run = run.model_copy(update={"header": header, "events": events})
    call("baseline", "save", "gpu", store(run, "of-a-gpu"))


def test_without_the_gpu_check_verifies_the_baseline_and_says_that_nothing_was_measured(
    call, gpu_baseline, monkeypatch
):
    from minference_green.meters import nvml

    monkeypatch.setattr(nvml, "gpu_present", lambda: False)
    monkeypatch.setattr(bench, "run", lambda *_: pytest.fail("measured"))
    code, out, _ = call("check", "--baseline", "gpu", "--verify-without-gpu")
    assert code == 0
    assert out.startswith("No GPU here: nothing was measured and there is no verdict.")
    assert "OK of-a-gpu" in out


def test_with_the_gpu_the_same_command_measures(call, gpu_baseline, monkeypatch):
    from minference_green.meters import nvml

    def measure(*_):
        raise MeasurementError("began to measure")

    monkeypatch.setattr(nvml, "gpu_present", lambda: True)
    monkeypatch.setattr(bench, "run", measure)
    code, _, err = call("check", "--baseline", "gpu", "--verify-without-gpu")
    assert code == 5
    assert "began to measure" in err
