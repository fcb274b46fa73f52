"""The records of a run: what follows from them."""

from collections.abc import Callable
from pathlib import Path

from minference_green.journal import Journal
from minference_green.results import FILE_NAME, BlockDone, Extension, Header, Window, load

MakeWindow = Callable[..., Window]


def test_joules_of_a_window_are_null_when_any_headline_reading_is(window: MakeWindow) -> None:
    assert window(100.0).joules == 100.0
    assert window(None).joules is None


def test_a_reading_beside_the_headline_is_not_added(window: MakeWindow) -> None:
    both = window(100.0)
    host = both.readings[0].model_copy(update={"joules": 50.0, "headline": False})
    both = both.model_copy(update={"readings": (*both.readings, host)})
    assert both.joules == 100.0
    assert both.obtained == "modelled"


def test_an_extension_moves_the_plan_of_a_finished_run(tmp_path: Path, header: Header) -> None:
    file = tmp_path / FILE_NAME
    with Journal(file) as journal:
        journal.append(header)
        for block in (0, 1):
            journal.append(BlockDone(block=block))
    assert load(file).complete
    with Journal(file) as journal:
        journal.append(Extension(blocks=4, created_at="2026-01-02", reason="inconclusive"))
    run = load(file)
    assert (run.complete, run.blocks_planned, run.header.plan.blocks) == (False, 4, 2)
