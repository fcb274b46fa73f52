"""``green-bench measure -- CMD``: the command's own behaviour is untouched, its cost is told."""

import json
import signal
import sys
import time

import pytest


@pytest.fixture
def meter(tmp_path):
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps({"gpus": [{"watts": 300}]}))
    return f"simulated:{file}"


def python(code):
    return [sys.executable, "-c", code]


def test_output_and_exit_code_are_the_commands_and_the_cost_stands_on_stderr(
    green_bench, meter
) -> None:
    code = "import time; time.sleep(0.5); print('hello'); raise SystemExit(7)"
    done = green_bench("measure", "--meter", meter, "--country", "FRA", "--", *python(code))
    assert (done.returncode, done.stdout) == (7, "hello\n")
    for words in ("GPU-51a0-0", "by simulated", "peak 300 W", "FRA", "exit code 7", "embodied"):
        assert words in done.stderr, words


def test_the_record_holds_joules_grams_and_seconds(green_bench, meter, tmp_path) -> None:
    out = tmp_path / "cost.json"
    done = green_bench(
        "measure", "--meter", meter, "--country", "FRA", "--pue", "1.2", "--embodied", "0.01",
        "--embodied-source", "a study", "--quiet", "--output", out, "--",
        *python("import time; time.sleep(2.2)"),
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    cost = json.loads(out.read_text())
    assert cost["joules"] == pytest.approx(300 * cost["seconds"], rel=0.01)
    assert cost["seconds"] > 2.2
    grams = cost["joules"] / 3.6e6 * 1.2 * cost["carbon"]["factor"]["g_per_kwh"]
    assert cost["operational_grams"] == pytest.approx(grams, rel=1e-9)
    assert cost["embodied_grams"] == pytest.approx(0.01 * cost["seconds"], rel=1e-9)
    assert cost["doubts"] == []


def test_json_goes_to_stderr_because_stdout_is_the_commands(green_bench, meter) -> None:
    done = green_bench("measure", "--meter", meter, "--json", "--", *python("print(1)"))
    assert done.stdout == "1\n"
    assert json.loads(done.stderr)["exit_code"] == 0


def test_options_after_the_command_are_the_commands_own(green_bench, meter) -> None:
    done = green_bench(
        "measure", "--meter", meter, sys.executable, "-c", "import sys; print(sys.argv[1:])",
        "--json", "--quiet",
    )  # fmt: skip
    assert done.stdout == "['--json', '--quiet']\n"


def test_a_short_command_is_marked(green_bench, meter) -> None:
    done = green_bench("measure", "--meter", meter, "--", "sleep", "1")
    assert done.returncode == 0
    assert "! short" in done.stderr
    assert "below 2 s; measure it for longer\n" in done.stderr
    assert "--window" not in done.stderr  # which measure does not have


def test_signals_reach_the_command_and_its_end_is_still_measured(start, meter) -> None:
    code = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(42))\n"
        "print('ready', flush=True)\n"
        "time.sleep(30)"
    )
    process = start("measure", "--meter", meter, "--", *python(code))
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 42
    assert "GPU-51a0-0" in err


def test_a_command_that_a_signal_ends_has_a_shells_exit_code(green_bench, meter) -> None:
    code = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    done = green_bench("measure", "--meter", meter, "--", *python(code))
    assert done.returncode == 128 + signal.SIGKILL


def test_a_process_left_behind_is_named_and_not_waited_for(green_bench, meter) -> None:
    code = "import subprocess; subprocess.Popen(['sleep', '4'], start_new_session=True)"
    begun = time.monotonic()
    done = green_bench("measure", "--meter", meter, "--json", "--", "sh", "-c",
                       f'{sys.executable} -c "{code}"')  # fmt: skip
    cost = json.loads(done.stderr)
    assert cost["seconds"] < 3.5, time.monotonic() - begun
    assert any("sleep" in doubt and "still running" in doubt for doubt in cost["doubts"])


def test_a_source_that_fails_meanwhile_costs_the_joules_and_not_the_exit_code(
    green_bench, tmp_path
) -> None:
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps({"gpus": [{"watts": 300, "faults": {"stuck_from": 3.0}}]}))
    wait = python("import time; time.sleep(4)")
    done = green_bench("measure", "--meter", f"simulated:{file}", "--json", "--", *wait)
    assert done.returncode == 5
    assert "the command ran" in done.stderr
    assert "stood still" in done.stderr
    failing = [*wait[:2], wait[2] + "; raise SystemExit(3)"]
    done = green_bench("measure", "--meter", f"simulated:{file}", "--", *failing)
    assert done.returncode == 3
    assert "n/a" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--", "no-such-command-here"], "cannot start no-such-command-here"),
        (["--country", "ATLANTIS", "--", "true"], "ATLANTIS"),
        (["--embodied", "1", "--", "true"], "--embodied-source"),
        (["--meter", "toaster", "--", "true"], "toaster"),
        (["--output", "/proc/none/x", "--", "true"], "--output"),
        ([], "Missing argument"),
    ],
)
def test_wrong_input_runs_nothing(call, arguments, message) -> None:
    code, _, err = call("measure", *arguments)
    assert code == 2
    assert message in err
    assert "Traceback" not in err
