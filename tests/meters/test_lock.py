"""Two measurements on one GPU refuse each other."""

import os
import subprocess
import sys

import pytest

from minference_green.meters.faults import DeviceInUseError, NotPermittedError
from minference_green.meters.lock import DeviceLock

HOLD = (
    "import sys; from pathlib import Path; from minference_green.meters.lock import DeviceLock;"
    "DeviceLock('GPU-a', Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
)


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline().strip() == "held"
    yield process
    process.kill()
    process.communicate()


def test_another_process_that_measures_is_refused_with_its_lock_named(holder, tmp_path):
    with pytest.raises(DeviceInUseError, match=r"GPU-a.*\.lock"):
        DeviceLock("GPU-a", tmp_path)


def test_another_gpu_is_free(holder, tmp_path):
    DeviceLock("GPU-b", tmp_path).close()


def test_a_holder_that_was_killed_holds_nothing(holder, tmp_path):
    holder.kill()
    holder.wait()
    DeviceLock("GPU-a", tmp_path).close()


def test_closing_frees_the_gpu(tmp_path):
    DeviceLock("GPU-a", tmp_path).close()
    DeviceLock("GPU-a", tmp_path).close()


def test_a_planted_link_is_not_followed(tmp_path):
    (tmp_path / "minference-green-GPU-a.lock").symlink_to(tmp_path / "victim")
    with pytest.raises(NotPermittedError, match="TMPDIR"):
        DeviceLock("GPU-a", tmp_path)
    assert not (tmp_path / "victim").exists()


def test_a_directory_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(NotPermittedError, match="TMPDIR"):
        DeviceLock("GPU-a", tmp_path / "absent")


def test_another_users_lock_file_serves_as_well(tmp_path, monkeypatch):
    """Theirs may be read and not written; the test itself may run as root."""
    (tmp_path / "minference-green-GPU-a.lock").touch()
    real = os.open

    def open_file(path, flags, *arguments):
        if flags & os.O_RDWR:
            raise PermissionError(13, "Permission denied")
        return real(path, flags, *arguments)

    monkeypatch.setattr(os, "open", open_file)
    lock = DeviceLock("GPU-a", tmp_path)
    with pytest.raises(DeviceInUseError):
        DeviceLock("GPU-a", tmp_path)
    lock.close()
