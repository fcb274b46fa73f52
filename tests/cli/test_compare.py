"""``compare`` and ``baseline`` from the command line, on stored runs."""

import json
import math

import pytest

WOBBLE = (0.004, -0.006, 0.002, 0.005, -0.003, -0.002)


@pytest.fixture
def run_at(make_run, store):
    """A stored run whose sparse arm costs a share of dense."""

    def build(ratio, name, **more):
        minference = [[100 * ratio * math.exp(w)] for w in WOBBLE]
        energy = {(8192, "dense"): [[100.0]] * 6, (8192, "minference"): minference}
        return store(make_run(energy, **more), name)

    return build


def test_compare_exits_0_whatever_comes_out_unless_told_to_fail(call, run_at):
    then, worse = run_at(0.6, "then"), run_at(0.66, "worse")
    code, out, _ = call("compare", then, worse)
    assert code == 0
    assert out.startswith("FAIL at a margin of 5.0%")
    assert call("compare", then, worse, "--fail-on", "regression")[0] == 1
    assert call("compare", then, then, "--fail-on", "regression")[0] == 0
    # 63/60 lies on the margin: not proven, so not failed.
    assert call("compare", then, run_at(0.63, "open"), "--fail-on", "regression")[0] == 0


def test_json_carries_outcome_reasons_and_the_exit_code_it_would_have(call, run_at):
    code, out, _ = call("compare", run_at(0.6, "then"), run_at(0.66, "worse"), "--json")
    data = json.loads(out)
    assert code == 0
    assert (data["outcome"], data["reasons"], data["exit_code"]) == ("fail", ["worse"], 1)
    assert data["criteria"][0]["change"]["value"] == pytest.approx(0.1)


def test_the_margin_is_the_users(call, run_at):
    then, worse = run_at(0.6, "then"), run_at(0.66, "worse")
    for margin in ("20%", "20 %", "0.2"):
        assert call("compare", then, worse, "--margin", margin)[1].startswith("PASS")


def test_baselines_are_named_on_either_side(call, run_at):
    run = run_at(0.6, "first")
    code, out, _ = call("baseline", "save", "main", run)
    assert (code, out) == (0, "Saved first as baseline main in reports/baselines/main\n")
    assert call("compare", "baseline:main", run_at(0.66, "worse"))[1].startswith("FAIL")
    assert call("compare", run, "baseline:main")[1].startswith("PASS")


def test_promote_says_how_the_new_run_differs(call, run_at):
    call("baseline", "save", "main", run_at(0.6, "first"))
    code, out, _ = call("baseline", "promote", "main", run_at(0.5, "better"))
    assert code == 0
    assert "now holds 2 runs" in out
    assert "IMPROVED" in out
    listed = call("baseline", "list")[1]
    assert listed.startswith("main: 2 run(s), newest 2026-05-01")
    shown = json.loads(call("baseline", "show", "main", "--json")[1])
    assert [r["run_id"] for r in shown["runs"]] == ["first", "better"]
    assert "sha256" in call("baseline", "show", "main")[1]
    assert json.loads(call("baseline", "list", "--json")[1])[0]["name"] == "main"


def test_promote_refuses_a_run_from_other_ground_and_keeps_the_baseline(call, run_at):
    call("baseline", "save", "main", run_at(0.6, "first"))
    other = run_at(0.6, "other", fingerprint={"dtype": "float16"})
    code, _, err = call("baseline", "promote", "main", other)
    assert code == 4
    assert "dtype: bfloat16 -> float16" in err
    assert "1 run(s)" in call("baseline", "list")[1]


def test_no_baselines_are_said_to_be_none(call):
    assert call("baseline", "list")[1].startswith("no baselines in reports/baselines")


def test_an_allowed_mismatch_stands_in_the_output(call, run_at):
    then = run_at(0.6, "then")
    other = run_at(0.6, "other", fingerprint={"dtype": "float16"})
    code, _, err = call("compare", then, other)
    assert code == 4
    assert "--allow-mismatch dtype" in err
    code, out, _ = call("compare", then, other, "--allow-mismatch", "dtype")
    assert code == 0
    assert "differ in dtype, which was allowed" in out


