"""Runs of the real command, small enough for a test."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from minference_green.cli.app import main

SMALL = (
    "--model", "planted:tiny", "--context", "300", "--window", "0.2s", "--warmup", "0.1s",
    "--blocks", "2", "--device", "cpu",
)  # fmt: skip

README = Path(__file__).resolve().parents[2] / "README.md"

UNLUCKY = '''
import os, signal


class Greedy(Local):
    """Does not fit above 300 tokens."""

    name = "greedy"

    def attend(self, q, k, v, *, scale, layer):
        if q.shape[2] > 300:
            raise torch.OutOfMemoryError("Tried to allocate 99 GiB")
        return super().attend(q, k, v, scale=scale, layer=layer)


class Killed(Local):
    """Ends as a process does that the system kills for its memory."""

    name = "killed"

    def attend(self, q, k, v, *, scale, layer):
        os.kill(os.getpid(), signal.SIGKILL)


class Broken(Local):
    name = "broken"

    def attend(self, q, k, v, *, scale, layer):
        raise RuntimeError("a wrong turn")


no_attend = "just text"
'''

GreenBench = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory that holds a user's own methods, the README's among them."""
    directory = tmp_path_factory.mktemp("work")
    from_readme = README.read_text().split("```python\n")[1].split("```")[0]
    one_head = json.dumps([{"0": ["vertical_and_slash", 30, 800, 1.0]}])
    (directory / "one_head.json").write_text(one_head)
    (directory / "bad_head.json").write_text(one_head.replace("vertical_and_slash", "spiral"))
    (directory / "mine.py").write_text(from_readme + UNLUCKY)
    return directory


@pytest.fixture(scope="session")
def start(workdir: Path) -> Callable[..., subprocess.Popen[str]]:
    """Start ``green-bench`` with the given arguments."""

    def begin(*arguments: object) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "minference_green.cli.app", *map(str, arguments)],
            cwd=workdir,
            env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # A job in a shell's background ignores Ctrl-C, and so would all it starts.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    return begin


@pytest.fixture(scope="session")
def green_bench(start: Callable[..., subprocess.Popen[str]]) -> GreenBench:
    """Run ``green-bench`` to its end."""

    def call(*arguments: object) -> subprocess.CompletedProcess[str]:
        process = start(*arguments)
        out, err = process.communicate(timeout=300)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    return call


@pytest.fixture
def call(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., tuple[int, str, str]]:
    """``green-bench`` in this process, from an empty directory: exit code, stdout, stderr."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)

    def begin(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["green-bench", *map(str, arguments)])
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return begin


@pytest.fixture(scope="session")
def small() -> tuple[str, ...]:
    """Arguments of a run that takes seconds."""
    return SMALL
