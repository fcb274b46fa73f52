"""Recomputing an audit: what is on file follows from its raw numbers, or is named."""

import sys

import pytest

from minference_green.cli.app import main
from minference_green.journal import Journal
from minference_green.ledger import Answered, Spent
from minference_green.meters.evidence import Edge, bracket, recompute
from minference_green.render.audit import audit_document
from minference_green.render.audit_export import audit_csv, audit_json
from minference_green.render.audit_page import audit_page
from minference_green.render.markdown import markdown
from minference_green.render.table import plain
from minference_green.results import Reading
from minference_green.verify import verify_audit

REPORTS = {
    "report.txt": lambda audit, at: plain(audit_document(audit, at)),
    "report.md": lambda audit, at: markdown(audit_document(audit, at)),
    "report.csv": lambda audit, at: audit_csv(audit),
    "report.json": audit_json,
    "report.html": audit_page,
}


@pytest.fixture(scope="module")
def audit(planned):
    """An audit whose stretches a counter read at 100 W."""

    def backed(spent):
        start, end = spent.start_seconds, spent.end_seconds
        raw = bracket(
            Edge(start - 0.2, 0.0),
            Edge(start - 0.1, 10.0),
            Edge(end + 0.1, 30.0 + 100 * (end - start)),
            Edge(end + 0.2, 40.0 + 100 * (end - start)),
            start,
            end,
        )
        reading = Reading(
            device="GPU-1",
            scope="board",
            obtained="counter",
            source="a test",
            joules=recompute(raw),
            evidence=raw,
        )
        return spent.model_copy(update={"readings": (reading,), "valid": True, "reasons": ()})

    found = planned(lambda arm, *_: arm == "a-shape", haystacks=2)
    events = tuple(backed(e) if isinstance(e, Spent) else e for e in found.events)
    return found.model_copy(update={"events": events})


def changed(audit, kind, **fields):
    """The audit with one field of its last record of a kind changed."""
    events = list(audit.events)
    place = max(i for i, e in enumerate(events) if isinstance(e, kind))
    events[place] = events[place].model_copy(update=fields)
    return audit.model_copy(update={"events": tuple(events)})


def test_an_audit_that_follows_from_its_evidence_has_no_problems(audit):
    found = verify_audit(audit)
    assert (found.problems, found.sealed) == ((), True)
    # Two arms on two haystacks each, the noise floor on one.
    assert found.answers == 5
    assert found.windows == found.readings == sum(isinstance(e, Spent) for e in audit.events) > 0


def test_joules_of_a_stretch_that_do_not_follow_are_named(audit):
    (reading,) = [e for e in audit.events if isinstance(e, Spent)][-1].readings
    dearer = reading.model_copy(update={"joules": reading.joules * 1.001})
    (problem,) = verify_audit(changed(audit, Spent, readings=(dearer,))).problems
    assert "GPU-1 has " in problem
    assert "its evidence gives" in problem


def test_a_stretch_moved_against_its_evidence_is_found(audit):
    last = [e for e in audit.events if isinstance(e, Spent)][-1]
    moved = changed(audit, Spent, end_seconds=last.end_seconds + 1)
    assert any("the window's end is" in p for p in verify_audit(moved).problems)


def test_a_stretch_left_out_without_a_reason_is_found(audit):
    (problem,) = verify_audit(changed(audit, Spent, valid=False)).problems
    assert "left out without a reason" in problem


def test_an_answer_too_few_is_found(audit):
    last = [e for e in audit.events if isinstance(e, Answered)][-1]
    (problem,) = verify_audit(changed(audit, Answered, margin=last.margin[:-1])).problems
    assert f"{len(last.margin) - 1} of margin to {len(last.margin)} questions" in problem


def test_an_answer_that_was_never_asked_for_is_found(audit):
    (problem,) = verify_audit(changed(audit, Answered, haystack=99)).problems
    assert "haystack 99 at 12288: answered without having been asked" in problem


@pytest.mark.parametrize("name", REPORTS)
def test_each_report_beside_an_audit_must_be_what_it_says(audit, tmp_path, name):
    (tmp_path / name).write_text(REPORTS[name](audit, tmp_path))
    found = verify_audit(audit, tmp_path)
    assert (found.reports, found.problems) == ((name,), ())
    text = (tmp_path / name).read_text()
    (tmp_path / name).write_text(text.replace("a-shape", "b-shape", 1))
    (problem,) = verify_audit(audit, tmp_path).problems
    assert problem.startswith(f"{name} is not what green-bench report makes of this audit")


@pytest.fixture
def bundle(audit, tmp_path):
    """The audit as it lies on disk, with a report beside it."""
    directory = tmp_path / audit.header.audit_id
    with Journal(directory / "audit.jsonl") as journal:
        for event in (audit.header, *audit.events[:-1]):
            journal.append(event)
        journal.seal()
    (directory / "report.md").write_text(markdown(audit_document(audit, directory)))
    return directory


@pytest.fixture
def verified(monkeypatch, capsys):
    def call(target):
        monkeypatch.setattr(sys, "argv", ["green-bench", "verify", str(target)])
        with pytest.raises(SystemExit) as stop:
            main()
        return stop.value.code, capsys.readouterr().out

    return call


def test_verify_takes_an_audit_by_its_folder_or_its_file(bundle, verified):
    code, out = verified(bundle)
    assert code == 0
    assert out.startswith(f"OK {bundle.name}: sealed and unchanged; 5 answers, ")
    assert "report.md as made from it" in out
    assert verified(bundle / "audit.jsonl") == (0, out)


def test_every_changed_byte_of_an_audit_makes_verify_exit_with_another_code(bundle, verified):
    for name in ("audit.jsonl", "report.md"):
        raw = (bundle / name).read_bytes()
        for place in [*range(0, len(raw), len(raw) // 10), len(raw) - 1]:
            spoiled = bytearray(raw)
            spoiled[place] ^= 1
            (bundle / name).write_bytes(spoiled)
            assert verified(bundle)[0] in (2, 3, 5), (name, place)
        (bundle / name).write_bytes(raw)
    assert verified(bundle)[0] == 0


def test_a_seal_written_otherwise_is_found_though_it_says_the_same(bundle, verified):
    file = bundle / "audit.jsonl"
    file.write_text(file.read_text().replace('"seal","sha256"', '"seal", "sha256"'))
    assert verified(bundle)[0] == 5


def test_an_audit_that_is_not_finished_is_an_open_question(bundle, verified):
    file = bundle / "audit.jsonl"
    *lines, _ = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines))
    (bundle / "report.md").unlink()
    code, out = verified(bundle)
    assert code == 3
    assert out.startswith("OPEN ")


def test_wrong_figures_under_a_new_seal_are_still_found(audit, tmp_path, verified):
    wrong = changed(audit, Answered, haystack=99)
    with Journal(tmp_path / "forged" / "audit.jsonl") as journal:
        for event in (wrong.header, *wrong.events[:-1]):
            journal.append(event)
        journal.seal()
    code, out = verified(tmp_path / "forged")
    assert code == 5
    assert out.startswith("WRONG ")
