"""The asking loop: each answer on disk at once, arms that fail marked, interruptions resumed."""

import json
import shlex
from pathlib import Path

import pytest
import torch

from minference_green.auditing.audit import (
    InProcess,
    InterruptedAuditError,
    audit,
    resume,
)
from minference_green.auditing.loop import Progress, ask_everything
from minference_green.auditing.plan import AuditRequest
from minference_green.bench import InterruptedRunError
from minference_green.errors import NotComparableError, UsageError
from minference_green.findings import findings
from minference_green.journal import Seal, SealError
from minference_green.ledger import NOISE_FLOOR, Answered, Asked, Spent, load_audit
from minference_green.render.audit import audit_document
from minference_green.results import Skip

LENGTH = 12 * 1024
NAMES = ("dense", "a-shape", NOISE_FLOOR)


@pytest.fixture
def serve(stand_in, named):
    """A conversation with a stand-in; ``trouble`` is called with each (arm, haystack) prefilled."""

    def make(trouble=lambda arm, haystack: None, revision="1", per_group=4, seconds=0.4):
        class Troubled(stand_in):
            def prefill(self, prompt, method):
                trouble(method.name, prompt.haystack.index)
                return super().prefill(prompt, method)

        def hold(conversation):
            parent = InProcess(conversation)
            task = parent.ask("hello", device={"kind": "cpu"})["task"]
            parent.ask(
                "loaded", model="a stand-in", revision=revision, weights="trained",
                parameters=1, rest="stock",
                methods=[{"name": n, "parameters": {}} for n in NAMES],
            )  # fmt: skip
            excluded = {m for _, m in task["excluded"]}
            arms = {n: named(n) for n in NAMES if n not in excluded}
            ask_everything(
                parent,
                Troubled(lambda *_: False),
                arms,
                length=LENGTH,
                haystacks={n: 1 if n == NOISE_FLOOR else 5 for n in arms},
                so_far=Progress(
                    frozenset((n, i) for n, i in task["asked"]),
                    frozenset((n, i, m) for n, i, m in task["answered"]),
                ),
                seconds=dict.fromkeys(arms, seconds),
                prompts_in_memory=per_group,
                device=torch.device("cpu"),
            )

        return hold

    return make


@pytest.fixture
def request_():
    return AuditRequest(context_lengths=(LENGTH,), haystacks=5, meter="none")


def only(directory):
    (found,) = directory.iterdir()
    return found


def test_every_arm_answers_every_haystack_once_and_the_file_is_sealed(
    serve, request_, tmp_path, quiet
):
    found = load_audit(audit(request_, tmp_path, quiet, serve()))
    answered = [(a.method, a.haystack) for a in found.of(Answered)]
    assert sorted(answered) == sorted(
        [(m, i) for m in ("dense", "a-shape") for i in range(5)] + [(NOISE_FLOOR, 0)]
    )
    assert found.complete
    assert isinstance(found.events[-1], Seal)
    assert [a.haystack for a in found.of(Asked)] == list(range(5))


def test_prefills_of_a_group_share_a_window_that_holds_nothing_else(
    serve, request_, tmp_path, quiet
):
    found = load_audit(audit(request_, tmp_path, quiet, serve(per_group=3)))
    prefills = [s for s in found.of(Spent) if s.what == "prefill" and s.method == "dense"]
    # At 0.4 s each: three texts are 1.2 s, the last two are prefilled twice to fill a second.
    assert [s.prompts for s in prefills] == [3, 4]
    tokens = {a.haystack: a.tokens for a in found.of(Asked)}
    # Each text once, and once more with the end question behind it.
    once = tokens[0] + tokens[1] + tokens[2]
    assert 2 * once < prefills[0].tokens < 2 * once + 3 * 200
    events = [e for e in found.events if isinstance(e, Spent | Answered) and e.method == "dense"]
    assert [getattr(e, "what", "answer") for e in events[:5]] == [
        "prefill", "answer", "answer", "answer", "questions",
    ]  # fmt: skip


