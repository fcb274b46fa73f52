"""Tokens that know their bytes, whatever the tokenizer."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from minference_green.errors import UsageError
from minference_green.model.loading import LoadedModel, load
from minference_green.model.text import Bytes, Tokens, encoder

TEXT = "The keeper of Rothai Brel is naïve Ünal 4821. Ответ: 漢字 — done.\n"


@pytest.fixture(scope="module")
def tokenizer_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer with a first token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(["The keeper of the keeper is the keeper. "] * 20, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    directory = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained(directory)
    LlamaConfig(vocab_size=300).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def planted() -> LoadedModel:
    return load("planted:tiny", device=torch.device("cpu"), dtype=torch.float32)


def test_a_token_of_a_byte_model_is_its_byte(planted: LoadedModel) -> None:
    found = encoder(planted)
    assert isinstance(found, Bytes)
    assert bytes(found.encode(TEXT).ids).decode() == TEXT
    assert found.opening == (() if planted.bos is None else (planted.bos,))


def test_a_configuration_says_that_tokens_are_bytes(
    planted: LoadedModel, tokenizer_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planted.model.config, "minference_green_bytes", True, raising=False)
    assert isinstance(encoder(replace(planted, directory=tokenizer_directory)), Bytes)


def test_a_fast_tokenizers_tokens_cover_their_bytes(
    planted: LoadedModel, tokenizer_directory: Path
) -> None:
    found = encoder(replace(planted, directory=tokenizer_directory))
    tokens = found.encode(TEXT)
    raw = TEXT.encode()
    assert found.opening == (0,)
    assert 0 not in tokens.ids
    assert tokens.starts[0] == 0
    assert tokens.ends[-1] == len(raw)
    for word in ("keeper", "naïve", "4821", "漢字", "字"):
        start = raw.index(word.encode())
        first, last = tokens.of(start, start + len(word.encode()))
        held = raw[tokens.starts[first] : tokens.ends[last - 1]].decode()
        assert word in held
        assert len(held) <= len(word) + 8  # a token more at either side at most


@pytest.mark.parametrize(
    ("span", "found"),
    [((0, 1), (0, 1)), ((1, 2), (0, 1)), ((2, 3), (1, 3)), ((0, 7), (0, 4)), ((5, 7), (3, 4))],
)
def test_tokens_of_bytes_are_all_that_hold_any_of_them(span, found) -> None:
    """The second and third token share the bytes of one character."""
    tokens = Tokens((9, 8, 7, 6), starts=(0, 2, 2, 5), ends=(2, 5, 5, 7))
    assert tokens.of(*span) == found


def test_a_tokenizer_without_offsets_is_refused(
    planted: LoadedModel, tokenizer_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", False)
    with pytest.raises(UsageError, match="does not tell which text each token stands for"):
        encoder(replace(planted, directory=tokenizer_directory))


def test_a_directory_without_a_tokenizer_is_refused(planted: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no usable tokenizer in .*tokenizer\.json"):
        encoder(replace(planted, directory=tmp_path))


def test_a_vocabulary_smaller_than_a_byte_reads_no_bytes(planted: LoadedModel) -> None:
    with pytest.raises(UsageError, match="100 tokens, too few for the 256 bytes"):
        encoder(replace(planted, vocabulary=100))
