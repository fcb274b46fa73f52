"""Where the joules go: each part replayed alone, from the command line and by hand."""

import pytest

from minference_green.render.document import document
from minference_green.results import Idle, Replay, Run, load
from minference_green.stats import breakdowns


@pytest.fixture(scope="module")
def broken_down(green_bench, small, tmp_path_factory):
    output = tmp_path_factory.mktemp("parts")
    done = green_bench("run", *small, "--breakdown", "--methods", "dense,minference,mine:Local",
                       "--output", output)  # fmt: skip
    assert done.returncode == 0, done.stderr
    [directory] = output.iterdir()
    return done, load(directory)


def test_each_part_of_each_arm_has_a_window_of_its_own_in_the_first_block(broken_down) -> None:
    done, run = broken_down
    assert done.returncode == 0, done.stderr
    parts = [(r.method, r.part) for r in run.of(Replay)]
    assert parts == [
        ("dense", "attention"), ("dense", "rest"),
        ("minference", "estimate"), ("minference", "index"),
        ("minference", "attention"), ("minference", "rest"),
        ("local", "attention"), ("local", "rest"),
    ]  # fmt: skip
    for replay in run.of(Replay):
        assert replay.block == 0
        assert replay.end_seconds - replay.start_seconds >= 0.2
        assert replay.repeats >= 1
        if replay.part != "rest":
            assert replay.layers[0] == 0
            assert replay.layers[-1] == replay.layers_in_all - 1
            assert len(replay.layers) <= 4


def test_the_table_says_what_was_replayed_and_how_the_sum_closes(broken_down) -> None:
    done, _ = broken_down
    assert "Where the joules of one prefill go" in done.stdout
    assert "with the inputs of layers 0," in done.stdout
    assert "Sum - whole" in done.stdout


def replay(window, part, joules, layers=()):
    made = window(joules)
    return Replay(
        block=0, context_length=4096, method="dense", part=part, layers=layers, layers_in_all=8,
        repeats=2, start_seconds=0.0, end_seconds=2.0, readings=made.readings,
    )  # fmt: skip


def test_parts_are_scaled_to_all_layers_and_held_against_the_whole(header, window) -> None:
    events = (
        window(300.0, repeats=3),
        replay(window, "attention", 60.0, (0, 7)),
        replay(window, "rest", 160.0),
        Idle(block=0, when="before", seconds=2.0, readings=window(20.0).readings),
    )
    [found] = breakdowns(Run(header=header, events=events))
    assert found.part_joules == {"attention": pytest.approx(120.0), "rest": pytest.approx(80.0)}
    assert found.closure == pytest.approx(1.0)
    # 10 W idle for the 2/3 s that a prefill of 100 J takes.
    assert found.idle_share == pytest.approx(10 * (2 / 3) / 100)


def test_a_part_without_joules_leaves_the_breakdown_out(header, window) -> None:
    events = (window(), replay(window, "attention", None, (0,)), replay(window, "rest", 160.0))
    run = Run(header=header, events=events)
    assert breakdowns(run) == ()
    assert not any("Where the joules" in s.caption for s in document(run).sheets)
