"""The settings file behind the commands: its values are defaults, and flags win."""

import math
from pathlib import Path

import pytest

from minference_green import bench
from minference_green.errors import UsageError

WOBBLE = (0.004, -0.006, 0.002, 0.005, -0.003, -0.002)


@pytest.fixture
def asked(monkeypatch):
    """Requests that reach the measuring loop."""
    found = []

    def refuse(request, output, progress):
        found.append((request, output))
        raise UsageError("not measured in this test")

    monkeypatch.setattr(bench, "run", refuse)
    return found


def settings(text):
    Path("green-bench.toml").write_text(text)


def test_run_takes_its_defaults_from_the_file_and_flags_win(call, asked):
    settings(
        '[run]\nmodel = "planted:tiny"\nmethods = ["dense", "a-shape"]\ncontext = ["1k", 2048]\n'
        'blocks = 4\nno-energy = true\ncountry = "FRA"\noutput = "elsewhere"\n'
        'method-option = ["a-shape.n_init=8", "a-shape.n_local=64"]\n'
    )
    call("run", "--quiet")
    call("run", "--quiet", "--blocks", "2", "--context", "4k")
    (first, output), (second, _) = asked
    assert first.model == "planted:tiny"
    assert first.methods == ("dense", "a-shape")
    assert first.context_lengths == (1024, 2048)
    assert (first.blocks, first.meter, first.grid.country) == (4, "none", "FRA")
    assert first.options == {"a-shape": {"n_init": "8", "n_local": "64"}}
    assert output == Path("elsewhere")
    assert (second.blocks, second.context_lengths) == (2, (4096,))


def test_an_unknown_key_ends_with_exit_code_2_and_the_nearest_name(call, asked):
    settings("[run]\nblock = 4\n")
    code, _, err = call("run", "--quiet")
    assert code == 2
    assert "green-bench.toml [run] has no key 'block'; did you mean 'blocks'?" in err
    assert asked == []


@pytest.mark.parametrize("text", ["[run]\nblocks = 'many'", "[run]\nblocks = [1, 2]"])
def test_a_value_of_the_wrong_kind_ends_with_exit_code_2(call, asked, text):
    settings(text)
    code, _, err = call("run", "--quiet")
    assert code == 2
    assert "--blocks" in err
    assert asked == []


@pytest.mark.parametrize("key", ["resume", "json", "quiet", "exit-zero", "margin"])
def test_what_belongs_to_one_call_or_elsewhere_is_no_setting(call, asked, key):
    settings(f"[check]\n{key} = true\n")
    assert f"[check] has no key '{key}'" in call("check")[2]


def test_a_command_that_has_no_settings_does_not_read_the_file(call):
    settings("[nonsense]\n")
    assert call("baseline", "list")[0] == 0


def run_at(make_run, ratio, length=8192):
    minference = [[100 * ratio * math.exp(w)] for w in WOBBLE]
    return make_run(
        {(length, "dense"): [[100.0]] * 6, (length, "minference"): minference},
        density={(length, "dense"): 1.0, (length, "minference"): ratio / 3},
    )


def test_the_criteria_of_the_file_are_judged_each_by_its_margin(call, make_run, store):
    then, now = store(run_at(make_run, 0.6), "then"), store(run_at(make_run, 0.66), "now")
    settings('[criteria]\nenergy_ratio = "20%"\ndensity = "5%"\n')
    code, out, _ = call("compare", then, now, "--fail-on", "regression")
    assert code == 1
    assert out.startswith("FAIL at margins of energy_ratio 20.0%, density 5.0%")
    settings('[criteria]\nenergy_ratio = "20%"\ndensity = "20%"\n')
    assert call("compare", then, now)[1].startswith("PASS at a margin of 20.0%")
    # The flag is about joules and leaves the rest of the file as it is.
    out = call("compare", then, now, "--margin", "5%")[1]
    assert out.startswith("FAIL at margins of energy_ratio 5.0%, density 20.0%")


def test_memory_that_no_run_recorded_is_an_open_question(call, make_run, store):
    run = store(run_at(make_run, 0.6))
    settings('[criteria]\nenergy_ratio = "5%"\nmemory = "2%"\n')
    out = call("compare", run, run)[1]
    assert out.startswith("INCONCLUSIVE")
    assert "no window recorded device memory" in out
    assert "Next look" not in out


def test_check_measures_with_the_options_run_has_by_default(call, asked, make_run, store):
    request = {"model": "planted:8b", "methods": ["dense", "minference"]}
    run = run_at(make_run, 0.6)
    header = run.header.model_copy(update={"request": request})
    call("baseline", "save", "release", store(run.model_copy(update={"header": header})))
    settings(
        '[run]\nmethod-option = ["minference.pattern_file=a.json"]\n[check]\nbaseline = "release"\n'
    )
    call("check", "--quiet")
    assert asked[0][0].options == {"minference": {"pattern_file": "a.json"}}
