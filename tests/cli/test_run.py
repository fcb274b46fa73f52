"""The main job from the command line: windows, interruptions, wrong turns."""

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from minference_green import bench
from minference_green.api import SILENT
from minference_green.errors import UsageError
from minference_green.results import (
    Backends,
    BlockDone,
    Extension,
    Idle,
    Observation,
    Run,
    Setup,
    Skip,
    Window,
    load,
)

GreenBench = Callable[..., subprocess.CompletedProcess[str]]
Start = Callable[..., subprocess.Popen[str]]


def only_run(output: Path) -> Path:
    (directory,) = output.iterdir()
    return directory


@pytest.fixture(scope="module")
def finished(
    green_bench: GreenBench, small: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> tuple[subprocess.CompletedProcess[str], Run]:
    output = tmp_path_factory.mktemp("finished")
    done = green_bench("run", *small, "--country", "FRA", "--output", output)
    return done, load(only_run(output))


def test_a_run_exits_0_and_prints_a_table_of_both_arms(
    finished: tuple[subprocess.CompletedProcess[str], Run],
) -> None:
    done, _ = finished
    assert done.returncode == 0, done.stderr
    for word in ("dense", "minference", "planted weights", "FRA", "J/Mtok", "density"):
        assert word in done.stdout


def test_every_block_is_a_process_with_both_arms_in_abba_order(
    finished: tuple[subprocess.CompletedProcess[str], Run],
) -> None:
    _, run = finished
    assert run.complete
    orders = [[w.method for w in run.windows if w.block == b] for b in (0, 1)]
    assert orders[0] == ["dense", "minference", "minference", "dense"]
    assert orders[1] == ["minference", "dense", "dense", "minference"]


def test_windows_last_as_asked_and_count_their_tokens(
    finished: tuple[subprocess.CompletedProcess[str], Run],
) -> None:
    _, run = finished
    for window in run.windows:
        assert window.tokens == 300 * window.repeats
        assert window.seconds >= 0.2
        assert window.joules is not None
        assert window.joules > 0


def test_the_file_tells_the_whole_story_in_order(
    finished: tuple[subprocess.CompletedProcess[str], Run],
) -> None:
    _, run = finished
    kinds = [e.event for e in run.events]
    first = kinds[: kinds.index("block_done") + 1]
    assert first == [
        "backends", "setup", "observation", "observation", "idle", *["window"] * 4, "idle",
        "block_done",
    ]  # fmt: skip
    backends = next(run.of(Backends))
    timed = {name: s for name, s in backends.seconds.items() if s is not None}
    assert backends.chosen == min(timed, key=lambda name: timed[name])
    assert all(s.load_seconds > 0 and s.readings for s in run.of(Setup))
    assert {i.when for i in run.of(Idle)} == {"before", "after"}


def test_the_sparse_arm_tells_its_density_and_what_it_lost(
    finished: tuple[subprocess.CompletedProcess[str], Run],
) -> None:
    _, run = finished
    dense, sparse = run.of(Observation)
    assert dense.density == 1.0
    assert 0 < sparse.density <= 1
    assert sparse.logits_relative_error is not None
    assert sparse.top1_agreement is not None
    assert sparse.sampled_positions == 300
    assert dense.faithfulness is None
    lost = sparse.faithfulness
    assert lost.layers == (0, 1, 2)
    assert lost.recall.worst_head < lost.recall.mean < 1 + 1e-6
    assert lost.prompt.top1_agreement == sparse.top1_agreement


def test_json_carries_the_same_run(
    green_bench: GreenBench, small: tuple[str, ...], tmp_path: Path
) -> None:
    done = green_bench("run", *small, "--blocks", "1", "--json", "--quiet", "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert data["header"]["run_id"] == only_run(tmp_path).name


def wait_for_window(output: Path, process: subprocess.Popen[str]) -> Path:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        for file in output.glob("*/run.jsonl"):
            if b'"event":"window"' in file.read_bytes():
                return file.parent
        time.sleep(0.02)
    raise AssertionError(process.communicate())


def workers_of(log: Path) -> list[int]:
    """Processes that have the worker's log open."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "fd" / "2").resolve() == log.resolve():
                found.append(int(process.name))
        except OSError:
            continue
    return found


def test_ctrl_c_leaves_a_usable_run_that_resume_completes(
    start: Start, green_bench: GreenBench, small: tuple[str, ...], tmp_path: Path
) -> None:
    process = start("run", *small, "--output", tmp_path)
    directory = wait_for_window(tmp_path, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"--resume {directory.name} --output {tmp_path}" in err
    assert "dense" in out
    assert "Traceback" not in err
    assert not workers_of(directory / "worker.log")
    before = load(directory).windows

    done = green_bench("run", "--resume", directory.name, "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    run = load(directory)
    assert run.complete
    assert run.windows[: len(before)] == before


def test_ctrl_c_before_the_first_window_says_so_and_leaves_nothing(
    start: Start, small: tuple[str, ...], tmp_path: Path
) -> None:
    process = start("run", *small, "--output", tmp_path)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("*/worker.log")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "nothing had been measured yet" in err
    assert "Traceback" not in err
    assert out == ""
    assert not list(tmp_path.iterdir())


def test_kill_9_loses_no_finished_window_and_leaves_no_orphan(
    start: Start, green_bench: GreenBench, small: tuple[str, ...], tmp_path: Path
) -> None:
    process = start("run", *small, "--output", tmp_path)
    directory = wait_for_window(tmp_path, process)
    process.kill()
    process.communicate(timeout=60)
    deadline = time.monotonic() + 10
    while workers_of(directory / "worker.log") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not workers_of(directory / "worker.log")
    assert load(directory).windows

    assert green_bench("report", directory).returncode == 0
    done = green_bench("run", "--resume", directory.name, "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    assert load(directory).complete


def test_a_finished_run_is_sealed_and_an_edit_of_it_is_refused(
    green_bench: GreenBench, small: tuple[str, ...], tmp_path: Path
) -> None:
    green_bench("run", *small, "--blocks", "1", "--output", tmp_path)
    directory = only_run(tmp_path)
    assert load(directory).sealed
    file = directory / "run.jsonl"
    file.write_text(file.read_text().replace('"batch":1', '"batch":2'))
    for verb in (["report", directory], ["run", "--resume", directory.name, "--output", tmp_path]):
        done = green_bench(*verb)
        assert done.returncode == 5
        assert "was changed after it was sealed" in done.stderr


def test_a_finished_run_takes_more_blocks_and_its_file_says_so(
    green_bench: GreenBench, small: tuple[str, ...], tmp_path: Path
) -> None:
    green_bench("run", *small, "--blocks", "1", "--output", tmp_path)
    directory = only_run(tmp_path)
    bench.extend(directory, 2, "inconclusive at 1 block", SILENT)
    run = load(directory)
    assert run.complete
    assert run.sealed
    assert {w.block for w in run.windows} == {0, 1}
    (told,) = run.of(Extension)
    assert (told.blocks, told.reason) == (2, "inconclusive at 1 block")
    assert [e.event for e in run.events].count("seal") == 2
    assert "2 blocks (1 at first, then extended)" in green_bench("report", directory).stdout
    with pytest.raises(UsageError, match="already plans 2 blocks"):
        bench.extend(directory, 1, "", SILENT)


def test_resuming_a_finished_run_prints_it_again(
    green_bench: GreenBench, small: tuple[str, ...], tmp_path: Path
) -> None:
    green_bench("run", *small, "--blocks", "1", "--output", tmp_path)
    directory = only_run(tmp_path)
    before = (directory / "run.jsonl").read_bytes()
    done = green_bench("run", "--resume", directory.name, "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    assert (directory / "run.jsonl").read_bytes() == before


def test_a_run_does_not_go_on_with_other_kernels(
    green_bench: GreenBench, small: tuple[str, ...], tmp_path: Path
) -> None:
    green_bench("run", *small, "--blocks", "1", "--output", tmp_path)
    directory = only_run(tmp_path)
    file = directory / "run.jsonl"
    text = file.read_text().replace('"blocks":1', '"blocks":2')
    text = text[: text.index('{"event":"seal"')]
    hash_now = load(directory).header.fingerprint.kernel_hash
    file.write_text(text.replace(hash_now, "0" * len(hash_now)))
    done = green_bench("run", "--resume", directory.name, "--output", tmp_path)
    assert done.returncode == 4
    assert "kernel_hash changed" in done.stderr


def test_a_method_of_the_users_own_is_measured(
    green_bench: GreenBench, small: tuple[str, ...], tmp_path: Path
) -> None:
    done = green_bench(
        "run", *small, "--blocks", "1", "--methods", "dense,mine:Local",
        "--method-option", "mine:Local.window=32", "--output", tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    run = load(only_run(tmp_path))
    assert run.header.methods[1].parameters == {"window": 32}
    assert [w.method for w in run.windows] == ["dense", "local", "local", "dense"]
    own = next(o for o in run.of(Observation) if o.method == "local")
    assert own.density is None
    assert own.density_reason
    assert own.logits_relative_error is not None


@pytest.mark.parametrize("length", [1, 0])
def test_a_prompt_in_which_nothing_can_be_left_out_is_refused_before_anything_is_started(
    tmp_path: Path, length: int
) -> None:
    """Of one token's attention there is but one kind; two tokens are the least to compare."""
    request = bench.Request(model="planted:tiny", context_lengths=(300, length))
    with pytest.raises(UsageError, match=f"length of {length} .* give 2 tokens or more"):
        bench.run(request, tmp_path, SILENT)
    assert list(tmp_path.iterdir()) == []


def test_two_tokens_are_enough_to_compare(green_bench: GreenBench, tmp_path: Path) -> None:
    done = green_bench(
        "run", "--model", "planted:tiny", "--context", "2", "--blocks", "1", "--window", "0.05",
        "--warmup", "0.01", "--quiet", "--output", tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert {w.method for w in load(only_run(tmp_path)).windows} == {"dense", "minference"}


def test_a_cell_out_of_memory_is_skipped_with_the_reason_and_the_rest_goes_on(
    green_bench: GreenBench, small: tuple[str, ...], tmp_path: Path
) -> None:
    done = green_bench(
        "run", *small, "--context", "300,400", "--methods", "dense,mine:Greedy",
        "--output", tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    run = load(only_run(tmp_path))
    skips = list(run.of(Skip))
    assert [(s.context_length, s.block) for s in skips] == [(400, 0)]
    assert "Tried to allocate 99 GiB" in skips[0].reason
    measured = {(w.context_length, w.method) for w in run.windows if w.block == 1}
    assert len(measured) == 3
    assert "99 GiB" in done.stdout


def test_a_worker_the_system_kills_costs_its_cell_and_no_more(
    green_bench: GreenBench, small: tuple[str, ...], tmp_path: Path
) -> None:
    done = green_bench("run", *small, "--methods", "dense,mine:Killed", "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    run = load(only_run(tmp_path))
    (skip,) = run.of(Skip)
    assert "killed" in skip.reason
    assert {w.method for w in run.windows} == {"dense"}
    assert len(list(run.of(BlockDone))) == 2


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--methods", "dense,mine:Broken"], 5, "a wrong turn"),
        (["--methods", "dense,mine:no_attend"], 2, "attend"),
        (["--methods", "dense,mine:Nothing"], 2, "Nothing"),
        (["--methods", "dense,sparse"], 2, "sparse"),
        (["--model", "planted:huge"], 2, "planted:huge"),
        (["--model", "./nowhere"], 2, "nowhere"),
        (["--context", "64m"], 2, "--allow-longer"),
        (["--method-option", "minference.pattern_file=none.json"], 2, "none.json"),
        (["--method-option", "minference.pattern_file=one_head.json"], 2, "1 layers of 1 heads"),
        (["--method-option", "minference.pattern_file=bad_head.json"], 2, "layer 0, head 0"),
        (["--method-option", "minference.slash=3"], 2, "slash"),
        (["--device", "cuda"], 2, "cuda"),
        (["--device", "toaster"], 2, "toaster"),
        (["--meter", "toaster"], 2, "toaster"),
        (["--meter", "nvml"], 2, "nvml"),
        (["--meter", "simulated:none.json"], 2, "none.json"),
    ],
)
def test_what_only_the_worker_can_refuse_ends_in_one_sentence_and_leaves_no_litter(
    green_bench: GreenBench,
    small: tuple[str, ...],
    tmp_path: Path,
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    done = green_bench("run", *small, *arguments, "--quiet", "--output", tmp_path / "out")
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    kept = [p.name for p in (tmp_path / "out").rglob("*") if p.is_file()]
    if "worker.log" in done.stderr:
        assert sorted(kept) == ["run.jsonl", "worker.log"]
    else:
        assert not kept


def test_two_runs_in_one_output_directory_do_not_meet(
    start: Start, small: tuple[str, ...], tmp_path: Path
) -> None:
    pair = [start("run", *small, "--blocks", "1", "--output", tmp_path) for _ in range(2)]
    for process in pair:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    runs = [load(d) for d in tmp_path.iterdir()]
    assert len(runs) == 2
    assert all(r.complete for r in runs)


def test_without_energy_joules_are_null_and_times_stay(
    green_bench: GreenBench, small: tuple[str, ...], tmp_path: Path
) -> None:
    done = green_bench("run", *small, "--blocks", "1", "--no-energy", "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    run = load(only_run(tmp_path))
    assert all(w.joules is None and w.valid for w in run.windows)
    assert "n/a" in done.stdout


def test_the_simulated_meter_is_named_wherever_its_joules_are(
    green_bench: GreenBench, small: tuple[str, ...], tmp_path: Path
) -> None:
    spec = tmp_path / "gpu.json"
    spec.write_text(json.dumps({"gpus": [{"watts": 300, "name": "simulated GPU"}]}))
    done = green_bench(
        "run", *small, "--blocks", "1", "--window", "1s", "--meter", f"simulated:{spec}",
        "--output", tmp_path / "out",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "simulated" in done.stdout
    for window in load(only_run(tmp_path / "out")).windows:
        assert isinstance(window, Window)
        assert window.joules == pytest.approx(300.0 * window.seconds, rel=0.02)
