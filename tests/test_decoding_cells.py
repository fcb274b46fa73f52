"""Cells that decode: one cache for the arms of a length, captured before any window."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from minference_green import worker
from minference_green.cell import Cell
from minference_green.methods.dense import Dense
from minference_green.methods.method import PrefillMethod
from minference_green.methods.patterns import AShape
from minference_green.methods.sparse import uniform
from minference_green.model.decode import Decoder, RoomyCache
from minference_green.model.loading import LoadedModel, load
from minference_green.results import Note
from minference_green.task import Task
from minference_green.workload import Workload

LENGTH, TOKENS, BATCH = 333, 7, 2  # five tiles and 13 rows
NARROW = uniform("a-shape", AShape(4, 16))


@pytest.fixture(scope="module")
def tiny() -> LoadedModel:
    return load("planted:tiny", device=torch.device("cpu"), dtype=torch.float32)


@pytest.fixture
def workload() -> Workload:
    return Workload(model="planted:tiny", context_lengths=(LENGTH,), batch=BATCH, dtype="float32")


@pytest.fixture
def decoder(tiny: LoadedModel) -> Decoder:
    return Decoder(tiny.model, batch=BATCH, length=LENGTH, tokens=TOKENS)


@pytest.fixture
def cell(tiny: LoadedModel, workload: Workload) -> Callable[..., Cell]:
    def make(method: PrefillMethod, decoder: Decoder | None = None) -> Cell:
        made = Cell(tiny, method, Dense(), tiny.prompt(workload, LENGTH))
        made.decoder = decoder
        return made

    return make


def generated(decoder: Decoder) -> Tensor:
    return decoder.tokens[..., 0].T.clone()


def nothing() -> None:
    """A window may begin."""


def test_arms_share_a_decoder_and_neither_sees_the_others_prompt(cell, tiny, decoder) -> None:
    alone = {}
    for method in (Dense(), NARROW):
        own = Decoder(tiny.model, batch=BATCH, length=LENGTH, tokens=TOKENS)
        cell(method, own).decode(1, nothing)
        alone[method.name] = generated(own)
    assert not torch.equal(alone["dense"], alone["a-shape"])
    arms = [cell(method, decoder) for method in (Dense(), NARROW, Dense())]
    for arm in arms:
        for measure in (lambda arm=arm: arm.decode(2, nothing), lambda arm=arm: arm.request(2)):
            decoder.tokens[:] = 0
            measure()
            assert torch.equal(generated(decoder), alone[arm.method.name])


def test_the_prefill_of_a_decode_is_over_when_its_interval_begins(cell, decoder) -> None:
    seen = []
    interval = cell(Dense(), decoder).decode(3, lambda: seen.append(generated(decoder)))
    [at_ready] = seen
    assert (at_ready[:, 1:] == 0).all()
    assert torch.equal(at_ready[:, 0], generated(decoder)[:, 0])
    assert (generated(decoder)[:, 1:] != 0).any()
    assert interval.repeats == 3


@pytest.mark.parametrize("method", [Dense(), NARROW], ids=lambda m: m.name)
def test_logits_are_the_same_with_a_decoder_and_without(method, cell, decoder) -> None:
    rows = torch.arange(0, LENGTH, 50)
    expected = cell(method).prefill(rows)
    with_room = cell(method, decoder)
    for _ in range(2):
        assert torch.equal(with_room.prefill(rows), expected)
        with_room.decode(1, nothing)


def test_a_cell_without_a_decoder_does_not_decode(cell) -> None:
    with pytest.raises(AssertionError, match="with a decoder"):
        cell(Dense()).request(1)


@dataclass
class Parent:
    """The other side of the channel; notes what it is told."""

    hear: Callable[[str, dict[str, Any]], None] = lambda _type, _fields: None
    notes: list[str] = field(default_factory=list)

    def ask(self, type_: str, **fields: Any) -> dict[str, Any]:
        self.hear(type_, fields)
        if type_ == "record" and fields["record"]["event"] == "note":
            self.notes.append(Note.model_validate(fields["record"]).message)
        return {"celsius": None} if type_ == "temperature" else {}


@pytest.fixture
def task(workload: Workload) -> Task:
    return Task(
        block=0,
        workload=replace(workload, context_lengths=(111, LENGTH)),
        methods=("dense", "a-shape"),
        options={},
        allow_longer=False,
        rest="stock",
        window_seconds=0.01,
        warmup_seconds=0.0,
        decode_tokens=3,
        breakdown=False,
        idle_seconds=0.0,
        backends={},
        decisions=(),
        observed=(),
        excluded=(),
    )


def test_one_cache_is_kept_while_its_length_is_measured_and_none_else(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Observations and breakdowns have the memory to themselves."""
    caches: weakref.WeakSet[RoomyCache] = weakref.WeakSet()
    original = RoomyCache.__init__

    def noted(self: RoomyCache, *args: Any) -> None:
        caches.add(self)
        original(self, *args)

    monkeypatch.setattr(RoomyCache, "__init__", noted)
    alive: dict[str, set[int]] = {}

    def hear(type_: str, fields: dict[str, Any]) -> None:
        if type_ in ("window", "cell", "idle"):
            step = fields.get("step") or type_
            alive.setdefault(step, set()).add(len(caches))

    worker.serve(Parent(hear), replace(task, breakdown=True), torch.device("cpu"))
    assert alive == {
        "preparing": {0},
        "observing": {0},
        "idle": {0},
        "capturing decode of": {0},
        "measuring prefill of": {1},
        "measuring decode of": {1},
        "measuring request of": {1},
        "window": {1},
        "breaking down": {0},
    }


