"""The GitHub action: a valid one, and its scripts do what they say when run."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import yaml

from minference_green.meters.nvml import gpu_present
from minference_green.results import load

ROOT = Path(__file__).resolve().parent.parent
ACTION = ROOT / "action.yml"


@pytest.fixture(scope="module")
def action():
    return yaml.safe_load(ACTION.read_text())


def script(action, name):
    (step,) = (s for s in action["runs"]["steps"] if s.get("name") == name)
    return step["run"]


@pytest.mark.parametrize(
    ("schema", "file"),
    [
        ("vendor.github-actions", ACTION),
        *(("vendor.github-workflows", f) for f in (ROOT / ".github/workflows").glob("*.yml")),
    ],
)
def test_github_accepts_the_file(schema, file):
    done = subprocess.run(
        [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, file],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_expression_stands_inside_a_script(action):
    """An input or a branch name pasted into a script could become a command."""
    for step in action["runs"]["steps"]:
        assert "${{" not in step.get("run", "")


def test_every_input_is_used_and_every_one_used_is_declared(action):
    import re

    used = set(re.findall(r"inputs\.([\w-]+)", ACTION.read_text()))
    assert used == set(action["inputs"])
    assert all("description" in one for one in action["inputs"].values())


def test_the_ledger_is_kept_after_a_failed_check_under_the_key_a_re_run_looks_for(action):
    restore, *_, keep = action["runs"]["steps"]
    assert keep["if"] == "always()"
    assert keep["with"]["key"] == restore["with"]["key"]
    assert keep["with"]["key"].startswith(restore["with"]["restore-keys"])
    assert keep["with"]["path"] == restore["with"]["path"] == "green-bench-runs/checks"


@pytest.fixture(scope="module")
def installed(action, tmp_path_factory):
    """The action's own install step, run; the libraries under the package come from here."""
    source, temp = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("runner")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    names = [n for n in listed.stdout.split("\0") if n and os.path.lexists(ROOT / n)]
    packed = subprocess.run(
        ["tar", "-C", ROOT, "-cf", "-", *names], capture_output=True, check=True
    )
    subprocess.run(["tar", "-C", source, "-xf", "-"], input=packed.stdout, check=True)
    environment = {
        **os.environ,
        "RUNNER_TEMP": str(temp),
        "PYTHON": sys.executable,
        "SOURCE": str(source),
        "PIP_NO_DEPS": "1",
    }
    subprocess.run(
        ["bash", "-e", "-c", script(action, "Install green-bench")], env=environment, check=True
    )
    return temp


@pytest.fixture
def step(action, installed, tmp_path):
    """Run the check step as a runner would, with these variables changed."""

    def begin(**changed):
        environment = {
            **os.environ,
            "RUNNER_TEMP": str(installed),
            "PYTHONPATH": sysconfig.get_paths()["purelib"],
            "GITHUB_ACTIONS": "true",
            "GITHUB_STEP_SUMMARY": str(tmp_path / "summary.md"),
            "BASELINE": "main",
            "BASELINES": "baselines",
            "MARGIN": "",
            "MAX_BLOCKS": "6",
            "ON_INCONCLUSIVE": "fail",
            "REPORTS": "reports",
            "HEAD": "team/project",
            "BASE": "team/project",
            **changed,
        }
        return subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script(action, "Check")],
            cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip

    return begin


@pytest.fixture
def gpu_baseline(make_run, store, tmp_path):
    """A baseline of a GPU, of replayed windows without energy: nothing there to recompute."""
    from minference_green import baseline

    keys = ((8192, "dense"), (8192, "minference"))
    run = make_run({k: [[None]] * 4 for k in keys}, seconds={k: [[1.0]] * 4 for k in keys})
    windows = tuple(
        e.model_copy(update={"readings": ()}) if e.event == "window" else e for e in run.events
    )
    return baseline.save(
        tmp_path / "baselines", "main", store(run.model_copy(update={"events": windows}))
    )


def test_the_installed_command_is_the_one_that_runs(installed):
    done = subprocess.run(
        [installed / "green-bench/bin/python", "-P", "-c",
         "import minference_green; print(minference_green.__file__)"],
        env={**os.environ, "PYTHONPATH": sysconfig.get_paths()["purelib"]},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert Path(done.stdout.strip()).is_relative_to(installed)


@pytest.mark.skipif(gpu_present(), reason="this machine has a GPU, so the step would measure")
def test_on_a_runner_without_a_gpu_the_baseline_is_verified_and_it_is_said(step, gpu_baseline):
    done = step()
    assert done.returncode == 0, done.stderr
    assert "No GPU here: nothing was measured and there is no verdict." in done.stdout
    assert "::warning title=green-bench::No GPU here" in done.stderr


def test_a_fork_never_measures(step, gpu_baseline):
    done = step(HEAD="stranger/project")
    assert done.returncode == 0, done.stderr
    assert "::warning title=green-bench::The change comes from the fork stranger/project" in (
        done.stdout
    )
    assert "OK " in done.stdout


def test_a_changed_baseline_fails_the_step_on_any_runner(step, gpu_baseline):
    file = gpu_baseline.directory / gpu_baseline.stored[0].file
    assert load(file).sealed
    file.write_bytes(file.read_bytes().replace(b'"seed":0', b'"seed":1', 1))
    for head in ("team/project", "stranger/project"):
        done = step(HEAD=head)
        assert done.returncode == 5
        assert "was changed after it was stored" in done.stderr


def test_a_missing_baseline_fails_the_step_with_an_annotation(step):
    done = step(BASELINE="release")
    assert done.returncode == 4
    assert "there is no baseline release" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_input_is_data_and_never_a_command(step, tmp_path):
    done = step(BASELINE='x"; touch owned; "', MARGIN="$(touch owned)")
    assert done.returncode == 2
    assert not (tmp_path / "owned").exists()
