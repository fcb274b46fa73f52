"""``green-bench doctor`` at the command line."""

import json
from pathlib import Path

import pytest


def spec(tmp_path, **gpu):
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps({"gpus": [{"watts": 600, **gpu}]}))
    return f"simulated:{file}"


def test_an_honest_simulated_gpu_passes_in_a_few_seconds(green_bench, tmp_path) -> None:
    out = tmp_path / "found.json"
    done = green_bench("doctor", "--meter", spec(tmp_path), "--output", out)
    assert done.returncode == 0, done.stderr
    assert "simulated GPU" in done.stdout
    for name in ("idle", "counter period", "counter lag", "steady load", "pulses at"):
        assert name in done.stdout
    machine, gpu = json.loads(out.read_text())
    assert (machine["device"], gpu["device"], gpu["outcome"]) == ("machine", "GPU-51a0-0", "OK")


def test_a_counter_that_reads_low_fails_with_exit_code_5_and_advice(green_bench, tmp_path) -> None:
    low = spec(tmp_path, faults={"scale_from": 0.0, "scale": 0.9})
    done = green_bench("doctor", "--meter", low, "--json", "--quiet")
    assert done.returncode == 5
    assert "steady load" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    _, gpu = json.loads(done.stdout)
    assert gpu["outcome"] == "FAIL"
    assert any(c["outcome"] == "FAIL" and "driver" in c["advice"] for c in gpu["checks"])


def test_findings_of_a_device_that_does_not_exist_are_not_kept(
    green_bench, tmp_path, monkeypatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    green_bench("doctor", "--meter", spec(tmp_path), "--quiet")
    assert not (tmp_path / "cache").exists()


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="has a GPU")
def test_without_a_gpu_it_says_what_is_possible(green_bench) -> None:
    done = green_bench("doctor")
    assert done.returncode == 0, done.stderr
    assert "No GPU here" in done.stdout
    assert "host energy" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--meter", "rapl"], "--meter rapl cannot be examined"),
        (["--meter", "simulated:none.json"], "none.json"),
        (["--output", "/proc/none/x"], "--output"),
    ],
)
def test_wrong_input_ends_with_one_sentence(green_bench, arguments, message) -> None:
    done = green_bench("doctor", *arguments, "--quiet")
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_failed_check_marks_the_windows_of_later_runs_as_disputed(
    green_bench, small, tmp_path, monkeypatch
) -> None:
    """The findings travel in the fingerprint, and the reason stands in the report."""
    from minference_green.diagnosis import Check, Diagnosis, cache_directory, store
    from minference_green.results import load

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    failed = Check(name="steady load", outcome="FAIL", finding="off", advice="update")
    found = Diagnosis(
        created_at="2026-05-01T10:00:00+00:00",
        device="GPU-51a0-0",
        name="simulated GPU",
        driver="none",
        full=False,
        checks=(failed,),
    )
    store(found, cache_directory())
    done = green_bench(
        "run", *small, "--blocks", "1", "--meter", spec(tmp_path), "--output", tmp_path / "out"
    )
    assert done.returncode == 0, done.stderr
    [directory] = (tmp_path / "out").iterdir()
    run = load(directory)
    [mark] = run.header.fingerprint.doctor
    assert (mark.device, mark.outcome, mark.failing) == ("GPU-51a0-0", "FAIL", ("steady load",))
    assert all(r.disputed for w in run.windows for r in w.readings)
    assert all(w.valid for w in run.windows)
    assert "green-bench doctor of 2026-05-01" in done.stdout
    done = green_bench("verify", directory)
    assert done.returncode == 0, done.stdout + done.stderr
