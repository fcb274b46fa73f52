"""What parents share: energy read edge to edge, and every way a worker can end told apart."""

import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from minference_green.channel import WorkerProcess
from minference_green.errors import ExitCode, MeasurementError, UsageError
from minference_green.journal import Record
from minference_green.parent import LOG_NAME, Metering, converse, failure, killed_in, new_journal


class Line(Record):
    text: str


def meter(name: str = "gpu", calls: list[str] | None = None, **doings: Any) -> SimpleNamespace:
    """A source that notes what is asked of it."""
    told = [] if calls is None else calls
    doing = {
        "begin": lambda: told.append(f"begin {name}"),
        "end": lambda start, end: told.append(f"end {name}") or [],
        "state": list,
        "description": f"a {name} source",
        "devices": (),
    }
    return SimpleNamespace(**(doing | doings))


def metering(*meters: SimpleNamespace) -> Metering:
    made = Metering("none", allow_shared=False)
    made.meters = list(meters)
    return made


def test_the_host_is_read_after_the_gpus_whose_edges_must_lie_near_the_work() -> None:
    """Sources are opened with the host last; an interval begins and ends them in that order."""
    calls: list[str] = []
    both = metering(meter("gpu", calls), meter("host", calls))
    both.begin()
    both.end(0.0, 1.0)
    assert calls == ["begin gpu", "begin host", "end gpu", "end host"]


def test_energy_is_described_by_all_sources_or_as_not_measured() -> None:
    assert metering(meter("gpu"), meter("host")).description == "a gpu source; a host source"
    assert metering().description == "not measured"


def test_an_interval_that_cannot_be_read_is_excused_once_in_a_row() -> None:
    reads = iter([True, False, True, False, False])

    def end(start: float, end: float) -> list[str]:
        if not next(reads):
            raise MeasurementError("the counter is gone")
        return ["joules"]

    source = metering(meter(end=end))
    assert source.end_or_reason(0.0, 1.0) == (("joules",), ())
    assert source.end_or_reason(1.0, 2.0) == ((), ("the counter is gone",))
    assert source.end_or_reason(2.0, 3.0) == (("joules",), ())
    assert source.end_or_reason(3.0, 4.0) == ((), ("the counter is gone",))
    with pytest.raises(MeasurementError, match="the counter is gone"):
        source.end_or_reason(4.0, 5.0)


def test_a_new_worker_may_fail_to_be_read_once_more() -> None:
    def end(start: float, end: float) -> list[str]:
        raise MeasurementError("unlucky")

    source = metering(meter(end=end))
    for _ in range(2):
        source.open({"kind": "cpu"})
        assert source.end_or_reason(0.0, 1.0) == ((), ("unlucky",))


def test_sources_are_opened_once_for_all_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[tuple[Any, ...]] = []

    def open_meters(kind: str, *, gpu_uuids: list[str], allow_shared: bool) -> list[Any]:
        opened.append((kind, gpu_uuids, allow_shared))
        return [meter()]

    monkeypatch.setattr("minference_green.parent.open_meters", open_meters)
    shared = Metering("nvml", allow_shared=True)
    for _ in range(2):
        shared.open({"kind": "gpu", "uuid": "GPU-a"})
    assert opened == [("nvml", ["GPU-a"], True)]


def test_a_job_that_fails_before_its_first_record_leaves_no_directory(tmp_path: Path) -> None:
    with pytest.raises(UsageError), new_journal(tmp_path / "job" / "run.jsonl"):
        (tmp_path / "job" / LOG_NAME).write_text("a warning\n")
        raise UsageError("no such model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kept", ["a record", "a traceback"])
def test_a_record_or_a_traceback_outlives_a_failed_job(tmp_path: Path, kept: str) -> None:
    with (
        pytest.raises(MeasurementError),
        new_journal(tmp_path / "job" / "run.jsonl") as journal,
    ):
        if kept == "a record":
            journal.append(Line(text="measured"))
        else:
            (tmp_path / "job" / LOG_NAME).write_text("Traceback (most recent call last):\n")
        raise MeasurementError("the worker failed")
    assert (tmp_path / "job" / "run.jsonl").exists()


def test_an_error_keeps_its_exit_code_and_a_crash_names_the_log() -> None:
    told = {"type": "error", "message": "no such method", "exit_code": int(ExitCode.USAGE)}
    assert failure(told, Path("x.log")).exit_code == ExitCode.USAGE
    assert str(failure(told, Path("x.log"))) == "no such method"
    crash = failure({"type": "crash", "message": "KeyError: 1"}, Path("x.log"))
    assert crash.exit_code == ExitCode.INVALID_MEASUREMENT
    assert str(crash) == "the worker failed: KeyError: 1; the traceback is in x.log"


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Start a worker that runs a few lines of Python, with a ``channel``."""

    def start(body: str) -> WorkerProcess:
        code = (
            "import os, signal, sys\n"
            "from minference_green.channel import Channel\n"
            "channel = Channel(int(sys.argv[1]), int(sys.argv[2]))\n"
            "device = channel.receive()\n"
        ) + textwrap.dedent(body)
        (tmp_path / "stand_in.py").write_text(code)
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{':'.join(filter(None, sys.path))}")
        return WorkerProcess("stand_in", tmp_path / LOG_NAME)

    return start


def test_a_worker_is_answered_until_it_is_done(worker: Any) -> None:
    asked = []

    def answer(message: dict[str, Any]) -> dict[str, Any]:
        asked.append((message["type"], message.get("heard")))
        return {"number": len(asked)}

    process = worker(
        """
        first = channel.ask("hello", heard=device["name"])
        channel.ask("again", heard=first["number"])
        channel.send("done")
        """
    )
    try:
        converse(process, "cpu", answer)
    finally:
        process.stop()
    assert asked == [("hello", "cpu"), ("again", 1)]


def test_a_worker_that_the_system_kills_gives_up_the_cell_it_was_in(worker: Any) -> None:
    process = worker("os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises((EOFError, BrokenPipeError)):
        converse(process, "cpu", dict)
    skip = killed_in((8192, "minference"), 2, process)
    assert (skip.block, skip.context_length, skip.method) == (2, 8192, "minference")
    assert skip.reason == "the system killed the worker at 8k, likely out of memory"


@pytest.mark.parametrize(
    ("end", "cell", "code"),
    [("os.kill(os.getpid(), signal.SIGKILL)", None, -9), ("sys.exit(7)", (8192, "dense"), 7)],
)
def test_a_worker_that_ended_otherwise_is_an_error_that_names_its_output(
    worker: Any, end: str, cell: tuple[int, str] | None, code: int
) -> None:
    process = worker(end)
    with pytest.raises((EOFError, BrokenPipeError)):
        converse(process, "cpu", dict)
    said = rf"ended unexpectedly \(exit code {code}\); its output is in .*{LOG_NAME}"
    with pytest.raises(MeasurementError, match=said):
        killed_in(cell, 0, process)
