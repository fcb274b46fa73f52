"""What a request means, and what contradicts itself."""

import os
from pathlib import Path

import pytest

from minference_green.auditing.plan import (
    MOST_FILE_BYTES,
    AuditRequest,
    arms_asked,
    known_kinds,
    read_text,
    resolve,
)
from minference_green.corpus.kinds import KINDS
from minference_green.errors import UsageError


def test_a_gpu_asks_120_haystacks_at_64k_and_a_cpu_is_quick_by_itself() -> None:
    gpu, cpu = resolve(AuditRequest(), "gpu"), resolve(AuditRequest(), "cpu")
    assert (gpu.haystacks, gpu.context_lengths, gpu.quick, gpu.dtype) == (
        120,
        (65536,),
        False,
        "bfloat16",
    )
    assert (cpu.context_lengths, cpu.quick, cpu.dtype) == ((4096,), True, "float32")
    assert cpu.haystacks < 20


def test_thorough_asks_600_haystacks_on_any_device() -> None:
    for kind in ("gpu", "cpu"):
        plan = resolve(AuditRequest(thorough=True), kind)
        assert (plan.haystacks, plan.quick) == (600, False)


def test_lengths_are_sorted_and_each_asked_once() -> None:
    plan = resolve(AuditRequest(context_lengths=(65536, 16384, 65536)), "gpu")
    assert plan.context_lengths == (16384, 65536)


def test_a_short_prompt_is_asked_fewer_questions_and_says_so_in_its_plan() -> None:
    short = resolve(AuditRequest(context_lengths=(8191,)), "gpu")
    long = resolve(AuditRequest(context_lengths=(8192,)), "gpu")
    assert (short.inside, short.after, short.end) == (7, 7, 1)
    assert (long.inside, long.after, long.end) == (14, 14, 1)


def test_a_quick_audit_asks_no_question_that_takes_a_second_prefill() -> None:
    assert resolve(AuditRequest(quick=True), "gpu").end == 0
    assert resolve(AuditRequest(thorough=True), "cpu").end == 1


def test_a_cpu_asks_its_noise_floor_about_one_haystack() -> None:
    assert resolve(AuditRequest(), "cpu").noise_haystacks == 1
    assert resolve(AuditRequest(), "gpu").noise_haystacks == 120


def test_dense_is_always_the_first_arm() -> None:
    assert arms_asked(("minference",)) == ("dense", "minference")
    assert arms_asked(("spread", "dense")) == ("dense", "spread")


def test_kinds_come_in_their_own_order_and_all_without_a_name() -> None:
    assert known_kinds(("hex", "integer")) == ("integer", "hex")
    assert known_kinds(()) == KINDS


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quick": True, "thorough": True}, "contradict"),
        ({"haystacks": 3, "thorough": True}, "both say how many"),
        ({"haystacks": 0}, "--haystacks 0 must be 1 or more"),
        ({"margin_points": 0.0}, "--margin 0 must be more than 0"),
        ({"margin_points": 100.0}, "less than 100 points"),
        ({"kinds": ("intger",)}, "did you mean 'integer'"),
        ({"kinds": ("qqq",)}, "'qqq' is not a kind; Kinds are integer"),
    ],
)
def test_what_cannot_be_asked_is_refused_with_the_reason(fields, message) -> None:
    with pytest.raises(UsageError, match=message):
        resolve(AuditRequest(**fields), "cpu")


def test_a_text_in_another_encoding_is_refused_with_the_byte(tmp_path: Path) -> None:
    file = tmp_path / "latin.txt"
    file.write_bytes(b"caf\xe9 au lait")
    with pytest.raises(UsageError, match="byte 0xe9 at offset 3"):
        read_text(file, "--filler")


def test_a_text_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        read_text(tmp_path / "none.txt", "--filler")


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(UsageError, match=r"--text .*pipe is a pipe or a device.* save it"):
        read_text(pipe, "--text")
    with pytest.raises(UsageError, match="--text /dev/zero is a pipe or a device"):
        read_text(Path("/dev/zero"), "--text")
    with pytest.raises(UsageError, match="Is a directory"):
        read_text(tmp_path, "--text")


def test_a_file_larger_than_any_prompt_is_refused_with_its_size(tmp_path: Path) -> None:
    file = tmp_path / "huge.txt"
    with file.open("wb") as hole:
        hole.truncate(MOST_FILE_BYTES + 1)
    with pytest.raises(UsageError, match=rf"holds {MOST_FILE_BYTES + 1} bytes.* head -c"):
        read_text(file, "--filler")