@pytest.mark.parametrize(("seconds", "prompts"), [(2.0, [3, 2]), (0.4, [5])])
def test_a_group_is_as_many_prompts_as_are_prefilled_in_five_seconds(
    serve, request_, tmp_path, quiet, seconds, prompts
):
    found = load_audit(audit(request_, tmp_path, quiet, serve(per_group=9, seconds=seconds)))
    prefills = [s for s in found.of(Spent) if s.what == "prefill" and s.method == "dense"]
    assert [s.prompts for s in prefills] == prompts


def test_groups_are_no_larger_than_memory_holds(serve, request_, tmp_path, quiet):
    found = load_audit(audit(request_, tmp_path, quiet, serve(per_group=2)))
    asked = [s.prompts for s in found.of(Spent) if s.what == "questions"]
    assert max(asked) == 2


def test_each_arm_comes_first_in_turn(serve, request_, tmp_path, quiet):
    found = load_audit(audit(request_, tmp_path, quiet, serve(per_group=1)))
    order = [(a.haystack, a.method) for a in found.of(Answered)]
    firsts = [next(m for h, m in order if h == i) for i in range(5)]
    assert firsts[:2] == ["dense", "a-shape"]
    assert len(set(firsts)) == 2


def test_an_arm_out_of_memory_is_marked_and_the_others_go_on(serve, request_, tmp_path, quiet):
    def greedy(arm, haystack):
        if arm == "a-shape" and haystack == 3:
            raise torch.OutOfMemoryError("Tried to allocate 99 GiB\nand more")

    found = load_audit(audit(request_, tmp_path, quiet, serve(greedy)))
    (skip,) = found.of(Skip)
    assert (skip.method, skip.reason) == (
        "a-shape",
        "out of memory: Tried to allocate 99 GiB",
    )
    assert found.complete
    assert findings(found).arm(LENGTH, "a-shape") is None
    assert any("Skipped a-shape at 12k: out of memory" in d for d in audit_document(found).doubts)


def test_an_interrupted_audit_is_readable_and_goes_on_where_it_stopped(
    serve, request_, tmp_path, quiet
):
    def stop(arm, haystack):
        if arm == "a-shape" and haystack == 3:
            raise KeyboardInterrupt

    with pytest.raises(InterruptedAuditError, match="--resume") as stopped:
        audit(request_, tmp_path, quiet, serve(stop))
    assert stopped.value.has_answers
    directory = only(tmp_path)
    partial = load_audit(directory)
    assert 0 < partial.answers_done < partial.answers_planned == 11
    document = audit_document(partial, directory)
    assert any(f"--resume {directory}" in d for d in document.doubts)
    document = audit_document(partial, Path("my runs"))
    assert any("--resume 'my runs'" in d for d in document.doubts)
    before = {(a.method, a.haystack) for a in partial.of(Answered)}

    resumed = load_audit(resume(directory, quiet, serve()))
    assert resumed.complete
    answered = [(a.method, a.haystack) for a in resumed.of(Answered)]
    assert len(answered) == len(set(answered)) == 11
    assert before < set(answered)
    assert [a.haystack for a in resumed.of(Asked)] == list(range(5))


def test_an_audit_whose_model_has_changed_does_not_go_on(serve, request_, tmp_path, quiet):
    def stop(arm, haystack):
        if haystack == 3:
            raise KeyboardInterrupt

    with pytest.raises(InterruptedAuditError):
        audit(request_, tmp_path, quiet, serve(stop))
    with pytest.raises(NotComparableError, match="model_revision changed from 1 to 2"):
        resume(only(tmp_path), quiet, serve(revision="2"))


def test_an_audit_stopped_before_its_first_answer_says_so(serve, request_, tmp_path, quiet):
    def stop(arm, haystack):
        raise KeyboardInterrupt

    with pytest.raises(InterruptedAuditError, match="nothing had been answered yet"):
        audit(request_, tmp_path, quiet, serve(stop))


