"""The sampling process, for real: it samples, says why it cannot, and never outlives us."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from minference_green.meters.evidence import coverage
from minference_green.meters.sampler import REACH_SECONDS, Sampler


@pytest.fixture
def spec(tmp_path):
    file = tmp_path / "gpus.json"
    file.write_text(json.dumps({"gpus": [{"watts": 300}, {"watts": 125.5}]}))
    return str(file)


@pytest.fixture
def sampler(spec):
    running = Sampler(["simulated", spec, repr(time.monotonic())])
    running.wait_ready()
    yield running
    running.close()


def wait_for(condition, seconds=10.0):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.02)


def test_each_device_is_sampled_about_twenty_times_a_second(sampler):
    start = time.monotonic()
    time.sleep(1.0)
    end = time.monotonic()
    first, second = sampler.samples(0, start, end), sampler.samples(1, start, end)
    assert {s.watts for s in first} == {300.0}
    assert {s.watts for s in second} == {125.5}
    assert coverage(first, start, end, REACH_SECONDS) > 0.5
    assert len(first) <= 24
    assert [s.seconds for s in first] == sorted(s.seconds for s in first)
    assert first[0].seconds <= start


def test_late_samples_are_waited_for(sampler):
    """The end of a window may be asked for before its last sample has come."""
    end = time.monotonic() + 0.2
    assert sampler.samples(0, end - 0.2, end)[-1].seconds >= end


def test_a_killed_sampler_is_noticed_and_said(sampler):
    start = time.monotonic()
    os.kill(sampler.pid, signal.SIGKILL)
    wait_for(lambda: sampler.problem is not None)
    time.sleep(0.4)
    end = time.monotonic()
    assert "exit -9" in sampler.problem
    assert coverage(sampler.samples(0, start, end), start, end, REACH_SECONDS) < 0.9


def test_a_stopped_sampler_leaves_the_time_uncovered(sampler):
    os.kill(sampler.pid, signal.SIGSTOP)
    start = time.monotonic()
    time.sleep(1.2)
    end = time.monotonic()
    try:
        assert coverage(sampler.samples(0, start, end), start, end, REACH_SECONDS) < 0.3
        assert "behind" in sampler.problem
    finally:
        os.kill(sampler.pid, signal.SIGCONT)
    wait_for(lambda: sampler.problem is None)
    # What came after the pause does not fill the gap.
    assert coverage(sampler.samples(0, start, end), start, end, REACH_SECONDS) < 0.3


def test_closing_ends_the_process(spec):
    sampler = Sampler(["simulated", spec, "0.0"])
    sampler.wait_ready()
    assert psutil.pid_exists(sampler.pid)
    sampler.close()
    assert not psutil.pid_exists(sampler.pid)


def test_closing_ends_even_a_stopped_process(spec):
    sampler = Sampler(["simulated", spec, "0.0"])
    sampler.wait_ready()
    os.kill(sampler.pid, signal.SIGSTOP)
    sampler.close()
    assert not psutil.pid_exists(sampler.pid)


def test_it_ends_when_its_parent_is_killed(spec):
    code = (
        "import sys, time\n"
        "from minference_green.meters.sampler import Sampler\n"
        f"s = Sampler(['simulated', {spec!r}, '0.0'])\n"
        "s.wait_ready()\n"
        "print(s.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    assert psutil.pid_exists(pid)
    parent.kill()
    parent.wait()
    parent.stdout.close()

    def gone():
        try:
            return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    wait_for(gone)


def test_it_says_why_it_cannot_sample(tmp_path):
    sampler = Sampler(["simulated", str(tmp_path / "missing.json"), "0.0"])
    sampler.wait_ready()
    assert "exit 1" in sampler.problem
    assert "missing.json" in sampler.problem
    assert sampler.samples(0, 0.0, 1.0) == []
    sampler.close()


def test_a_device_that_vanishes_ends_it_with_the_reason(tmp_path):
    file = tmp_path / "gpus.json"
    file.write_text(json.dumps({"gpus": [{"watts": 1, "faults": {"vanish_at": 0.3}}]}))
    sampler = Sampler(["simulated", str(file), repr(time.monotonic() + 0.5)])
    wait_for(lambda: sampler.problem and "vanished" in sampler.problem)
    sampler.close()


def test_a_device_without_power_has_no_samples(tmp_path):
    file = tmp_path / "gpus.json"
    file.write_text(json.dumps({"gpus": [{"watts": 1, "power_fields": []}]}))
    sampler = Sampler(["simulated", str(file), repr(time.monotonic())])
    sampler.wait_ready()
    assert sampler.samples(0, 0.0, time.monotonic()) == []
    assert sampler.problem is None
    sampler.close()


def test_the_process_is_small():
    """It must not load what it samples beside: torch, numpy, or the records' library."""
    code = (
        "import sys; import minference_green.meters.sampler, minference_green.meters.nvml;"
        "print(sorted({'torch', 'numpy', 'pydantic', 'scipy', 'pandas'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert out.stdout.strip() == "[]", out.stderr


def test_a_line_that_a_killed_sampler_left_unfinished_is_no_sample(spec, tmp_path, monkeypatch):
    half = tmp_path / "half.py"
    half.write_text("print('1.0 300.0 125.5'); print('2.0 30', end='', flush=True)")
    begin = subprocess.Popen
    monkeypatch.setattr(
        "minference_green.meters.sampler.subprocess.Popen",
        lambda command, **settings: begin([sys.executable, str(half)], **settings),
    )
    sampler = Sampler(["simulated", spec, "0.0"])
    wait_for(lambda: "the sampler ended (exit 0)" in str(sampler.problem))
    assert [s.watts for s in sampler.samples(0, 0.0, 9.0)] == [300.0]
    assert [s.watts for s in sampler.samples(1, 0.0, 9.0)] == [125.5]
    sampler.close()
