"""What is told of a text where layers differ, logits are scaled, or numbers are gone."""

import hashlib
from types import MappingProxyType

import pytest
import torch
from transformers import GraniteConfig, GraniteForCausalLM

from minference_green.auditing.own_text import Text, check_readable, of_text, own_text
from minference_green.auditing.worker import serve
from minference_green.errors import UsageError
from minference_green.ledger import AuditPlan
from minference_green.methods.dense import Dense
from minference_green.methods.patterns import AShape
from minference_green.methods.sparse import SparsePrefill
from minference_green.model.loading import LoadedModel, load
from minference_green.model.text import Bytes

TEXT = "The pump of Rothai moved 12.5 kg on 2024-02-29; a plain sentence follows it, 4821 times. "
LENGTH = 1100


class Told:
    """A parent that keeps what it is told."""

    def __init__(self) -> None:
        self.records = []

    def ask(self, type_, **fields):
        if type_ == "record":
            self.records.append(fields["record"])
        return {}


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return load("embedded", device=torch.device("cpu"), dtype=torch.float32)


@pytest.fixture(scope="module")
def text(model: LoadedModel) -> Text:
    return own_text(TEXT * 20, Bytes((256,)), model, LENGTH)


class Window(SparsePrefill):
    """A window in every layer but those named, which run dense, as auto mixes them."""

    dense = ()

    def profile(self, q, k, v, *, scale, layer):
        if layer in self.dense:
            return Dense().profile(q, k, v, scale=scale, layer=layer)
        return super().profile(q, k, v, scale=scale, layer=layer)


class Mixed(Window):
    dense = (0, 2)


class Whole(Window):
    dense = (0, 1, 2, 3)


class Silent(Window):
    """Shows no index in layer 1."""

    def profile(self, q, k, v, *, scale, layer):
        found = super().profile(q, k, v, scale=scale, layer=layer)
        if layer != 1:
            return found
        return type(found)(found.out, found.density, 0.0, 0.0, 0.0)


@pytest.fixture(scope="module")
def kinds(model, text):
    parent = Told()
    made = {c.__name__: c(c.__name__, AShape(8, 64), {}) for c in (Window, Mixed, Whole, Silent)}
    of_text(parent, model, text, LENGTH, made)
    return {r["method"]: {k["kind"]: k for k in r["kinds"]} for r in parent.records}


def test_layers_that_run_dense_keep_all_of_their_share(kinds) -> None:
    for kind, found in kinds["Mixed"].items():
        window = kinds["Window"][kind]
        assert found["attention"] == pytest.approx(window["attention"]), "of all layers alike"
        assert window["recall"] < found["recall"] < 1
    assert all(k["recall"] == 1.0 for k in kinds["Whole"].values())


def test_recall_of_a_kind_is_unknown_unless_every_layer_shows_its_index(kinds) -> None:
    assert all(k["recall"] is None and k["attention"] is None for k in kinds["Silent"].values())
    assert any(k["kl_nats"] > 0 for k in kinds["Silent"].values())


def test_a_method_whose_output_is_no_number_is_skipped_with_the_reason(model, text) -> None:
    class Overflowing:
        name, parameters = "overflowing", MappingProxyType({})

        def attend(self, q, k, v, *, scale, layer):
            out = Dense().attend(q, k, v, scale=scale, layer=layer)
            out[:, :, 1000:] = torch.inf
            return out

    parent = Told()
    of_text(parent, model, text, LENGTH, {"overflowing": Overflowing(), "dense": Dense()})
    assert [(r["event"], r["method"]) for r in parent.records] == [
        ("skip", "overflowing"), ("of_text", "dense"),
    ]  # fmt: skip
    assert parent.records[0]["reason"].startswith("the output is not finite at ")


@pytest.mark.parametrize("scaling", [1.0, 4.0])
def test_a_model_that_scales_its_logits_is_refused_rather_than_misjudged(scaling) -> None:
    torch.manual_seed(0)
    config = GraniteConfig(
        vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048,
        logits_scaling=scaling,
    )  # fmt: skip
    model = LoadedModel(
        model=GraniteForCausalLM(config).eval().requires_grad_(False), spec="tiny", revision="1",
        weights="trained", parameters=1, max_context=2048, vocabulary=320, bos=256, patterns=None,
        allow_longer=False, directory=None,
    )  # fmt: skip
    text = own_text(TEXT * 20, Bytes((256,)), model, LENGTH)
    if scaling == 1.0:
        check_readable(model, text, {"dense": Dense()})
        return
    with pytest.raises(UsageError, match="tiny does more to its logits than one linear head"):
        check_readable(model, text, {"dense": Dense()})


def test_what_cannot_be_read_ends_the_audit_before_it_has_a_file(model, tmp_path) -> None:
    file = tmp_path / "text.txt"
    file.write_text(TEXT * 20)
    plan = AuditPlan(
        context_lengths=(LENGTH,), haystacks=1, noise_haystacks=1, inside=7, after=7, end=0,
        competitors=1, kinds=("hex",), filler="prose", seed=0, dtype="float32",
        margin_points=2.0, quick=True, text=str(file),
        text_sha256=hashlib.sha256(file.read_bytes()).hexdigest(),
    )  # fmt: skip
    task = {
        "plan": plan.model_dump(mode="json"),
        "methods": ["dense", "a-shape", "random"],
        "options": {},
    }

    class Silence:
        def ask(self, type_, **fields):
            raise AssertionError(f"told {type_} of an audit that cannot be")

    with pytest.raises(UsageError, match="random takes its density from a haystack"):
        serve(Silence(), task, torch.device("cpu"), model)
