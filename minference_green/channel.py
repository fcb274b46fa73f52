"""JSON lines between the run's parent process and the worker that holds the model."""

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Self

Message = dict[str, Any]


class Channel:
    """One side of a two-way pipe; a message is one JSON object a line.

    File descriptors of its own rather than stdin and stdout, so that a library that prints
    cannot break the conversation.
    """

    def __init__(self, read_fd: int, write_fd: int) -> None:
        self._reader = os.fdopen(read_fd, "r", encoding="utf-8")
        self._writer = os.fdopen(write_fd, "w", encoding="utf-8")

    def send(self, type_: str, **fields: Any) -> None:
        """Send one message; raises ``BrokenPipeError`` when the other side is gone."""
        self._writer.write(json.dumps({"type": type_, **fields}) + "\n")
        self._writer.flush()

    def receive(self) -> Message | None:
        """The next message, or ``None`` when the other side closed."""
        line = self._reader.readline()
        if not line.endswith("\n"):
            return None
        message: Message = json.loads(line)
        return message

    def waiting(self) -> bool:
        """Whether the other side has said something, or closed, that :meth:`receive` would give.

        Holds in a conversation of question and answer, where no second message is buffered.
        """
        return bool(select.select([self._reader], [], [], 0)[0])

    def ask(self, type_: str, **fields: Any) -> Message:
        """Send one message and wait for the answer; raises ``EOFError`` if none comes."""
        self.send(type_, **fields)
        answer = self.receive()
        if answer is None:
            raise EOFError("the other process closed the channel")
        return answer

    def close(self) -> None:
        """Close both directions."""
        self._reader.close()
        with contextlib.suppress(BrokenPipeError):  # closing flushes; nobody is left to read
            self._writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def die_with_parent() -> None:
    """Ask Linux to end this process with its parent, even one killed with SIGKILL."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() == 1:
        sys.exit(1)


class WorkerProcess:
    """A worker started in a session of its own, so that Ctrl-C reaches only the parent."""

    def __init__(self, module: str, log: Path) -> None:
        ours_read, theirs_write = os.pipe()
        theirs_read, ours_write = os.pipe()
        self.log = log
        self.channel = Channel(ours_read, ours_write)
        with log.open("ab") as log_file:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", module, str(theirs_read), str(theirs_write)],
                pass_fds=(theirs_read, theirs_write),
                stdin=subprocess.DEVNULL,
                stdout=log_file,
                stderr=log_file,
                start_new_session=True,
                # CUDA's own order is not NVML's; a UUID check follows all the same.
                env={**os.environ, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"},
            )
        os.close(theirs_read)
        os.close(theirs_write)

    def awake(self) -> bool:
        """Block until the process has its libraries and waits; false if it ended before.

        It uses no device and no processor then until it is spoken to again.
        """
        try:
            self.channel.ask("wake")
        except (EOFError, BrokenPipeError):
            return False
        return True

    def discard(self) -> None:
        """Kill a process that has been given nothing to do."""
        self._process.kill()
        self.stop()

    def stop(self) -> int:
        """End the process if it still runs; its exit code, negative for a signal."""
        self.channel.close()
        try:
            return self._process.wait(timeout=2.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()
