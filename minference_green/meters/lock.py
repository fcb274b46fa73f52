"""One measurement per GPU: a lock file, so that two runs never share a counter unknowingly."""

import errno
import fcntl
import os
import tempfile
from pathlib import Path

from minference_green.meters.faults import DeviceInUseError, NotPermittedError


class DeviceLock:
    """Holds a GPU until :meth:`close`, or until this process ends.

    Raises ``DeviceInUseError`` while another process, of any user, holds it.
    """

    def __init__(self, uuid: str, directory: Path | None = None) -> None:
        self.path = (directory or Path(tempfile.gettempdir())) / f"minference-green-{uuid}.lock"
        self._file = _open(self.path)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._file)
            raise DeviceInUseError(uuid, str(self.path)) from error

    def close(self) -> None:
        """Let others measure. The file stays: removing it would race with the next holder."""
        os.close(self._file)


def _open(path: Path) -> int:
    # Never through a link that somebody else put into the shared directory. A lock needs no
    # right to write, so another user's file serves as well.
    for flags in (os.O_RDWR | os.O_CREAT, os.O_RDONLY):
        try:
            return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        except OSError as error:
            refused = error
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                break
    raise NotPermittedError(
        f"the lock file {path} ({refused.strerror})", "set TMPDIR to a directory you can write to"
    ) from refused
