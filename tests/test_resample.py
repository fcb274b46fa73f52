"""The resampling of recorded blocks: real figures, marked as replayed, and an honest exit code."""

import importlib.util
import random
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "resample.py"


@pytest.fixture(scope="module")
def resample():
    spec = importlib.util.spec_from_file_location("resample", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def recorded(make_run):
    def build(blocks, spread=0.01):
        draw = random.Random(3)

        def arm(base):
            return [[base * draw.gauss(1, spread) for _ in range(2)] for _ in range(blocks)]

        return make_run({(8192, "dense"): arm(100.0), (8192, "minference"): arm(60.0)})

    return build


def run_script(directory):
    return subprocess.run(
        [sys.executable, "-P", SCRIPT, directory], capture_output=True, text=True, check=False
    )


def test_a_replay_has_the_recorded_joules_and_says_what_they_are(resample, recorded):
    run = recorded(6)
    again = resample.replayed(run, [5, 2])
    assert {w.obtained for w in again.windows} == {"replayed"}
    taken = [w.joules for w in run.windows if w.block == 5]
    assert [w.joules for w in again.windows if w.block == 0] == taken
    assert again.complete


def test_a_change_raises_the_judged_arm_alone(resample, recorded):
    run = recorded(4)
    for before, after in zip(
        resample.replayed(run, range(4)).windows,
        resample.replayed(run, range(4), 0.1).windows,
        strict=True,
    ):
        factor = 1.0 if before.method == "dense" else 1.1
        assert after.joules == pytest.approx(before.joules * factor)


def test_stored_and_judged_blocks_are_never_the_same(resample, recorded, monkeypatch):
    drawn = []
    run = recorded(40)
    joules = {w.joules: w.block for w in run.windows if w.method == "dense"}

    def remember(then, now, blocks, change):
        drawn.append(({joules[w.joules] for w in then.windows if w.method == "dense"}, blocks))

    monkeypatch.setattr(resample, "checked", remember)
    list(resample.checks(run, 0.0, 1))
    assert len(drawn) == 20
    assert all(not a & set(b) and (len(a), len(b)) == (10, 16) for a, b in drawn)


def test_runs_of_one_experiment_are_pooled_and_numbered_through(resample, recorded):
    first, second = recorded(6), recorded(4)
    both = resample.pooled([first, second])
    assert both.blocks_done == frozenset(range(10))
    assert [w.joules for w in both.windows] == [w.joules for w in (*first.windows, *second.windows)]


def test_runs_of_two_experiments_are_not_pooled(resample, recorded, make_run):
    other = make_run({(8192, "dense"): [[100.0]] * 4, (8192, "a-shape"): [[60.0]] * 4})
    with pytest.raises(SystemExit, match="is another experiment than"):
        resample.pooled([recorded(6), other])


def test_blocks_with_a_planted_loss_are_judged_as_they_were_measured(resample, recorded, make_run):
    dearer = make_run({(8192, "dense"): [[100.0]] * 16, (8192, "minference"): [[72.0]] * 16})
    found = {v.outcome for v in resample.checks(recorded(40), 0.1, 1, dearer)}
    assert found == {"fail"}
    same = make_run({(8192, "dense"): [[100.0]] * 16, (8192, "minference"): [[60.0]] * 16})
    assert {v.outcome for v in resample.checks(recorded(40), 0.1, 1, same)} == {"pass"}
    with pytest.raises(SystemExit, match="6 worse blocks, and a check may take 16"):
        list(resample.checks(recorded(40), 0.1, 1, recorded(6)))


def test_on_a_steady_machine_20_of_20_are_right_on_either_side(recorded, store):
    done = run_script(store(recorded(40)))
    assert done.returncode == 0, done.stderr
    assert "as recorded: 20 checks (replayed): PASS 20, FAIL 0, INCONCLUSIVE 0" in done.stdout
    assert "joules +10%: 20 checks (replayed): PASS 0, FAIL 20, INCONCLUSIVE 0" in done.stdout


def test_a_gate_that_is_wrong_shows_in_the_exit_code(resample, recorded, store, monkeypatch):
    monkeypatch.setattr(resample, "CHANGE", 0.0)  # "raised" runs that are not: they pass
    monkeypatch.setattr(sys, "argv", ["resample.py", str(store(recorded(40)))])
    with pytest.raises(SystemExit) as stop:
        resample.main()
    assert stop.value.code == 1


def test_too_few_blocks_are_refused(recorded, store):
    done = run_script(store(recorded(39)))
    assert done.returncode == 1
    assert "has 39 blocks, resampling takes 40" in done.stderr