@pytest.mark.parametrize("block", [0, 1])
def test_a_model_that_cannot_be_captured_is_measured_and_said_so_once(
    block: int, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows = []

    def hear(type_: str, fields: dict[str, Any]) -> None:
        if type_ == "window":
            windows.append(fields["phase"])

    monkeypatch.setattr(Decoder, "capture", lambda _: "called a synchronizing CUDA operation")
    parent = Parent(hear)
    one = replace(task.workload, context_lengths=(LENGTH,))
    worker.serve(parent, replace(task, block=block, workload=one), torch.device("cpu"))
    said = [note for note in parent.notes if "CUDA graphs" in note]
    expected = (
        "decode at 333 runs without CUDA graphs, so the GPU waits for Python at every token and "
        "its joules wander: called a synchronizing CUDA operation"
    )
    assert said == ([expected] if block == 0 else [])
    assert windows.count("decode") == windows.count("request") == 4


def test_no_window_captures_and_every_length_is_captured_once(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    original = Decoder.capture

    def capture(self: Decoder) -> str | None:
        told.append("capture")
        return original(self)

    monkeypatch.setattr(Decoder, "capture", capture)
    worker.serve(
        Parent(lambda type_, _: told.append(type_)),
        replace(task),
        torch.device("cpu"),
    )
    kept = [x for x in told if x in ("capture", "ready", "window", "idle")]
    windows = ["ready", "window"] * 12
    assert kept == ["ready", "idle", "capture", *windows, "capture", *windows, "ready", "idle"]


def test_a_run_without_decode_has_no_roomy_cache(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: RoomyCache, *args: object) -> None:
        raise AssertionError("prefill alone needs no room")

    monkeypatch.setattr(RoomyCache, "__init__", refuse)
    told: list[str] = []
    worker.serve(
        Parent(lambda type_, _: told.append(type_)),
        replace(task, decode_tokens=0),
        torch.device("cpu"),
    )
    assert told.count("window") == 8
    with pytest.raises(AssertionError, match="needs no room"):
        worker.serve(Parent(), task, torch.device("cpu"))
