"""``check``: looks, ledgers, files and exit codes, on a machine with known truth."""

import json
import math
import subprocess
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest

from minference_green import bench, fingerprint
from minference_green.bench import InterruptedRunError, Request
from minference_green.errors import MeasurementError
from minference_green.journal import Journal
from minference_green.results import FILE_NAME, BlockDone, Extension, load

WOBBLE = (0.004, -0.006, 0.002, 0.005, -0.003, -0.002, 0.001, -0.004)


class Machine:
    """Measures at once; its sparse arm costs ``ratio`` of dense, with a spread over blocks."""

    def __init__(self, make_run, build_fingerprint):
        self.make_run, self.fingerprint = make_run, build_fingerprint
        self.ratio, self.spread, self.invalid, self.started = 0.6, 1.0, None, 0
        self.fails: Exception | None = None

    def record(self, blocks, request):
        minference = [
            [100 * self.ratio * math.exp(self.spread * WOBBLE[b % 8])] for b in range(blocks)
        ]
        return self.make_run(
            {(8192, "dense"): [[100.0]] * blocks, (8192, "minference"): minference},
            density={(8192, "dense"): 1.0, (8192, "minference"): 0.2},
            fingerprint=self.fingerprint,
            header={"request": request.model_dump(mode="json")},
            invalid=self.invalid,
        )

    def run(self, request, output, progress):
        self.started += 1
        if self.fails:
            raise self.fails
        directory = output / f"run-{self.started}"
        run = self.record(request.blocks or 6, request)
        header = run.header.model_copy(update={"run_id": directory.name})
        with Journal(directory / FILE_NAME) as journal:
            for event in (header, *run.events):
                journal.append(event)
            journal.seal()
        return directory

    def resume(self, directory, progress):
        return directory

    def extend(self, directory, blocks, reason, progress):
        so_far = load(directory)
        whole = self.record(blocks, Request.model_validate(so_far.header.request))
        done = len(so_far.blocks_done)
        with Journal(directory / FILE_NAME) as journal:
            journal.append(Extension(blocks=blocks, created_at="2026-05-02", reason=reason))
            for event in whole.events:
                if getattr(event, "block", 0) >= done and event.event != "observation":
                    journal.append(event)
            journal.seal()
        return directory


@pytest.fixture
def machine(make_run, monkeypatch):
    commit, dirty = fingerprint.code_version()
    fake = Machine(
        make_run,
        {
            "kernel_hash": fingerprint.kernel_hash(),
            "code_commit": commit,
            "code_dirty": dirty,
            "software": fingerprint.software(None),
        },
    )
    for name in ("run", "resume", "extend"):
        monkeypatch.setattr(bench, name, getattr(fake, name))
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    return fake


@pytest.fixture
def main(machine, call, tmp_path):
    """A machine with a baseline ``main`` of six blocks at 60 % of dense."""
    request = Request(model="planted:8b", blocks=6)
    call("baseline", "save", "main", machine.run(request, tmp_path / "stored", None))
    machine.started = 0
    return machine


def ledgers(baseline="main"):
    return sorted(Path("green-bench-runs/checks", baseline).glob("*/*/run.jsonl"))


def test_no_change_passes_at_the_first_look_with_exit_0(main, call):
    code, out, err = call("check", "--quiet")
    assert code == 0, err
    assert out.startswith("PASS at a margin of 5.0%: 6 blocks against 1 stored run")
    assert len(load(ledgers()[0]).blocks_done) == 6


def test_a_regression_exits_1(main, call):
    main.ratio = 0.66
    code, out, _ = call("check", "--quiet")
    assert code == 1
    assert out.startswith("FAIL")


def test_a_wrong_request_exits_2_before_anything_is_measured(main, call):
    for arguments, message in (
        (["--max-blocks", "7"], "--max-blocks 7 is no look; choose from 6, 10, 16"),
        (["--margin", "much"], "--margin 'much' is not a margin"),
        (["--method-option", "nonsense"], "is not METHOD.KEY=VALUE"),
        (["--allow-mismatch", "gpu"], "gpu: no such hard key"),
        (["--baselin", "main"], "--baselin"),
    ):
        code, out, err = call("check", *arguments)
        assert (code, out) == (2, ""), err
        assert message in err
        assert main.started == 0


def test_an_open_verdict_goes_on_to_10_and_16_blocks_and_exits_3(main, call):
    main.ratio = 0.63
    code, out, _ = call("check", "--quiet")
    assert code == 3
    assert out.startswith("INCONCLUSIVE at a margin of 5.0%: 16 blocks")
    run = load(ledgers()[0])
    assert [e.blocks for e in run.of(Extension)] == [10, 16]
    assert "inconclusive at 6 blocks" in next(run.of(Extension)).reason
    assert run.sealed


