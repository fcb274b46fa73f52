"""From text to a model's tokens, each knowing the bytes it stands for."""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

from transformers import AutoTokenizer

from minference_green.errors import UsageError
from minference_green.model.directory import first_line, quiet
from minference_green.model.loading import LoadedModel


@dataclass(frozen=True)
class Tokens:
    """Token ids of a text; token ``i`` stands for bytes ``[starts[i], ends[i])`` of its UTF-8.

    ``starts`` and ``ends`` ascend; neighbours overlap where a character is split over tokens.
    """

    ids: Sequence[int]
    starts: Sequence[int]
    ends: Sequence[int]

    def of(self, start: int, end: int) -> tuple[int, int]:
        """The tokens ``[first, last)`` that hold any of the bytes ``[start, end)``."""
        return bisect_right(self.ends, start), bisect_left(self.starts, end)


class Encoder(Protocol):
    """Turns text into a model's tokens."""

    @property
    def opening(self) -> tuple[int, ...]:
        """Token ids that stand before every prompt."""

    @property
    def bytes_per_token(self) -> int:
        """1 where every token is a byte, otherwise 0: then a text's tokens must be counted."""

    def encode(self, text: str) -> Tokens:
        """Tokens of the text alone, nothing added before or behind it."""


@dataclass(frozen=True)
class Bytes:
    """The encoder of a model that reads UTF-8 bytes."""

    opening: tuple[int, ...]
    bytes_per_token: int = 1

    def encode(self, text: str) -> Tokens:
        """See :class:`Encoder`."""
        raw = text.encode()
        return Tokens(raw, range(len(raw)), range(1, len(raw) + 1))


@dataclass(frozen=True)
class Fast:
    """A tokenizer that tells which characters each token stands for."""

    tokenizer: Any
    opening: tuple[int, ...]
    bytes_per_token: int = 0

    def encode(self, text: str) -> Tokens:
        """See :class:`Encoder`."""
        with quiet():  # a text longer than the model's context is the caller's to refuse
            found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        before = [0, *accumulate(len(c.encode()) for c in text)]
        spans = found["offset_mapping"]
        return Tokens(
            found["input_ids"], [before[a] for a, _ in spans], [before[b] for _, b in spans]
        )


def encoder(model: LoadedModel) -> Encoder:
    """How ``model`` reads text.

    A model whose configuration says so reads bytes; a planted one, which knows no text, takes
    bytes for its token numbers. Others need a tokenizer with offsets beside their weights:
    raises ``UsageError`` if there is none.
    """
    if model.reads_bytes or model.directory is None:
        if model.vocabulary < 256:
            raise UsageError(
                f"{model.spec} has {model.vocabulary} tokens, too few for the 256 bytes"
            )
        return Bytes(() if model.bos is None else (model.bos,))
    try:
        with quiet():
            tokenizer: Any = AutoTokenizer.from_pretrained(
                model.directory, local_files_only=True, trust_remote_code=False
            )
    except (OSError, ValueError, ImportError, TypeError, AttributeError) as error:
        raise UsageError(
            f"no usable tokenizer in {model.directory} ({first_line(error)}); "
            "add the model's tokenizer.json"
        ) from error
    if not tokenizer.is_fast:
        raise UsageError(
            f"the tokenizer of {model.spec} ({type(tokenizer).__name__}) does not tell which text "
            "each token stands for; give a model with a fast tokenizer (tokenizer.json)"
        )
    # What the tokenizer itself puts before a prompt; what it puts behind one has no place here.
    opening = tuple(i for i in tokenizer("")["input_ids"] if i == tokenizer.bos_token_id)
    return Fast(tokenizer, opening)
