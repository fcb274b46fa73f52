"""No command touches the network, and the carbon commands say what they know."""

import json

import pytest

from minference_green.cli.app import app

BLOCK = """
import socket, sys

def refuse(*arguments, **_):
    with open({log!r}, "a") as log:
        log.write(f"{{sys.argv}} {{arguments[1:]}}\\n")
    raise OSError("the network is blocked in this test")

class Blocked(socket.socket):
    def connect(self, address):
        return super().connect(address) if self.family == socket.AF_UNIX else refuse(self, address)
    connect_ex = connect

socket.socket = Blocked
socket.getaddrinfo = refuse
"""


@pytest.fixture
def blocked(tmp_path, monkeypatch):
    """Every Python process from here on finds no network, and leaves a trace if it looks."""
    site, log = tmp_path / "site", tmp_path / "attempts"
    site.mkdir()
    (site / "sitecustomize.py").write_text(BLOCK.format(log=str(log)))
    monkeypatch.setenv("PYTHONPATH", str(site))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return log


def verbs():
    """Every command there is, as the words that call it."""
    found = {(c.name or c.callback.__name__,) for c in app.registered_commands}
    for group in app.registered_groups:
        commands = group.typer_instance.registered_commands
        found |= {(group.name, c.name or c.callback.__name__) for c in commands}
    return found


def test_the_block_itself_works(blocked, start) -> None:
    """A process that asks for the network leaves a trace."""
    import subprocess
    import sys

    code = "import socket; socket.create_connection(('127.0.0.1', 9))"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert "blocked in this test" in done.stderr
    assert blocked.exists()


def test_every_command_runs_without_a_network(blocked, green_bench, small, tmp_path) -> None:
    gpu = tmp_path / "gpu.json"
    gpu.write_text(json.dumps({"gpus": [{"watts": 300}]}))
    runs = tmp_path / "runs"
    assert green_bench("run", *small, "--country", "FRA", "--output", runs).returncode == 0
    [run] = runs.iterdir()
    root = ("--baselines", tmp_path / "baselines")
    seen = {("run",)}

    def call(*words, codes=(0,)):
        done = green_bench(*words)
        assert done.returncode in codes, (words, done.stderr)
        assert "Traceback" not in done.stderr
        names = {words[:2], words[:1]} & verbs()
        seen.update(names)

    call("report", run)
    call("verify", run)
    call("doctor", "--meter", f"simulated:{gpu}", "--quiet")
    call("doctor", "--quiet", codes=(0, 5))
    call("measure", "--meter", f"simulated:{gpu}", "--country", "FRA", "--", "sleep", "1")
    call("carbon", "list")
    call("carbon", "list", "--cloud")
    call("carbon", "show", "USA", "--region", "california")
    call("carbon", "project", run, "--prompts-per-day", "10", "--prompt-tokens", "300")
    call("baseline", "save", "main", run, *root)
    call("baseline", "list", *root)
    call("baseline", "show", "main", *root)
    call("baseline", "promote", "main", run, *root, codes=(0, 2))
    call("compare", run, run, codes=(0, 3))
    call("history", run, *root)
    call("check", "--baseline", "none", "--quiet", "--output", tmp_path / "c", *root, codes=(4,))
    text = tmp_path / "mine.txt"
    text.write_text("The pump moved 12.5 kg on 2024-02-29, not before. " * 40)
    call(
        "audit", "--text", text, "--context", "2k", "--methods", "a-shape", "--device", "cpu",
        "--output", tmp_path / "audits",
    )  # fmt: skip
    call("init", tmp_path / "project", codes=(0, 2))
    call(
        "calibrate", "--model", "planted:tiny", "--context", "300", "--window", "0.2s",
        "--warmup", "0.1s", "--blocks", "2", "--device", "cpu", "--output", tmp_path / "cal", *root,
    )  # fmt: skip
    assert seen == verbs(), f"not covered: {verbs() - seen}"
    assert not blocked.exists(), blocked.read_text()


def test_a_factor_is_shown_with_its_year_and_file(green_bench) -> None:
    done = green_bench("carbon", "show", "FRA")
    for words in ("56.039", "2023", "lifecycle", "global_energy_mix.json", "SHA-256"):
        assert words in done.stdout
    assert "assumed" in green_bench("carbon", "show").stdout


def test_the_lists_hold_known_places(green_bench) -> None:
    listed = green_bench("carbon", "list", "--json")
    grams = {f["location"][:3]: f["g_per_kwh"] for f in json.loads(listed.stdout)}
    assert grams["FRA"] == pytest.approx(56.039)
    assert grams["DEU"] == pytest.approx(381.0, abs=0.5)
    assert len(grams) > 150
    assert "430.000     -  gcp:us-central1" in green_bench("carbon", "list", "--cloud").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "ATLANTIS"], "ATLANTIS"),
        (["show", "FRA", "--cloud", "gcp:us-central1"], "give one location"),
        (["project", "no-run", "--prompts-per-day", "1", "--prompt-tokens", "8k"], "no-run"),
        (["project", "no-run"], "--prompts-per-day"),
    ],
)
def test_wrong_input_ends_with_one_sentence(call, arguments, message) -> None:
    code, _, err = call("carbon", *arguments)
    assert code == 2
    assert message in err
    assert "Traceback" not in err
