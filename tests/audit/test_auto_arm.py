"""auto in an audit: what it decided on the first haystack holds for all, and is told whole."""

import json
import math
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from minference_green.auditing.ask import ModelRespondent
from minference_green.auditing.worker import _prepare
from minference_green.corpus.haystack import haystack
from minference_green.corpus.recipe import Recipe
from minference_green.ledger import Computed
from minference_green.methods.auto import Auto
from minference_green.methods.dense import Dense
from minference_green.methods.law import STEPS
from minference_green.methods.patterns import AShape
from minference_green.methods.sparse import SparsePrefill, uniform
from minference_green.model.loading import LoadedModel
from minference_green.model.text import Bytes, Fast

LENGTH = 1300
WINDOW = uniform("a-shape", AShape(8, 64))


class Told:
    """A parent that keeps what it is told."""

    def __init__(self):
        self.records = []

    def ask(self, type_, **fields):
        if type_ == "record":
            self.records.append(fields["record"])
        return {}


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048,
        bos_token_id=256,
    )  # fmt: skip
    return LoadedModel(
        model=LlamaForCausalLM(config).eval().requires_grad_(False), spec="tiny", revision="1",
        weights="trained", parameters=1, max_context=2048, vocabulary=320, bos=256, patterns=None,
        allow_longer=False, directory=None,
    )  # fmt: skip


@pytest.fixture(scope="module")
def merging() -> Fast:
    """A tokenizer whose texts are not exactly as long as asked."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=318, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    text = haystack(1, 0, length=9000).text.decode()
    tokenizer.train_from_iterator([text], trainer)
    return Fast(PreTrainedTokenizerFast(tokenizer_object=tokenizer), (319,))


@pytest.fixture
def sparse_is_free(tmp_path):
    """A law by which a sparse layer takes no time."""
    terms = {
        "dense": ("call", "row", "causal_pair"),
        "choose": ("call", "row", "position", "block_row", "block_pair"),
        "attend": ("call", "row", "band_pair", "column", "listed_pair"),
    }
    steps = {
        name: {
            "seconds": dict.fromkeys(terms[name], 1.0 if name == "dense" else 0.0),
            "error": 0.0,
            "worst": 0.0,
        }
        for name in STEPS
    }
    path = tmp_path / "law.json"
    measured = {"date": "2026-01-02"}
    path.write_text(json.dumps({"measured": measured, "head_dims": {"8": steps}}))
    return path


@pytest.mark.parametrize(("end", "seed"), [(0, 2), (1, 0)])
def test_haystacks_shorter_than_the_first_run_as_was_decided(
    model, merging, sparse_is_free, end, seed
):
    recipe = Recipe(inside=2, after=2, end=end, competitors=0)
    respondent = ModelRespondent(model, merging, seed, "prose", recipe)
    task = {"computed": [], "backends": {}, "plan": {"dtype": "float32"}}
    ready = _prepare(
        Told(), task, respondent, {"auto": Auto(WINDOW, sparse_is_free)}, LENGTH, model
    )
    auto = ready.arms["auto"]
    lengths = [respondent.prompt(i, LENGTH).ids.shape[1] for i in range(6)]
    assert min(lengths) < lengths[0], "else the case is not met"
    for n in lengths:
        q, k = torch.randn(1, 4, n, 8), torch.randn(1, 2, n, 8)
        for layer in range(2):
            assert auto.profile(q, k, k, scale=1.0, layer=layer).indices, f"dense at {n}"


def computed(model: LoadedModel, method) -> Computed:
    parent = Told()
    respondent = ModelRespondent(
        model, Bytes((256,)), 0, "prose", Recipe(inside=2, after=2, end=0, competitors=0)
    )
    task = {"computed": [], "backends": {}, "plan": {"dtype": "float32"}}
    _prepare(parent, task, respondent, {method.name: method}, LENGTH, model)
    return Computed.model_validate(parent.records[-1])


class Chosen(SparsePrefill):
    """A window in layer 0 and dense attention in layer 1, as auto mixes them."""

    def profile(self, q, k, v, *, scale, layer):
        if layer == 1:
            return Dense().profile(q, k, v, scale=scale, layer=layer)
        return super().profile(q, k, v, scale=scale, layer=layer)


def test_recall_counts_layers_that_run_dense_as_keeping_all(model):
    mixed = computed(model, Chosen("mixed", AShape(8, 64), {}))
    alone = computed(model, WINDOW)
    assert mixed.density_by_layer[1] == (1.0,) * 4
    assert mixed.recall_worst_head < 0.9
    # Layer 0 is the same in both; of layer 1 the mixed arm keeps all.
    assert alone.recall < mixed.recall < 1
    assert mixed.recall > 0.5 + 0.5 * mixed.recall_worst_head
    assert computed(model, Dense()).recall == 1.0


class Silent(Chosen):
    """Tells no log-sum-exp of its sparse layers."""

    def profile(self, q, k, v, *, scale, layer):
        return replace(super().profile(q, k, v, scale=scale, layer=layer), lse=None)


def test_recall_is_unknown_unless_every_layer_tells_it(model):
    found = computed(model, Silent("silent", AShape(8, 64), {}))
    assert found.density is not None
    assert (found.recall, found.recall_worst_head) == (None, None)


class Doubling(SparsePrefill):
    """Counts every key twice in layer 1."""

    def profile(self, q, k, v, *, scale, layer):
        found = super().profile(q, k, v, scale=scale, layer=layer)
        return replace(found, lse=found.lse + layer * math.log(2) + 1.0 * layer)


def test_a_kernel_that_keeps_more_than_there_is_costs_its_own_arm_alone(model):
    parent = Told()
    respondent = ModelRespondent(
        model, Bytes((256,)), 0, "prose", Recipe(inside=2, after=2, end=0, competitors=0)
    )
    task = {"computed": [], "backends": {}, "plan": {"dtype": "float32"}}
    arms = {"doubling": Doubling("doubling", AShape(8, 2000), {}), "a-shape": WINDOW}
    ready = _prepare(parent, task, respondent, arms, LENGTH, model)
    assert list(ready.arms) == ["a-shape"]
    skip = parent.records[0]
    assert (skip["event"], skip["method"]) == ("skip", "doubling")
    assert skip["reason"].startswith("layer 1: a row kept 5.4")
