"""What is computed, apart from how: model, prompt, lengths, batch, dtype, seed."""

import hashlib
import json
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from minference_green.errors import UsageError

SYNTHETIC = "synthetic"
"""The prompt made of tokens drawn from the model's vocabulary."""


@dataclass(frozen=True)
class Workload:
    """One prefill workload at several context lengths.

    ``prompt`` is ``synthetic`` (tokens drawn evenly from the model's vocabulary by ``seed``)
    or the path of a text file; ``prompt_sha256`` then pins its content.
    """

    model: str
    context_lengths: tuple[int, ...]
    batch: int = 1
    dtype: str = "bfloat16"
    seed: int = 0
    prompt: str = SYNTHETIC
    prompt_sha256: str | None = None

    @property
    def hash(self) -> str:
        """Content hash of everything above; a hard key of a fingerprint."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def synthetic_tokens(seed: int, row: int, length: int, n_choices: int) -> NDArray[np.int64]:
    """Token numbers in ``[0, n_choices)``, ``[length]``, the same on every machine.

    A longer prompt begins with the shorter one. SHAKE-256 of (seed, row) supplies the bits,
    so that no library's random generator can change a workload.
    """
    stream = hashlib.shake_256(f"minference-green {seed} {row}".encode()).digest(4 * length)
    return (np.frombuffer(stream, dtype="<u4") % n_choices).astype(np.int64)


def parse_length(text: str) -> int:
    """A context length in tokens from ``8192``, ``8k`` (8 x 1024) or ``1m`` (1024 x 1024)."""
    units = {"k": 1024, "m": 1024 * 1024}
    digits, unit = (text[:-1], units[text[-1].lower()]) if text[-1:].lower() in units else (text, 1)
    if not digits.isdecimal() or int(digits) < 1:
        raise UsageError(
            f"{text!r} is not a context length; write tokens (4096) or thousands (8k, 128k, 1m)"
        )
    return int(digits) * unit


def format_length(tokens: int) -> str:
    """The short form of a context length: ``8k``, ``1m`` or the plain number."""
    if tokens % (1024 * 1024) == 0:
        return f"{tokens // (1024 * 1024)}m"
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)
