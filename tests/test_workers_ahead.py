"""Workers of several blocks load their libraries side by side, before any of the blocks begins."""

from typing import ClassVar

import pytest

from minference_green import bench
from minference_green.bench import InterruptedRunError, Request
from minference_green.channel import WorkerProcess
from minference_green.errors import MeasurementError
from minference_green.results import load


class Watched(WorkerProcess):
    """Worker processes that are remembered, with what happened to them in order."""

    started: ClassVar[list[WorkerProcess]] = []
    story: ClassVar[list[str]] = []

    def __init__(self, module, log):
        super().__init__(module, log)
        self.started.append(self)
        self.story.append("start")

    def awake(self):
        self.story.append("awake")
        return super().awake()


class StopsAt:
    """Progress that is interrupted when a block begins."""

    def __init__(self, number):
        self.number = number

    def block(self, number, of, windows, window_seconds):
        Watched.story.append(f"block {number}")
        if number == self.number:
            raise KeyboardInterrupt

    def say(self, message): ...
    def advance(self): ...


REQUEST = Request(
    model="planted:tiny",
    context_lengths=(300,),
    blocks=3,
    window_seconds=0.1,
    warmup_seconds=0.01,
    meter="none",
)


@pytest.fixture
def watched(monkeypatch):
    monkeypatch.setattr(Watched, "started", [])
    monkeypatch.setattr(Watched, "story", [])
    monkeypatch.setattr(bench, "WorkerProcess", Watched)
    return Watched


def test_every_block_has_a_process_of_its_own_that_was_awake_before_and_none_outlives_the_run(
    watched, tmp_path
):
    with pytest.raises(InterruptedRunError):
        bench.run(REQUEST, tmp_path, StopsAt(2))
    together = ["start"] * 3 + ["awake"] * 3
    assert watched.story == [*together, "block 1", "block 2"]
    assert len({w._process.pid for w in watched.started}) == 3
    assert [w._process.poll() is None for w in watched.started] == [False] * 3
    (directory,) = tmp_path.iterdir()
    assert load(directory).blocks_done == {0}


def test_a_worker_that_cannot_load_its_libraries_ends_the_run(watched, tmp_path, monkeypatch):
    monkeypatch.setattr(
        watched,
        "__init__",
        lambda self, module, log: WorkerProcess.__init__(self, "minference_green.nowhere", log),
    )
    with pytest.raises(MeasurementError, match="the worker process ended unexpectedly"):
        bench.run(REQUEST, tmp_path, StopsAt(9))