def test_max_blocks_ends_the_looks_early_and_resume_goes_on_in_the_same_ledger(main, call):
    main.ratio = 0.63
    assert call("check", "--quiet", "--max-blocks", "6")[0] == 3
    assert call("check", "--quiet", "--max-blocks", "10", "--resume")[0] == 3
    (ledger,) = ledgers()
    assert len(load(ledger).blocks_done) == 10
    assert main.started == 1


def test_a_decided_ledger_stays_decided(main, call):
    main.ratio = 0.66
    assert call("check", "--quiet")[0] == 1
    main.ratio = 0.6
    assert call("check", "--quiet", "--resume")[0] == 1
    assert main.started == 1
    # Without --resume a new check begins.
    assert call("check", "--quiet")[0] == 0
    assert main.started == 2


def test_a_ledger_of_another_commit_is_not_taken_up(main, call):
    def commit(message):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", "add", "code.py"], check=True)
        subprocess.run(["git", *identity, "commit", "-qm", message], check=True)

    subprocess.run(["git", "init", "-q"], check=True)
    Path("code.py").write_text("1")
    commit("one")
    assert call("check", "--quiet")[0] == 0
    Path("code.py").write_text("2")
    main.ratio = 0.66
    assert call("check", "--quiet", "--resume")[0] == 1
    commit("two")
    main.ratio = 0.6
    assert call("check", "--quiet", "--resume")[0] == 0
    assert len(ledgers()) == 3


@pytest.mark.parametrize(
    ("change", "word"),
    [({"kernel_hash": "0000"}, "kernels"), ({"code_commit": "0000"}, "code")],
)
def test_a_ledger_of_another_package_is_refused(main, call, change, word):
    main.fingerprint = main.fingerprint | change
    assert call("check", "--quiet")[0] == 0
    code, _, err = call("check", "--quiet", "--resume")
    assert code == 4
    assert f"was measured with other {word}" in err


def test_a_ledger_of_other_options_is_refused(main, call):
    assert call("check", "--quiet")[0] == 0
    option = ("--method-option", "minference.pattern_file=other.json")
    code, _, err = call("check", "--quiet", "--resume", *option)
    assert code == 4
    assert "was measured with other request" in err
    assert call("check", "--quiet", *option)[0] == 0
    asked = Request.model_validate(load(ledgers()[-1]).header.request)
    assert asked.options == {"minference": {"pattern_file": "other.json"}}


def test_a_missing_baseline_exits_4_without_measuring(machine, call):
    code, out, err = call("check", "--baseline", "release")
    assert (code, out, machine.started) == (4, "", 0)
    assert "there is no baseline release" in err
    assert "green-bench baseline save release RUN" in err


def test_another_machine_exits_4(main, call):
    main.fingerprint = main.fingerprint | {"dtype": "float16"}
    code, _, err = call("check", "--quiet")
    assert code == 4
    assert "--allow-mismatch dtype" in err
    assert call("check", "--quiet", "--allow-mismatch", "dtype")[0] == 0


def test_a_measurement_that_is_invalid_exits_5(main, call):
    main.invalid = {(b, 1, "minference"): "thermal slowdown" for b in range(6)}
    code, _, err = call("check", "--quiet")
    assert code == 5
    assert "50% of the windows" in err
    main.fails = MeasurementError("the counter stands still")
    assert call("check", "--quiet")[0] == 5


def test_an_interrupted_check_exits_130_and_says_how_to_go_on(main, call):
    main.fails = InterruptedRunError(Path("x/run-1"), (), started=True)
    code, _, err = call("check", "--quiet")
    assert code == 130
    assert "green-bench check --baseline main --resume --output green-bench-runs/checks" in err


@pytest.mark.parametrize(("policy", "code"), [("fail", 3), ("warn", 0), ("pass", 0)])
def test_what_an_open_verdict_means_is_the_teams_choice(main, call, policy, code):
    main.ratio = 0.63
    found, out, err = call("check", "--quiet", "--on-inconclusive", policy)
    assert found == code
    assert out.startswith("INCONCLUSIVE")
    assert ("was let through" in err) is (policy == "warn")


def test_exit_zero_covers_verdicts_and_no_errors(main, call):
    main.ratio = 0.66
    assert call("check", "--quiet", "--exit-zero")[0] == 0
    main.ratio = 0.63
    assert call("check", "--quiet", "--exit-zero")[0] == 0
    assert call("check", "--quiet", "--exit-zero", "--baseline", "none")[0] == 4


def test_json_carries_the_verdict_and_where_it_rests(main, call):
    main.ratio = 0.66
    code, out, _ = call("check", "--quiet", "--json")
    data = json.loads(out)
    assert (code, data["outcome"], data["reasons"]) == (1, "fail", ["worse"])
    assert load(Path(data["run_file"])).complete
    assert any("is of a tree" in w or "days old" in w for w in data["warnings"])


