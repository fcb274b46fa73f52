"""Decode and whole requests beside prefill, from the command line."""

import json

import pytest
import torch

from minference_green.results import Note, load


@pytest.fixture(scope="module")
def phased(green_bench, small, tmp_path_factory):
    output = tmp_path_factory.mktemp("phased")
    done = green_bench(
        "run", *small, "--decode", "7", "--batch", "2", "--country", "FRA", "--output", output
    )
    [directory] = output.iterdir()
    return done, load(directory), directory


def test_every_phase_has_windows_of_its_own_in_balanced_order(phased) -> None:
    done, run, _ = phased
    assert done.returncode == 0, done.stderr
    for block in (0, 1):
        for phase in ("prefill", "decode", "request"):
            names = [w.method for w in run.windows if (w.block, w.phase) == (block, phase)]
            assert names == names[::-1]
            assert len(names) == 4
    assert run.header.plan.decode_tokens == 7


def test_such_a_run_verifies(phased, green_bench) -> None:
    _, _, directory = phased
    done = green_bench("verify", directory)
    assert done.returncode == 0, done.stdout + done.stderr


def test_decode_counts_generated_tokens_less_the_one_that_prefill_produced(phased) -> None:
    _, run, _ = phased
    per_repeat = {"prefill": 2 * 300, "decode": 2 * 6, "request": 2 * 306}
    for window in run.windows:
        assert window.tokens == window.repeats * per_repeat[window.phase]


def test_the_report_shows_decode_apart_and_the_sum_beside_the_whole(phased, green_bench) -> None:
    done, run, directory = phased
    assert "Cost of decode per million generated tokens" in done.stdout
    assert "Sum - whole" in done.stdout
    data = json.loads(green_bench("report", directory, "--format", "json").stdout)
    assert [c["method"] for c in data["decode"]] == ["dense", "minference"]
    for cell in data["decode"]:
        # The CPU here is shared with others: parts and whole are only of one size.
        assert abs(cell["time_closure"]["value"]) < 0.5
        assert cell["joules_per_mtok"]["value"] > 0
    # The prefill rows are those of prefill windows alone.
    dense = next(c for c in data["cells"] if c["method"] == "dense")
    used = [w for w in run.windows if w.method == "dense" and w.phase == "prefill"]
    assert dense["windows_used"] == len(used)


@pytest.mark.parametrize("tokens", ["1", "-4"])
def test_fewer_than_two_tokens_are_refused(green_bench, tokens) -> None:
    done = green_bench("run", "--decode", tokens)
    assert done.returncode == 2
    assert "must be 2 or more" in done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu_decode_is_replayed_and_no_note_says_otherwise(green_bench, tmp_path) -> None:
    # Shared: the tests' own process may have a context on the GPU, from kernels it tested before.
    done = green_bench(
        "run", "--model", "planted:tiny", "--context", "32k", "--decode", "65", "--blocks", "1",
        "--window", "3s", "--warmup", "5s", "--dtype", "bfloat16", "--allow-shared",
        "--output", tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    [directory] = tmp_path.iterdir()
    run = load(directory)
    assert not [note.message for note in run.of(Note) if "CUDA graphs" in note.message]
    assert {w.phase for w in run.windows if w.valid} == {"prefill", "decode", "request"}
