"""The front door: quick help, a version, one sentence per error."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import minference_green

GreenBench = Callable[..., subprocess.CompletedProcess[str]]


def test_version_names_the_command(green_bench: GreenBench) -> None:
    done = green_bench("--version")
    assert (done.returncode, done.stdout) == (0, f"green-bench {minference_green.__version__}\n")


def test_help_lists_the_verbs_and_every_exit_code(green_bench: GreenBench) -> None:
    done = green_bench("--help")
    assert done.returncode == 0
    for word in (
        "run",
        "report",
        "0 pass",
        "1 proven",
        "2 usage",
        "3 incon",
        "4 not",
        "5 meas",
        "130 ",
    ):
        assert word in done.stdout


def test_an_output_that_takes_nothing_more_is_no_regression() -> None:
    """Exit code 1 would be one; a traceback would not say what is full."""
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "minference_green.cli.app", "--version"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 2
    assert done.stderr == "green-bench: cannot write the output: No space left on device\n"


def test_a_reader_that_has_gone_is_no_regression() -> None:
    """As under ``pipefail`` before a ``head`` that has seen enough."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-P", "-m", "minference_green.cli.app", "carbon", "list"],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--context", "8q"], "'8q' is not a context length"),
        (["run", "--methods", "dense,dense"], "names dense twice"),
        (["run", "--methods", ","], "names no method"),
        (["run", "--method-option", "slash_size=9"], "is not METHOD.KEY=VALUE"),
        (["run", "--method-option", "a-shape.n_init=9"], "a-shape"),
        (["run", "--method-option", "dense.x=1", "--method-option", "dense.x=2"], "given twice"),
        (["run", "--dtype", "int8"], "'int8' is not known"),
        (["run", "--window", "soon"], "'soon' is not a time"),
        (["run", "--window", "0s"], "more than 0 seconds"),
        (["run", "--window", "nan"], "more than 0 seconds"),
        (["run", "--prompt", "no-such.txt"], "No such file"),
        (["run", "--prompt", "/dev/zero"], "--prompt /dev/zero is a pipe or a device"),
        (["run", "--country", "ATLANTIS"], "ATLANTIS"),
        (["run", "--intensity", "-3", "--intensity-source", "me"], "-3"),
        (["run", "--pue", "0.5"], "0.5"),
        (["run", "--output", "/proc/none"], "--output"),
        (["run", "--output", "/dev/null/x"], "--output"),
        (["run", "--resume", "nothing"], "there is no run at"),
        (["run", "--resume", "nothing", "--model", "x"], "cannot be given with --resume"),
        (["run", "--blocks", "0"], "--blocks 0 must be 1 or more"),
        (["run", "--batch", "-1"], "--batch -1 must be 1 or more"),
        (["run", "--mdoel", "x"], "--mdoel"),
        (["rnu"], "rnu"),
        (["report", "no-such-run"], "no-such-run"),
    ],
)
def test_wrong_input_ends_with_one_sentence_and_exit_code_2(
    call: Callable[..., tuple[int, str, str]], arguments: list[str], message: str
) -> None:
    code, out, err = call(*arguments)
    assert code == 2, err
    assert message in err
    assert "Traceback" not in err
    assert out == ""


def test_debug_shows_the_traceback(green_bench: GreenBench) -> None:
    done = green_bench("run", "--context", "8q", "--debug")
    assert done.returncode == 2
    assert "Traceback" in done.stderr
