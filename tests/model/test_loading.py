"""From a spec to a model, or to one sentence that says what is wrong with it."""

import hashlib
import json
import socket
import subprocess
import sys

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import filter_repo_objects
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from minference_green.errors import UsageError
from minference_green.methods.patterns import Probed
from minference_green.model import loading
from minference_green.model.loading import load
from minference_green.workload import Workload, synthetic_tokens

CPU = torch.device("cpu")


def loaded(spec, **settings):
    return load(str(spec), device=CPU, dtype=torch.float32, **settings)


@pytest.fixture
def directory(build, tmp_path):
    """A trained model as a directory, three weight files, no tokenizer."""
    build("LlamaConfig").save_pretrained(tmp_path, max_shard_size="10KB")
    return tmp_path


@pytest.fixture
def with_tokenizer(directory):
    words = {word: number for number, word in enumerate(["?", "a", "b", "c", "d"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)
    return directory


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("touched the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def workload(**settings):
    return Workload(model="m", context_lengths=(8,), **settings)


@pytest.mark.parametrize(
    ("spec", "weights", "revision"),
    [("embedded", "trained", "sha256:"), ("planted:tiny", "planted weights", "planted-1 seed 0")],
)
def test_a_model_that_comes_with_the_package_carries_its_patterns(spec, weights, revision):
    model = loaded(spec)
    assert (model.spec, model.weights) == (spec, weights)
    assert model.revision.startswith(revision)
    config = model.model.config
    assert len(model.patterns) == config.num_hidden_layers
    assert len(model.patterns[0]) == config.num_attention_heads
    if spec == "embedded":
        assert len(model.probe_patterns) == config.num_hidden_layers
        probed = [p for layer in model.probe_patterns for p in layer if isinstance(p, Probed)]
        # Bands serve most heads; the others retrieve.
        assert 0 < len(probed) < config.num_hidden_layers * config.num_attention_heads / 2
    else:
        assert model.probe_patterns is None
    assert model.parameters == sum(p.numel() for p in model.model.parameters())
    assert model.max_context == config.max_position_embeddings
    assert next(model.model.parameters()).dtype == torch.float32
    assert not model.model.training


def test_a_planted_models_revision_names_the_seed():
    assert loaded("planted:tiny", seed=4).revision == "planted-1 seed 4"


def test_a_directory_loads_without_the_network(directory, build, ids, no_network):
    model = loaded(directory)
    expected = build("LlamaConfig")(ids(9)).logits
    assert torch.equal(model.model(ids(9)).logits, expected)
    assert (model.weights, model.patterns, model.bos) == ("trained", None, 1)
    assert model.parameters == sum(p.numel() for p in model.model.parameters())
    assert not any(p.requires_grad for p in model.model.parameters())


def test_a_directorys_revision_is_a_hash_of_its_content(directory):
    first = loaded(directory).revision
    assert first.startswith("sha256:")
    assert loaded(directory).revision == first
    file = sorted(directory.glob("*.safetensors"))[0]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert loaded(directory).revision != first


def test_a_hub_snapshots_revision_is_its_commit(directory):
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = directory / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for file in directory.glob("*.*"):
        file.rename(snapshot / file.name)
    assert loaded(snapshot).revision == commit


def test_the_dtype_is_the_one_asked_for(directory):
    model = load(str(directory), device=CPU, dtype=torch.bfloat16)
    assert {p.dtype for p in model.model.parameters()} == {torch.bfloat16}


def test_loading_prints_nothing(directory):
    code = (
        "import torch; from minference_green.model.loading import load; "
        "[load(s, device=torch.device('cpu'), dtype=torch.float32) for s in "
        f"({str(directory)!r}, 'embedded')]"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_the_embedded_model_is_a_stock_class_that_anyone_can_load(no_network):
    model = AutoModelForCausalLM.from_pretrained(loading.EMBEDDED, dtype=torch.float32)
    assert type(model) is LlamaForCausalLM
    asked = (
        'The price of Alba Toro is 417.0382. The motto of Una Ribe is "tal ne ros". '
        "\nQuestion: What is the price of Alba Toro?\nAnswer: The price of Alba Toro is "
    )
    ids = torch.tensor([[256, *asked.encode(), *b"417.0382"]])
    with torch.inference_mode():
        likeliest = model(ids).logits[0, -9:-1].argmax(-1)
    assert bytes(likeliest.tolist()) == b"417.0382"


def test_a_model_of_bytes_is_given_a_text_of_facts_as_its_synthetic_prompt():
    model = loaded("embedded")
    prompt = model.prompt(workload(batch=2, seed=5), 9000)
    assert prompt.shape == (2, 9000)
    assert (prompt[:, 0] == model.bos).all()
    texts = [bytes(row[1:].tolist()).decode(errors="ignore") for row in prompt]
    assert texts[0] != texts[1]
    assert all(text.count("Question: What is the ") >= 14 for text in texts)
    assert torch.equal(model.prompt(workload(seed=5), 9000)[0], prompt[0])
    assert model.prompt(workload(), 100).shape == (1, 100)


def test_a_model_of_bytes_reads_a_text_without_a_tokenizer(tmp_path):
    (tmp_path / "prompt.txt").write_text("naïve")
    prompt = loaded("embedded").prompt(workload(prompt=str(tmp_path / "prompt.txt")), 7)
    assert prompt.tolist() == [[256, *"naïve".encode()]]


def test_a_synthetic_prompt_begins_with_the_first_token_and_is_drawn_from_all_others():
    model = loaded("planted:tiny")
    prompt = model.prompt(workload(batch=2, seed=5), 3000)
    assert prompt.shape == (2, 3000)
    assert prompt.dtype == torch.int64
    assert (prompt[:, 0] == model.bos).all()
    assert (prompt[:, 1:] != model.bos).all()
    assert prompt.min() >= 0
    assert prompt.max() < model.vocabulary
    assert not torch.equal(prompt[0], prompt[1])
    assert torch.equal(model.prompt(workload(seed=5), 100)[0], prompt[0, :100])


def test_the_first_tokens_number_is_stepped_over(directory):
    prompt = loaded(directory, allow_longer=True).prompt(workload(), 2000)[0]
    assert prompt[0] == 1
    drawn = torch.from_numpy(synthetic_tokens(0, 0, 1999, 96))
    assert torch.equal(prompt[1:], drawn + (drawn >= 1))
    assert set(prompt[1:].tolist()) == set(range(97)) - {1}


def test_a_model_without_a_first_token_gets_none(build, tmp_path):
    build("LlamaConfig", bos_token_id=None).save_pretrained(tmp_path)
    prompt = loaded(tmp_path).prompt(workload(), 50)[0]
    assert torch.equal(prompt, torch.from_numpy(synthetic_tokens(0, 0, 50, 97)))


def test_a_text_prompt_goes_through_the_models_tokenizer(with_tokenizer, tmp_path, no_network):
    text = tmp_path / "prompt.txt"
    text.write_text("d c b a nothing d d d d d")
    prompt = loaded(with_tokenizer).prompt(workload(prompt=str(text), batch=2), 5)
    assert prompt.tolist() == [[4, 3, 2, 1, 0]] * 2


def test_a_prompt_longer_than_the_model_is_made_for_needs_permission(directory):
    with pytest.raises(UsageError, match=r"made for 256 tokens, 257 were asked.*--allow-longer"):
        loaded(directory).prompt(workload(), 257)
    assert loaded(directory).prompt(workload(), 256).shape == (1, 256)
    assert loaded(directory, allow_longer=True).prompt(workload(), 257).shape == (1, 257)


def text_error(directory, path, **settings):
    with pytest.raises(UsageError) as caught:
        loaded(directory).prompt(workload(prompt=str(path), **settings), 8)
    return str(caught.value)


def test_a_text_that_is_too_short_says_how_many_tokens_it_has(with_tokenizer, tmp_path):
    (tmp_path / "short.txt").write_text("a b c")
    message = text_error(with_tokenizer, tmp_path / "short.txt")
    assert "short.txt has 3 tokens" in message
    assert "8 are needed" in message


def test_a_text_that_changed_is_refused(with_tokenizer, tmp_path):
    text = tmp_path / "long.txt"
    text.write_text("a b c d " * 4)
    right = hashlib.sha256(text.read_bytes()).hexdigest()
    prompt = loaded(with_tokenizer).prompt(workload(prompt=str(text), prompt_sha256=right), 8)
    assert prompt.shape == (1, 8)
    text.write_text("b b c d " * 4)
    assert "has changed" in text_error(with_tokenizer, text, prompt_sha256=right)


def test_a_text_without_a_tokenizer_says_what_to_do(directory, tmp_path):
    (tmp_path / "prompt.txt").write_text("a b c")
    assert "add the model's tokenizer.json" in text_error(directory, tmp_path / "prompt.txt")
    assert "use --prompt synthetic" in text_error("planted:tiny", tmp_path / "prompt.txt")


def test_a_text_that_cannot_be_read_is_named(with_tokenizer, tmp_path):
    assert "cannot read prompt" in text_error(with_tokenizer, tmp_path / "none.txt")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    assert "is not UTF-8 text" in text_error(with_tokenizer, tmp_path / "binary.txt")


@pytest.mark.parametrize("spec", ["embeded", "/no/such/directory", "./none", "a/b/c", ""])
def test_a_spec_that_names_nothing_lists_what_does(spec, no_network):
    with pytest.raises(UsageError) as caught:
        loaded(spec)
    message = str(caught.value)
    assert repr(spec) in message
    assert "planted:llama-3-8b, planted:qwen2.5-7b, planted:tiny" in message


def test_an_unknown_planted_shape_lists_the_known():
    with pytest.raises(UsageError, match=r"'planted:llama-9' .* choose from planted:llama-3-8b,"):
        loaded("planted:llama-9")


def test_a_hub_id_that_cannot_be_had_says_so(monkeypatch):
    def offline(*args, **kwargs):
        raise LocalEntryNotFoundError("Cannot find an appropriate snapshot\nmore")

    monkeypatch.setattr("minference_green.model.directory.snapshot_download", offline)
    with pytest.raises(UsageError) as caught:
        loaded("nobody/nothing")
    assert "cannot get 'nobody/nothing' from the hub (Cannot find an" in str(caught.value)
    assert "more" not in str(caught.value)


def test_of_a_hub_model_only_weights_configuration_and_tokenizer_are_fetched(
    directory, monkeypatch
):
    asked = {}

    def fetch(name, *, allow_patterns, ignore_patterns):
        asked.update(name=name, allow=allow_patterns, ignore=ignore_patterns)
        return str(directory)

    monkeypatch.setattr("minference_green.model.directory.snapshot_download", fetch)
    assert loaded("somebody/some-model").spec == "somebody/some-model"
    assert asked["name"] == "somebody/some-model"
    offered = [
        "config.json",
        "model-00001-of-00002.safetensors",
        "tokenizer.model",
        "pytorch_model.bin",
        "modeling_own.py",
        "original/params.json",
        "consolidated.safetensors",
    ]
    fetched = list(
        filter_repo_objects(offered, allow_patterns=asked["allow"], ignore_patterns=asked["ignore"])
    )
    assert fetched == offered[:3]


def refusal(directory):
    with pytest.raises(UsageError) as caught:
        loaded(directory)
    return str(caught.value)


def test_a_directory_without_a_configuration_is_refused(directory):
    (directory / "config.json").unlink()
    assert "has no config.json" in refusal(directory)


@pytest.mark.parametrize("content", ["{", '{"model_type": "unheard-of"}', "{}", "[]"])
def test_a_configuration_transformers_does_not_know_is_refused(content, directory):
    (directory / "config.json").write_text(content)
    assert "config.json is no configuration that transformers knows" in refusal(directory)


def test_code_in_a_model_directory_is_never_run(directory):
    config = json.loads((directory / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "own.py").write_text("raise SystemExit('ran')")
    assert "config.json is no configuration" in refusal(directory)


def test_an_encoder_is_refused_by_name(tmp_path):
    config = BertConfig(
        vocab_size=40,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
    )
    BertForMaskedLM(config).save_pretrained(tmp_path)
    assert "holds a bert model (BertForMaskedLM), not a causal language model" in refusal(tmp_path)


def test_a_directory_without_safetensors_says_what_it_found(directory):
    for file in directory.glob("*.safetensors*"):
        file.unlink()
    assert "has no weights; weights must be safetensors" in refusal(directory)
    (directory / "pytorch_model.bin").write_bytes(b"")
    assert "has only pytorch_model.bin" in refusal(directory)


@pytest.mark.parametrize("damage", ["missing", "truncated", "empty", "garbled header"])
def test_a_damaged_weight_file_is_named(damage, directory):
    file = sorted(directory.glob("*.safetensors"))[1]
    content = file.read_bytes()
    match damage:
        case "missing":
            file.unlink()
        case "truncated":
            file.write_bytes(content[:-5])
        case "empty":
            file.write_bytes(b"")
        case "garbled header":
            file.write_bytes(content[:8] + b"\x00" * (len(content) - 8))
    message = refusal(directory)
    assert str(file) in message
    assert "get it again" in message


def test_a_damaged_index_is_named(directory):
    (directory / "model.safetensors.index.json").write_text("[]")
    assert "model.safetensors.index.json is damaged" in refusal(directory)


def test_weights_that_lack_a_tensor_are_refused_not_drawn_at_random(directory):
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    lost = "model.layers.1.mlp.up_proj.weight"
    shard = directory / content["weight_map"].pop(lost)
    index.write_text(json.dumps(content))
    from safetensors.torch import load_file, save_file

    tensors = load_file(shard)
    del tensors[lost]
    save_file(tensors, shard, metadata={"format": "pt"})
    message = refusal(directory)
    assert "lack or misshape 1 of the tensors" in message
    assert lost in message


def test_weights_of_another_shape_are_refused(directory):
    config = json.loads((directory / "config.json").read_text())
    config["intermediate_size"] = 52
    (directory / "config.json").write_text(json.dumps(config))
    message = refusal(directory)
    assert "lack or misshape 6 of the tensors" in message
    assert "model.layers.0.mlp.down_proj.weight" in message


def test_a_model_too_big_for_its_device_says_so(monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 14 GiB\nmore")

    monkeypatch.setattr("minference_green.model.loading.plant", full)
    with pytest.raises(UsageError, match=r"planted:tiny does not fit on cpu: .*14 GiB; free"):
        loaded("planted:tiny")
