"""Baselines: what is stored is what is read, and nothing stands in for what is missing."""

import math
import subprocess
from datetime import datetime, timedelta

import pytest

from minference_green import baseline, fingerprint
from minference_green.baseline import BaselineMissingError
from minference_green.errors import ExitCode, MeasurementError, UsageError
from minference_green.journal import SealError
from minference_green.results import run_file

WOBBLE = (0.004, -0.006, 0.002, 0.005, -0.003, -0.002)
CREATED = datetime.fromisoformat("2026-05-01T10:00:00+00:00")


@pytest.fixture
def run_of(make_run):
    def build(ratio=0.6, **more):
        minference = [[100 * ratio * math.exp(w)] for w in WOBBLE]
        return make_run({(8192, "dense"): [[100.0]] * 6, (8192, "minference"): minference}, **more)

    return build


@pytest.fixture
def root(tmp_path):
    return tmp_path / "baselines"


@pytest.fixture
def saved(root, run_of, store):
    return baseline.save(root, "main", store(run_of(), "first"))


def test_a_saved_run_reads_back_and_is_known_by_its_hash(root, saved, run_of):
    assert baseline.names(root) == ("main",)
    found = baseline.read(root, "main")
    assert found == saved
    assert found.runs[0].windows == run_of().windows
    assert [s.run_id for s in found.stored] == ["first"]


def test_promote_appends_and_keeps_the_order(root, saved, run_of, store):
    baseline.promote(root, "main", store(run_of(), "second"))
    assert [s.run_id for s in baseline.read(root, "main").stored] == ["first", "second"]
    with pytest.raises(UsageError, match="already holds run second"):
        baseline.promote(root, "main", store(run_of(), "second-again").parent / "second")


def test_a_name_that_exists_is_replaced_only_when_asked(root, saved, run_of, store):
    other = store(run_of(), "other")
    with pytest.raises(UsageError, match="baseline main exists"):
        baseline.save(root, "main", other)
    baseline.save(root, "main", other, replace=True)
    assert [s.run_id for s in baseline.read(root, "main").stored] == ["other"]
    assert sorted(f.name for f in (root / "main").iterdir()) == ["baseline.json", "other.jsonl"]


def test_a_missing_baseline_names_those_there_are_and_exits_4(root, saved):
    with pytest.raises(BaselineMissingError, match=r"no baseline mian .*there: main") as error:
        baseline.read(root, "mian")
    assert error.value.exit_code == ExitCode.NOT_COMPARABLE


@pytest.mark.parametrize("file", ["baseline.json", "first.jsonl"])
def test_any_changed_byte_of_a_baseline_is_found(root, saved, file):
    path = root / "main" / file
    raw = path.read_bytes()
    for place in range(0, len(raw), 1 if file == "baseline.json" else 97):
        changed = bytearray(raw)
        changed[place] ^= 1
        path.write_bytes(changed)
        with pytest.raises(SealError, match="was changed after it was stored"):
            baseline.read(root, "main")


def test_a_run_file_that_is_gone_is_named(root, saved):
    (root / "main" / "first.jsonl").unlink()
    with pytest.raises(SealError, match=r"first.jsonl is missing; restore it"):
        baseline.read(root, "main")


def test_a_baseline_copied_under_another_name_is_not_that_baseline(root, saved):
    (root / "main").rename(root / "other")
    with pytest.raises(SealError):
        baseline.read(root, "other")


@pytest.mark.parametrize("name", ["", "../main", "a b", ".hidden", "a/b"])
def test_a_name_that_is_no_file_name_is_refused(root, name):
    with pytest.raises(UsageError, match="is no name for a baseline"):
        baseline.read(root, name)


def test_an_unfinished_run_is_no_baseline(root, run_of, store):
    with pytest.raises(UsageError, match=r"not finished \(5 of 6 blocks\)"):
        baseline.save(root, "main", store(run_of(blocks_finished=5), seal=False))


def test_a_run_of_invalid_windows_is_no_baseline(root, run_of, store):
    bad = {(b, o, m): "hot" for b in range(2) for o, m in enumerate(("dense", "minference"))}
    with pytest.raises(MeasurementError, match="33% of them invalid"):
        baseline.save(root, "main", store(run_of(invalid=bad)))


def test_a_place_that_cannot_be_written_is_named(tmp_path, run_of, store):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="--baselines"):
        baseline.save(tmp_path / "file", "main", store(run_of()))


def test_a_fresh_baseline_of_a_clean_tree_has_no_warning(saved):
    assert baseline.warnings(clean(saved), CREATED + timedelta(days=30)) == ()


def clean(found):
    stored = tuple(s.model_copy(update={"commit": None, "dirty": False}) for s in found.stored)
    return baseline.Baseline(found.name, found.directory, stored, found.runs)


def test_an_old_baseline_is_warned_of(saved):
    (warning,) = baseline.warnings(clean(saved), CREATED + timedelta(days=31))
    assert "is 31 days old" in warning
    assert "baseline promote main" in warning


def test_a_baseline_many_commits_back_is_warned_of(saved, monkeypatch):
    one = saved.stored[0].model_copy(update={"commit": "c0ffee", "dirty": False})
    found = baseline.Baseline("main", saved.directory, (one,), saved.runs)
    for commits, warned in ((100, False), (101, True)):
        monkeypatch.setattr(fingerprint, "commits_since", lambda *_, n=commits: n)
        assert any("101 commits old" in w for w in baseline.warnings(found, CREATED)) is warned


def test_a_dirty_tree_is_warned_of(root, run_of, store):
    run = run_of(fingerprint={"code_dirty": True})
    found = clean(baseline.save(root, "main", store(run)))
    (warning,) = baseline.warnings(found, CREATED)
    assert "uncommitted changes" in warning


def test_too_few_blocks_for_any_verdict_are_warned_of(root, make_run, store):
    run = make_run({(8192, "dense"): [[100.0]] * 3, (8192, "minference"): [[60.0]] * 3})
    found = clean(baseline.save(root, "main", store(run)))
    assert any("3 block(s)" in w for w in baseline.warnings(found, CREATED))


def test_the_repository_is_asked_for_commit_changes_and_distance(tmp_path):
    def git(*arguments):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, stdout=-3)

    assert fingerprint.repository_state(tmp_path) == (None, None)
    git("init", "-q")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-qm", "one")
    commit, dirty = fingerprint.repository_state(tmp_path)
    assert dirty is False
    (tmp_path / "file").write_text("2")
    assert fingerprint.repository_state(tmp_path) == (commit, True)
    git("commit", "-qam", "two")
    assert fingerprint.commits_since(commit, tmp_path) == 1
    assert fingerprint.commits_since("0" * 40, tmp_path) is None


def test_an_argument_means_a_run_or_the_runs_of_a_baseline(root, saved, run_of, store):
    path = store(run_of(), "path")
    assert [r.header.run_id for r in baseline.runs_of(str(path), root)] == ["path"]
    assert baseline.runs_of(str(run_file(path)), root) == baseline.runs_of(str(path), root)
    assert [r.header.run_id for r in baseline.runs_of("baseline:main", root)] == ["first"]
