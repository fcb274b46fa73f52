"""Workloads are the same bytes everywhere, and lengths are read as people write them."""

import dataclasses

import pytest

from minference_green.errors import UsageError
from minference_green.workload import Workload, format_length, parse_length, synthetic_tokens


def test_synthetic_tokens_are_the_same_on_every_machine() -> None:
    assert synthetic_tokens(0, 0, 6, 1000).tolist() == [768, 966, 83, 795, 542, 568]


def test_a_longer_prompt_begins_with_the_shorter_one() -> None:
    long = synthetic_tokens(7, 1, 1000, 320)
    assert (long[:111] == synthetic_tokens(7, 1, 111, 320)).all()


def test_seed_and_row_each_change_the_prompt_and_tokens_stay_in_the_vocabulary() -> None:
    base = synthetic_tokens(1, 0, 4096, 97)
    assert base.min() >= 0
    assert base.max() == 96
    for other in (synthetic_tokens(2, 0, 4096, 97), synthetic_tokens(1, 1, 4096, 97)):
        assert (base != other).mean() > 0.9


def test_the_hash_changes_with_every_field() -> None:
    base = Workload(model="embedded", context_lengths=(8192,))
    changes = {
        "model": "planted:tiny",
        "context_lengths": (4096,),
        "batch": 2,
        "dtype": "float16",
        "seed": 1,
        "prompt": "a.txt",
        "prompt_sha256": "00",
    }
    assert changes.keys() == {f.name for f in dataclasses.fields(Workload)}
    hashes = {dataclasses.replace(base, **{k: v}).hash for k, v in changes.items()}
    assert len(hashes | {base.hash}) == len(changes) + 1


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("4096", 4096), ("8k", 8192), ("128K", 131072), ("1m", 1048576), ("1", 1)],
)
def test_lengths_are_read_in_tokens_and_thousands(text: str, tokens: int) -> None:
    assert parse_length(text) == tokens


@pytest.mark.parametrize("text", ["", "k", "0", "-4", "8.5k", "8kb", "lots", "²"])
def test_what_is_not_a_length_is_refused_with_its_text(text: str) -> None:
    with pytest.raises(UsageError, match="is not a context length") as caught:
        parse_length(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize("tokens", [1, 999, 1000, 1024, 8192, 131072, 2**20, 3 * 2**20])
def test_the_short_form_reads_back_as_the_same_length(tokens: int) -> None:
    assert parse_length(format_length(tokens)) == tokens
