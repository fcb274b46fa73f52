"""The pytest plugin, on functions and a meter of known energy."""

import pytest

from minference_green.results import load

pytest_plugins = ["pytester"]

FAKE = """
import random

noise = random.Random(0)
joules = 0.0
ratio = 1.0
spread = 0.002


def control():
    global joules
    joules += 1.0


def candidate():
    global joules
    joules += ratio * (1 + noise.uniform(-spread, spread))
"""

CONFTEST = """
import os
import fake
from minference_green.meters import choose
from minference_green.results import Device, Reading

fake.ratio = float(os.environ.get("RATIO", "1"))


class FakeMeter:
    description = "a fake meter"
    devices = (Device(kind="cpu", name="a processor"),)

    def begin(self):
        self.before = fake.joules

    def end(self, start, end):
        # Each call takes the same time: what is left of the window is calls.
        return [Reading(
            device="cpu", scope="package", obtained="counter", source="fake",
            joules=fake.joules - self.before,
        )]

    def state(self):
        return []

    def close(self):
        pass


choose.open_meters = lambda kind, *, gpu_uuids: [FakeMeter()]
"""

TEST = """
import fake
import pytest


@pytest.mark.energy(margin="5%", baseline="main")
def test_cost(green):
    verdict = green.measure(fake.candidate, control=fake.control)
    print("said", verdict and verdict.outcome)
"""


@pytest.fixture
def project(pytester, monkeypatch):
    """A project of one energy test; run it at a ratio, with options."""
    pytester.makepyfile(fake=FAKE, test_it=TEST)
    pytester.makeconftest(CONFTEST)
    pytester.syspathinsert()

    def run(*options, ratio=1.0):
        monkeypatch.setenv("RATIO", str(ratio))
        fast = ("--green-window", "0.005", "-rs", "-s", "-p", "minference_green.pytest_plugin")
        fast += ("-p", "no:hypothesispytest", "-p", "no:xdist")
        return pytester.runpytest_subprocess(*fast, *options)

    return run


@pytest.fixture
def saved(project):
    project("--green", "--green-save").assert_outcomes(passed=1)
    return project


def test_off_without_the_option(project):
    done = project()
    done.assert_outcomes(skipped=1)
    done.stdout.fnmatch_lines(["*energy is measured with --green only*"])


def test_no_change_passes_and_hands_the_verdict_to_the_test(saved):
    done = saved("--green")
    done.assert_outcomes(passed=1)
    done.stdout.fnmatch_lines(["*said pass*"])


def test_a_regression_fails_with_the_change_and_no_traceback(saved):
    done = saved("--green", ratio=1.2)
    done.assert_outcomes(failed=1)
    done.stdout.fnmatch_lines(
        ["*changed by 20*FAIL, worse by more than the margin (candidate +20*"]
    )
    assert "Traceback" not in done.stdout.str()
    assert "pytest_plugin.py" not in done.stdout.str()


def test_an_open_verdict_is_a_warning_and_a_failure_when_strict(saved):
    done = saved("--green", ratio=1.05)
    done.assert_outcomes(passed=1, warnings=1)
    done.stdout.fnmatch_lines(["*GreenBenchWarning*INCONCLUSIVE*"])
    strict = saved("--green", "--green-strict", ratio=1.05)
    strict.assert_outcomes(failed=1)
    strict.stdout.fnmatch_lines(["*INCONCLUSIVE*"])


def test_a_missing_baseline_says_how_to_make_one_and_is_no_traceback(project):
    done = project("--green")
    done.assert_outcomes(failed=1)
    done.stdout.fnmatch_lines(["*there is no baseline main.test-cost-*--green --green-save*"])
    assert "Traceback" not in done.stdout.str()
    assert "baseline.py" not in done.stdout.str()


def test_saving_again_replaces_the_baseline(saved, pytester):
    saved("--green", "--green-save", ratio=1.2).assert_outcomes(passed=1)
    saved("--green", ratio=1.2).assert_outcomes(passed=1)
    (folder,) = (pytester.path / "reports/baselines/pytest").iterdir()
    assert len(list(folder.glob("*.jsonl"))) == 1


def test_what_was_measured_is_a_run_that_every_command_reads(saved, pytester):
    (file,) = (pytester.path / "green-bench-runs/pytest").rglob("run.jsonl")
    run = load(file)
    assert (run.complete, run.sealed) == (True, True)
    orders = [[w.method for w in run.windows if w.block == b] for b in (0, 1)]
    assert orders == [
        ["control", "candidate", "candidate", "control"],
        ["candidate", "control", "control", "candidate"],
    ]
    assert run.header.workload.model == "pytest:test_it.py::test_cost"
    assert len(run.blocks_done) == 6


def test_too_few_blocks_are_inconclusive(saved):
    done = saved("--green", "--green-blocks", "3")
    done.assert_outcomes(passed=1, warnings=1)
    done.stdout.fnmatch_lines(["*a verdict takes 4 on each side*"])


def test_where_no_meter_exists_the_test_is_skipped_with_the_reason(project, pytester):
    pytester.makeconftest(
        "from minference_green.errors import MeasurementError\n"
        "from minference_green.meters import choose\n"
        "def refuse(kind, *, gpu_uuids):\n"
        "    raise MeasurementError('no RAPL counters here')\n"
        "choose.open_meters = refuse\n"
    )
    done = project("--green", "--green-save")
    done.assert_outcomes(skipped=1)
    done.stdout.fnmatch_lines(["*no energy can be measured here: no RAPL counters here*"])


def test_a_baseline_edited_by_hand_fails_in_one_sentence(saved, pytester):
    (file,) = (pytester.path / "reports/baselines/pytest").rglob("*.jsonl")
    file.write_text(file.read_text().replace('"repeats":', '"repeats": ', 1))
    done = saved("--green")
    done.assert_outcomes(failed=1)
    done.stdout.fnmatch_lines(["*was changed after it was stored*"])


@pytest.mark.parametrize(
    ("marker", "message"),
    [
        ('margin="lots"', "*margin 'lots' is not a margin*"),
        ('margn="5%"', "*takes margin= and baseline=, got*margn*"),
        ('"5%"', "*takes margin= and baseline=, got*5%*"),
    ],
)
def test_a_marker_that_says_something_else_is_refused(saved, pytester, marker, message):
    pytester.makepyfile(test_it=TEST.replace('margin="5%", baseline="main"', marker))
    done = saved("--green")
    assert done.parseoutcomes().keys() & {"failed", "errors"}
    done.stdout.fnmatch_lines([message])


def test_the_marker_is_known_to_strict_projects(project):
    project("--strict-markers").assert_outcomes(skipped=1)


def test_the_plugin_alone_loads_neither_torch_nor_pydantic(pytester):
    pytester.makepyfile(
        "import sys\n"
        "def test_light():\n"
        "    assert not {'torch', 'pydantic', 'scipy'} & set(sys.modules)\n"
    )
    done = pytester.runpytest_subprocess(
        "-p", "minference_green.pytest_plugin", "-p", "no:hypothesispytest"
    )
    done.assert_outcomes(passed=1)