def test_the_lines_to_go_on_with_can_be_pasted_whatever_the_folder_is_called():
    place = Path("my runs/it's")
    for words in (
        str(InterruptedAuditError(place, has_answers=True)),
        str(InterruptedRunError(place / "run-1", (), started=True)),
    ):
        pasted = shlex.split(words[words.index("green-bench") :])
        assert pasted[-1] == "my runs/it's"


@pytest.mark.parametrize(
    ("then", "now", "message"),
    [
        ('"request":{', '"request":{"mood":"good",', "mood: Extra inputs are not permitted"),
        ('"seed":0,"dtype":"auto"', '"seed":"x","dtype":"auto"', "seed: Input should be"),
    ],
)
def test_a_request_of_another_version_is_refused_with_that_version(
    serve, request_, tmp_path, quiet, then, now, message
):
    def stop(arm, haystack):
        if haystack == 1:
            raise KeyboardInterrupt

    with pytest.raises(InterruptedAuditError):
        audit(request_, tmp_path, quiet, serve(stop))
    file = only(tmp_path) / "audit.jsonl"
    assert file.read_text().count(then) == 1
    file.write_text(file.read_text().replace(then, now).replace('"version":"0', '"version":"7'))
    with pytest.raises(UsageError, match=rf"{message}.*go on with minference-green 7\.1\.0"):
        resume(only(tmp_path), quiet, serve())


def test_there_is_nothing_to_resume_where_no_audit_is(tmp_path, quiet):
    with pytest.raises(UsageError, match="there is no audit at"):
        resume(tmp_path, quiet)


def test_an_error_before_the_first_record_leaves_nothing_behind(request_, tmp_path, quiet):
    def refuse(conversation):
        raise UsageError("no such model")

    with pytest.raises(UsageError, match="no such model"):
        audit(request_, tmp_path, quiet, refuse)
    assert list(tmp_path.iterdir()) == []


def test_a_changed_answer_breaks_the_seal(serve, request_, tmp_path, quiet):
    directory = audit(request_, tmp_path, quiet, serve())
    file = directory / "audit.jsonl"
    file.write_text(
        file.read_text().replace(
            '"haystack":1,"method":"a-shape"', '"haystack":2,"method":"a-shape"', 1
        )
    )
    with pytest.raises(SealError, match="changed after it was sealed"):
        load_audit(directory)


def test_a_line_cut_short_is_left_out_and_told(serve, request_, tmp_path, quiet):
    directory = audit(request_, tmp_path, quiet, serve())
    file = directory / "audit.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:-2]) + lines[-2][:30])
    found = load_audit(directory)
    assert found.cut
    assert any("cut short" in d for d in audit_document(found).doubts)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", "line 2 is not JSON"),
        (json.dumps({"event": "answered", "haystack": 1}), "line 2 is not a record of an audit"),
        (json.dumps({"event": "window"}), "line 2 is not a record of an audit"),
    ],
)
def test_a_damaged_line_is_named(serve, request_, tmp_path, quiet, line, message):
    directory = audit(request_, tmp_path, quiet, serve())
    file = directory / "audit.jsonl"
    header = file.read_text().splitlines()[0]
    file.write_text(f"{header}\n{line}\n")
    with pytest.raises(UsageError, match=message):
        load_audit(directory)


def test_a_file_of_another_schema_is_not_read(serve, request_, tmp_path, quiet):
    directory = audit(request_, tmp_path, quiet, serve())
    file = directory / "audit.jsonl"
    file.write_text(file.read_text().replace('"schema_version":"1.0"', '"schema_version":"2.0"'))
    with pytest.raises(NotComparableError, match=r"schema 2\.0"):
        load_audit(directory)


def test_a_file_without_a_header_holds_nothing_to_read(tmp_path):
    (tmp_path / "audit.jsonl").write_text("")
    with pytest.raises(UsageError, match="no complete header line"):
        load_audit(tmp_path)