@pytest.mark.parametrize(
    ("ratio", "policy", "counts", "tag"),
    [
        (0.6, "fail", ("1", "0", "0", "0"), None),
        (0.66, "fail", ("1", "1", "0", "0"), "failure"),
        (0.63, "fail", ("1", "0", "1", "0"), "error"),
        (0.63, "warn", ("1", "0", "0", "1"), "skipped"),
    ],
)
def test_junit_tells_each_criterion(main, call, tmp_path, ratio, policy, counts, tag):
    main.ratio = ratio
    file = tmp_path / "reports" / "check.xml"
    call("check", "--quiet", "--on-inconclusive", policy, "--junit", file)
    suite = ElementTree.parse(file).getroot().find("testsuite")
    assert suite is not None
    assert tuple(suite.get(n) for n in ("tests", "failures", "errors", "skipped")) == counts
    case = suite.find("testcase")
    assert case is not None
    assert case.get("name") == "8k minference, joules per token against dense"
    if tag:
        said = case.find(tag)
        assert said is not None
        assert said.get("message")


def test_junit_tells_an_error_that_left_no_verdict(main, call, tmp_path):
    main.fails = MeasurementError("the counter\x00 stands <still>")
    call("check", "--quiet", "--junit", tmp_path / "check.xml")
    error = ElementTree.parse(tmp_path / "check.xml").getroot().find("testsuite/testcase/error")
    assert error is not None
    assert error.get("message") == "the counter? stands <still>"


def test_markdown_begins_with_the_verdict_and_ends_with_the_provenance(main, call, tmp_path):
    main.ratio = 0.66
    call("check", "--quiet", "--markdown", tmp_path / "check.md")
    text = (tmp_path / "check.md").read_text()
    assert text.startswith("### FAIL at a margin of 5.0%")
    assert "| 8k | minference |" in text
    assert "- Machine: " in text


def test_openmetrics_is_read_by_a_parser_of_it(main, call, tmp_path):
    from prometheus_client.openmetrics.parser import text_string_to_metric_families

    main.ratio = 0.66
    call("check", "--quiet", "--openmetrics", tmp_path / "check.txt")
    families = {
        f.name: f for f in text_string_to_metric_families((tmp_path / "check.txt").read_text())
    }
    outcome = {s.labels["outcome"]: s.value for s in families["green_bench_check_outcome"].samples}
    assert outcome == {"pass": 0, "fail": 1, "inconclusive": 0}
    (change,) = families["green_bench_check_change"].samples
    assert change.labels["criterion"] == "energy_ratio"
    assert change.value == pytest.approx(0.1, abs=0.001)


def test_a_file_that_cannot_be_written_is_named(main, call):
    code, _, err = call("check", "--quiet", "--junit", "/proc/none/check.xml")
    assert code == 2
    assert "--junit /proc/none/check.xml cannot be written" in err


def test_on_github_the_regression_is_an_annotation(main, call, monkeypatch):
    assert "::error" not in call("check", "--quiet")[2]
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    main.ratio = 0.66
    _, out, err = call("check", "--quiet", "--json")
    json.loads(out)
    errors = [line for line in err.splitlines() if line.startswith("::error ")]
    assert len(errors) == 1
    assert errors[0].startswith("::error title=8k minference%2C joules per token against dense::")
    assert "+10.0 %25" in errors[0]
    assert (
        "::error title=green-bench::there is no baseline x" in call("check", "--baseline", "x")[2]
    )


def test_a_baseline_of_something_else_cannot_be_checked(machine, call, store, make_run):
    run = make_run({(8192, "dense"): [[1.0]] * 6, (8192, "minference"): [[1.0]] * 6})
    call("baseline", "save", "odd", store(run))
    code, _, err = call("check", "--baseline", "odd")
    assert code == 2
    assert "cannot repeat it" in err


def test_check_measures_for_real(
    green_bench: Callable[..., subprocess.CompletedProcess[str]],
    small: tuple[str, ...],
    tmp_path: Path,
) -> None:
    """One whole check with worker processes; what comes out depends on this machine."""
    done = green_bench("run", *small, "--blocks", "2", "--quiet", "--output", tmp_path / "runs")
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "runs").iterdir()
    root = ("--baselines", tmp_path / "baselines")
    assert green_bench("baseline", "save", "main", run, *root).returncode == 0
    done = green_bench(
        "check", *root, "--margin", "90%", "--max-blocks", "6", "--json",
        "--output", tmp_path / "checks",
    )  # fmt: skip
    data = json.loads(done.stdout)
    assert done.returncode == data["exit_code"]
    ledger = load(Path(data["run_file"]))
    assert (ledger.complete, ledger.sealed, len(list(ledger.of(BlockDone)))) == (True, True, 6)
    assert ledger.header.workload == load(run).header.workload
