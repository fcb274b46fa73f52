"""The audit from the command line: a small real model, wrong turns, reports."""

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from minference_green.api import audit as audit_from_python
from minference_green.errors import UsageError
from minference_green.ledger import Answered, Audit, Computed, load_audit
from minference_green.methods.dense import Dense

GreenBench = Callable[..., subprocess.CompletedProcess[str]]
Start = Callable[..., subprocess.Popen[str]]
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session")
def bytes_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that reads bytes and knows nothing."""
    directory = tmp_path_factory.mktemp("models") / "bytes"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=4096,
        bos_token_id=256,
    )  # fmt: skip
    config.minference_green_bytes = True
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def small_audit(bytes_model: Path) -> tuple[object, ...]:
    return (
        "audit", "-m", bytes_model, "--context", "3600", "--haystacks", 2, "--device", "cpu",
        "--methods", "vertical-slash",
        "--method-option", "vertical-slash.vertical_size=60",
        "--method-option", "vertical-slash.slash_size=200",
    )  # fmt: skip


def only(output: Path) -> Path:
    (directory,) = output.glob("audit-*")
    return directory


@pytest.fixture(scope="module")
def finished(
    green_bench: GreenBench,
    small_audit: tuple[object, ...],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[subprocess.CompletedProcess[str], Audit, Path]:
    output = tmp_path_factory.mktemp("finished")
    done = green_bench(*small_audit, "--output", output)
    assert done.returncode == 0, done.stderr
    return done, load_audit(only(output)), only(output)


def test_an_audit_asks_dense_the_method_and_the_noise_floor(finished) -> None:
    _, found, _ = finished
    assert [m.name for m in found.header.methods] == ["dense", "vertical-slash", "noise-floor"]
    answered = sorted((a.method, a.haystack) for a in found.of(Answered))
    assert answered == [
        ("dense", 0),
        ("dense", 1),
        ("noise-floor", 0),
        ("vertical-slash", 0),
        ("vertical-slash", 1),
    ]
    assert found.complete


def test_the_noise_floor_computes_every_pair_and_the_method_fewer(finished) -> None:
    _, found, _ = finished
    density = {c.method: c.density for c in found.of(Computed)}
    recall = {c.method: c.recall for c in found.of(Computed)}
    assert density["dense"] == density["noise-floor"] == 1.0
    assert density["vertical-slash"] < 0.95
    assert recall["noise-floor"] == pytest.approx(1.0, abs=1e-5)
    assert 0 < recall["vertical-slash"] < 1


def test_a_model_that_knows_nothing_is_told_so_and_nothing_can_be_lost(finished) -> None:
    done, _, _ = finished
    assert "nothing can be lost" in done.stdout
    assert "Quick audit" in done.stdout
    assert "J/Mtok" in done.stdout


def test_a_page_lies_beside_the_file(finished) -> None:
    done, _, directory = finished
    page = (directory / "report.html").read_text()
    assert page.startswith("<!doctype html>")
    assert str(directory / "report.html") in done.stderr


@pytest.mark.parametrize(
    ("form", "begins"),
    [("table", "Machine"), ("markdown", "**"), ("csv", "context_length,method"), ("json", "{")],
)
def test_report_reads_an_audit_in_every_form(call: Call, finished, form, begins) -> None:
    _, _, directory = finished
    code, out, err = call("report", directory, "--format", form)
    assert code == 0, err
    assert out.startswith(begins)
    assert "vertical-slash" in out


def test_json_holds_every_figure_and_no_nan(call: Call, finished) -> None:
    _, _, directory = finished
    _, out, _ = call("report", directory / "audit.jsonl", "-f", "json")

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    data = json.loads(out, parse_constant=refuse)
    arm = next(a for a in data["arms"] if a["method"] == "vertical-slash")
    assert {"places", "kinds", "depths", "verdict", "cost", "treatments"} <= arm.keys()
    assert data["complete"]


def test_ctrl_c_leaves_a_file_that_is_read_and_resumed(
    start: Start, call: Call, small_audit: tuple[object, ...], tmp_path: Path
) -> None:
    process = start(*small_audit, "--no-energy", "--haystacks", 40, "--output", tmp_path)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if any(b'"answered"' in f.read_bytes() for f in tmp_path.glob("*/audit.jsonl")):
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Incomplete:" in out
    directory = only(tmp_path)
    assert f"green-bench audit --resume {directory}" in err
    partial = load_audit(directory)
    assert 0 < partial.answers_done < partial.answers_planned
    code, _, err = call("audit", "--resume", directory, "--haystacks", "3")
    assert code == 2
    assert "--haystacks cannot be given with --resume" in err


def test_an_arm_that_does_not_fit_is_marked_and_the_audit_ends_with_5(
    green_bench: GreenBench, bytes_model: Path, tmp_path: Path
) -> None:
    done = green_bench(
        "audit", "-m", bytes_model, "--context", "3600", "--haystacks", 1, "--device", "cpu",
        "--methods", "mine:Greedy", "--no-energy", "--quiet", "--output", tmp_path,
    )  # fmt: skip
    assert done.returncode == 5, done.stderr
    assert "Tried to allocate 99 GiB" in done.stderr
    assert "Skipped greedy at 3600" in done.stdout
    assert load_audit(only(tmp_path)).complete


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--kinds", "hexx"), "did you mean 'hex'"),
        (("--kinds", ","), "'' is not a kind"),
        (("--filler", "proze"), "neither a file nor one of prose, records, code"),
        (("--filler", "none.txt"), "No such file"),
        (("--quick", "--thorough"), "contradict"),
        (("--margin", "0"), "--margin 0 must be more than 0"),
        (("--context", "8x"), "is not a context length"),
    ],
)
def test_a_wrong_turn_ends_with_2_and_what_to_do(
    call: Call, bytes_model: Path, arguments, message
) -> None:
    code, _, err = call("audit", "-m", bytes_model, "--device", "cpu", "--quiet", *arguments)
    assert code == 2, err
    assert message in err
    assert not list(Path("green-bench-runs").glob("audit-*"))


def test_a_prompt_longer_than_the_models_context_is_refused(call: Call, bytes_model: Path) -> None:
    code, _, err = call("audit", "-m", bytes_model, "--device", "cpu", "--context", "5000")
    assert code == 2
    assert "made for 4096 tokens, 5000 were asked" in err


def test_a_filler_in_another_encoding_is_refused_with_the_byte(call: Call) -> None:
    Path("latin.txt").write_bytes(b"na\xefve " * 1000)
    code, _, err = call("audit", "--filler", "latin.txt")
    assert code == 2
    assert "byte 0xef at offset 2" in err


def test_a_filler_that_is_too_short_is_refused_with_the_least(call: Call) -> None:
    Path("short.txt").write_text("One line.")
    code, _, err = call("audit", "--filler", "short.txt")
    assert code == 2
    assert "holds 9 bytes, at least 2000 are needed" in err


def test_a_text_of_the_users_own_is_read_kind_by_kind(
    green_bench: GreenBench, tmp_path: Path
) -> None:
    file = tmp_path / "mine.txt"
    file.write_text("The pump moved 12.5 kg on 2024-02-29, not before, said Anna Brel. " * 40)
    done = green_bench(
        "audit", "--text", file, "--methods", "a-shape", "--context", "2k", "--device", "cpu",
        "--method-option", "a-shape.n_local=64", "--no-energy", "--output", tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "a-shape keeps least of that to" in done.stdout
    assert "nothing; mine.txt was read" in done.stdout
    assert str(file) not in done.stdout
    for word in ("measure", "date", "negated", "name", "KL nats"):
        assert word in done.stdout
    found = load_audit(only(tmp_path))
    assert found.complete
    assert not list(found.of(Answered))


@pytest.mark.parametrize(
    ("option", "value"), [("--haystacks", "3"), ("--kinds", "hex"), ("--filler", "code")]
)
def test_what_is_said_of_haystacks_is_refused_beside_a_text(call: Call, option, value) -> None:
    Path("mine.txt").write_text("words " * 1000)
    code, _, err = call("audit", "--text", "mine.txt", option, value)
    assert code == 2
    assert f"{option} is about haystacks and --text reads none" in err


class Named(Dense):
    """Dense under another name, that looks at each haystack first."""

    name = "curious"  # type: ignore[assignment]
    seen: tuple[int, ...] = ()

    def see(self, haystack, spans) -> None:
        type(self).seen = (*self.seen, haystack.index)


def test_python_takes_a_method_as_an_object_and_shows_it_each_haystack(
    bytes_model: Path, tmp_path: Path
) -> None:
    found = audit_from_python(
        str(bytes_model), methods=[Named()], context_lengths=[3600], haystacks=2, device="cpu",
        meter="none", output=tmp_path,
    )  # fmt: skip
    assert [m.name for m in found.header.methods] == ["dense", "curious", "noise-floor"]
    assert set(Named.seen) == {0, 1}
    right = {(a.method, a.haystack): a.logprob for a in found.of(Answered)}
    assert right["curious", 1] == right["dense", 1]


def test_python_refuses_a_setting_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no setting haystack; it takes"):
        audit_from_python(haystack=3, output=tmp_path)
