"""Decode figures from hand-made windows: apart from prefill, with the right denominator."""

import math

import pytest

from minference_green.render.document import document
from minference_green.results import BlockDone, Plan, Run
from minference_green.stats import cells, comparisons, decode_cells

FIGURES = {
    "prefill": (100.0, 10.0, 4096),
    "decode": (31.0, 4.0, 31),
    "request": (130.0, 14.1, 4127),
}


@pytest.fixture
def phased(header, window):
    """Two blocks of dense at 4096 tokens and 32 generated, each phase at its own cost."""
    events = []
    for block in (0, 1):
        for phase, (joules, seconds, tokens) in FIGURES.items():
            events.append(
                window(
                    5 * joules, block=block, phase=phase, repeats=5, tokens=5 * tokens,
                    start_seconds=0.0, end_seconds=5 * seconds,
                )
            )  # fmt: skip
        events.append(BlockDone(block=block))
    plan = Plan(blocks=2, window_seconds=2.0, warmup_seconds=5.0, quick=True, decode_tokens=32)
    return Run(header=header.model_copy(update={"plan": plan}), events=tuple(events))


def test_prefill_figures_do_not_see_decode_windows(phased) -> None:
    dense = cells(phased)[0]
    assert dense.joules_per_mtok.value == pytest.approx(100.0 / 4096 * 1e6)
    assert dense.ttft_seconds.value == pytest.approx(10.0)
    assert dense.windows_used == 2
    assert all(c.energy_saving.value is None for c in comparisons(phased))


def test_decode_is_per_generated_token_and_the_whole_is_a_request(phased) -> None:
    dense, sparse = decode_cells(phased)
    assert dense.joules_per_mtok.value == pytest.approx(1e6)
    assert dense.seconds_per_mtok.value == pytest.approx(4.0 / 31 * 1e6)
    assert dense.operational_g_per_mtok.value == pytest.approx(1e6 / 3.6e6 * 100.0)
    assert dense.joules_per_request.value == pytest.approx(130.0)
    assert sparse.joules_per_mtok.value is None
    assert sparse.joules_per_mtok.reason == "not measured"


def test_the_closure_is_the_sum_of_the_parts_over_the_whole(phased) -> None:
    dense = decode_cells(phased)[0]
    assert dense.energy_closure.value == pytest.approx(131 / 130 - 1)
    assert dense.time_closure.value == pytest.approx(14.0 / 14.1 - 1)
    assert not math.isnan(dense.energy_closure.low)


def test_a_run_without_decode_has_no_decode_rows_or_table(header, window) -> None:
    run = Run(header=header, events=(window(), BlockDone(block=0)))
    assert decode_cells(run) == ()
    assert not any("decode" in s.caption for s in document(run).sheets)


def test_the_table_shows_what_was_measured_and_why_the_rest_was_not(phased) -> None:
    [sheet] = [s for s in document(phased).sheets if "decode" in s.caption]
    dense, sparse = sheet.rows
    assert dense[2] == "32"
    assert "+0.77 %" in dense
    assert sparse[3].startswith("n/a")