def edited(directory):
    file = directory / "run.jsonl"
    file.write_text(file.read_text().replace('"batch":2', '"batch":3', 1))


def another_schema(directory):
    file = directory / "run.jsonl"
    file.write_text(file.read_text().replace('"schema_version":"1.0"', '"schema_version":"2.0"'))


def emptied(directory):
    (directory / "run.jsonl").write_text("")


@pytest.mark.parametrize(
    ("spoil", "code", "message"),
    [
        (edited, 5, "was changed after it was sealed"),
        (another_schema, 4, "has schema 2.0, this version reads 1.x"),
        (emptied, 2, "holds no complete header line"),
    ],
)
def test_a_spoiled_run_is_refused_in_one_sentence(call, run_at, spoil, code, message):
    then, now = run_at(0.6, "then"), run_at(0.6, "now")
    spoil(now)
    for pair in ((then, now), (now, then)):
        found, out, err = call("compare", *pair)
        assert (found, out) == (code, "")
        assert message in err
        assert len(err.strip().splitlines()) == 1


def test_runs_that_cannot_be_compared_each_say_why(call, run_at, make_run, store):
    then = run_at(0.6, "then")
    keys = ((8192, "dense"), (8192, "minference"))
    hot = {(b, o, m): "thermal slowdown" for b in range(6) for o, (_, m) in enumerate(keys)}
    no_windows = make_run({k: [[100.0]] * 6 for k in keys})
    no_windows = no_windows.model_copy(
        update={"events": tuple(e for e in no_windows.events if e.event != "window")}
    )
    cases = [
        (run_at(0.6, "hot", invalid=hot), 5, "100% of the windows of run hot are invalid"),
        (store(no_windows, "void"), 5, "run void holds no windows"),
        (run_at(0.6, "replayed", obtained="replayed"), 4, "energy: counter -> replayed"),
        ("baseline:none", 4, "there is no baseline none"),
        ("no-such-run", 2, "cannot read run no-such-run"),
    ]
    for now, code, message in cases:
        found, out, err = call("compare", then, now)
        assert (found, out) == (code, ""), message
        assert message in err


def test_a_folder_that_is_no_run_is_told_from_one(call, run_at, tmp_path):
    then = run_at(0.6, "then")
    (tmp_path / "audits/one").mkdir(parents=True)
    (tmp_path / "audits/one/audit.jsonl").touch()
    (tmp_path / "nothing").mkdir()
    for now, message in {
        "audits/one": "it is an audit, and a run is asked for",
        "audits": f"it is a folder of 1 others; name one of them, such as {tmp_path}/audits/one",
        "nothing": "give the directory of a run or an audit",
    }.items():
        code, out, err = call("compare", then, tmp_path / now)
        assert (code, out) == (2, "")
        assert f"{now} holds no run.jsonl: {message}" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--margin", "lots"], "--margin 'lots' is not a margin"),
        (["--margin", "0%"], "more than 0 %"),
        (["--margin", "500%"], "less than 100 %"),
        (["--margin", "nan"], "more than 0 %"),
        (["--allow-mismatch", "gpu"], "gpu: no such hard key"),
        (["--fail-on", "monday"], "monday"),
    ],
)
def test_wrong_arguments_end_with_exit_code_2(call, run_at, arguments, message):
    then = run_at(0.6, "then")
    code, out, err = call("compare", then, then, *arguments)
    assert (code, out) == (2, "")
    assert message in err


def test_a_margin_below_the_noise_floor_is_refused(call, run_at, make_run, store):
    then = run_at(0.6, "then")
    wobble = [[100 * math.exp(w)] for w in WOBBLE]
    equal = {(8192, "dense"): [[100.0]] * 6, (8192, "dense-again"): wobble}
    call("baseline", "save", "calibration", store(make_run(equal), "equal"))
    code, out, err = call("compare", then, then, "--margin", "0.1%")
    assert (code, out) == (2, "")
    assert "is below" in err
    assert call("compare", then, then)[0] == 0
