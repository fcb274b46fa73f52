"""Parent and worker talk in JSON lines and notice when the other side is gone."""

import os
from pathlib import Path

import pytest

from minference_green.channel import Channel, WorkerProcess


def channels() -> tuple[Channel, Channel]:
    first_read, second_write = os.pipe()
    second_read, first_write = os.pipe()
    return Channel(first_read, first_write), Channel(second_read, second_write)


def test_a_message_arrives_with_its_fields() -> None:
    ours, theirs = channels()
    with ours, theirs:
        ours.send("window", start=1.5, method="dense")
        assert theirs.receive() == {"type": "window", "start": 1.5, "method": "dense"}


def test_a_closed_side_reads_as_none_and_cannot_be_asked() -> None:
    ours, theirs = channels()
    theirs.close()
    with ours, pytest.raises(BrokenPipeError):
        ours.ask("ready")
    ours, theirs = channels()
    with theirs:
        ours.close()
        assert theirs.receive() is None


def test_a_worker_that_ends_early_is_noticed_and_its_words_kept(tmp_path: Path) -> None:
    worker = WorkerProcess("minference_green.no_such_module", tmp_path / "log")
    assert worker.channel.receive() is None
    assert worker.stop() == 1
    assert "no_such_module" in (tmp_path / "log").read_text()


def test_stopping_twice_is_harmless(tmp_path: Path) -> None:
    worker = WorkerProcess("minference_green.no_such_module", tmp_path / "log")
    worker.stop()
    assert worker.stop() == 1
