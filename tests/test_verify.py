"""Recomputing: what is on file follows from its raw numbers, or is named."""

import pytest

from minference_green.meters.evidence import Edge, bracket, recompute
from minference_green.render.document import document
from minference_green.render.export import as_csv
from minference_green.render.markdown import markdown
from minference_green.results import Setup, Window
from minference_green.verify import verify


def with_evidence(run):
    """The run as a counter would have written it: 100 W beside every window."""

    def backed(window):
        start, end = window.start_seconds, window.end_seconds
        total = window.joules + 20
        raw = bracket(
            Edge(start - 0.2, 0.0),
            Edge(start - 0.1, 10.0),
            Edge(end + 0.1, 10.0 + total),
            Edge(end + 0.2, 20.0 + total),
            start,
            end,
        )
        (reading,) = window.readings
        reading = reading.model_copy(update={"evidence": raw, "joules": recompute(raw)})
        return window.model_copy(update={"readings": (reading,)})

    events = tuple(backed(e) if isinstance(e, Window) else e for e in run.events)
    return run.model_copy(update={"events": events})


@pytest.fixture
def run(six_blocks):
    return with_evidence(six_blocks)


def changed(run, place=5, **fields):
    """The run with one field of one window changed."""
    events = list(run.events)
    windows = [i for i, e in enumerate(events) if isinstance(e, Window)]
    events[windows[place]] = events[windows[place]].model_copy(update=fields)
    return run.model_copy(update={"events": tuple(events)})


def changed_reading(run, **fields):
    (reading,) = run.windows[5].readings
    return changed(run, readings=(reading.model_copy(update=fields),))


def test_a_run_that_follows_from_its_evidence_has_no_problems(run):
    found = verify(run)
    assert found.problems == ()
    assert (found.windows, found.readings, found.sealed) == (48, 48, False)


def test_joules_that_do_not_follow_are_named_with_both_figures(run):
    (problem,) = verify(changed_reading(run, joules=run.windows[5].joules * 1.0001)).problems
    assert problem.startswith("block 0, window 2 (dense): GPU-1 has ")
    assert "its evidence gives" in problem


def test_joules_without_evidence_are_a_problem(run):
    (problem,) = verify(changed_reading(run, evidence={})).problems
    assert "come without the numbers behind them" in problem


def test_a_window_moved_against_its_evidence_is_found(run):
    late = run.windows[5].end_seconds + 1
    problems = verify(changed(run, end_seconds=late)).problems
    assert any("the window's end is" in p for p in problems)


def test_tokens_that_are_not_repeats_times_prompt_are_found(run):
    (problem,) = verify(changed(run, tokens=run.windows[5].tokens + 1)).problems
    assert "3 repeats are 196608" in problem


def test_a_window_that_cannot_be_valid_is_found(run):
    (problem,) = verify(changed(run, device_seconds=run.windows[5].seconds * 1.5)).problems
    assert "counted as valid, but host clock says" in problem


def test_a_window_left_out_without_a_reason_is_found(run):
    (problem,) = verify(changed(run, valid=False)).problems
    assert "left out without a reason" in problem


def test_a_dispute_that_was_hidden_is_found(run):
    (reading,) = run.windows[5].readings
    raw = reading.evidence | {"check_tolerance_joules": 1.0}
    hidden = changed_reading(run, evidence=raw, check_joules=reading.joules + 5, disputed=False)
    (problem,) = verify(hidden).problems
    assert "says disputed: false" in problem
    assert verify(changed_reading(run, evidence=raw, check_joules=reading.joules)).problems == ()


def test_readings_outside_windows_are_recomputed_too(run):
    reading = run.windows[0].readings[0]
    wrong = reading.model_copy(update={"joules": 1.0})
    setup = Setup(block=9, load_seconds=1.0, warmup_seconds=1.0, readings=(wrong,))
    (problem,) = verify(run.model_copy(update={"events": (*run.events, setup)})).problems
    assert problem.startswith("block 9, setup: GPU-1 has 1 J")


def test_reports_beside_the_run_must_be_what_it_says(run, tmp_path):
    (tmp_path / "report.md").write_text(markdown(document(run)))
    (tmp_path / "report.csv").write_text(as_csv(run))
    found = verify(run, tmp_path)
    assert (found.reports, found.problems) == (("report.md", "report.csv"), ())
    text = (tmp_path / "report.md").read_text()
    (tmp_path / "report.md").write_text(text.replace("H200", "H100", 1))
    (problem,) = verify(run, tmp_path).problems
    assert problem.startswith("report.md is not what green-bench report makes of this run")


def test_a_report_of_an_unfinished_run_holds_its_place_in_the_resume_line(six_blocks, tmp_path):
    run = with_evidence(six_blocks)
    plan = run.header.plan.model_copy(update={"blocks": 7})
    run = run.model_copy(update={"header": run.header.model_copy(update={"plan": plan})})
    (tmp_path / "report.md").write_text(markdown(document(run, tmp_path)))
    assert verify(run, tmp_path).problems == ()


def test_every_changed_byte_of_a_bundle_makes_verify_exit_with_another_code(
    run, store, tmp_path, monkeypatch, capsys
):
    import sys

    from minference_green.cli.app import main

    directory = store(run)
    (directory / "report.md").write_text(markdown(document(run)))

    def code():
        monkeypatch.setattr(sys, "argv", ["green-bench", "verify", str(directory)])
        with pytest.raises(SystemExit) as stop:
            main()
        return stop.value.code

    assert code() == 0
    for name, step in (("run.jsonl", 997), ("report.md", 211)):
        raw = (directory / name).read_bytes()
        for place in [*range(0, len(raw), step), len(raw) - 1]:
            spoiled = bytearray(raw)
            spoiled[place] ^= 1
            (directory / name).write_bytes(spoiled)
            assert code() in (2, 3, 5), (name, place)
        (directory / name).write_bytes(raw)
    assert code() == 0
    capsys.readouterr()
