"""Random numbers of a seed and a path, the same on every machine and Python version."""

from collections.abc import Sequence
from hashlib import shake_128
from struct import unpack
from typing import TypeVar

T = TypeVar("T")

_FIRST_BLOCK = 256
_BLOCK = 4096
"""Bytes hashed at a time: few for the many short-lived paths, more for a long one."""


class Draws:
    """An endless row of numbers drawn from SHAKE-128 of (seed, path, block number).

    Children by path are independent of what was drawn before: adding a draw in one place
    changes nothing anywhere else.
    """

    def __init__(self, seed: int, *path: object) -> None:
        self._seed, self._path = seed, path
        self._name = "/".join(("minference-green", str(seed), *map(str, path))).encode()
        self._block = 0
        self._numbers: list[int] = []

    def child(self, *path: object) -> "Draws":
        """The draws of a path below this one."""
        return Draws(self._seed, *self._path, *path)

    def below(self, n: int) -> int:
        """A number in ``[0, n)``, ``n`` at most 2^32 and far smaller where evenness matters."""
        if not self._numbers:
            self._refill()
        return self._numbers.pop() * n >> 32

    def between(self, low: int, high: int) -> int:
        """A number in ``[low, high]``."""
        return low + self.below(high - low + 1)

    def uniform(self) -> float:
        """A number in [0, 1), a multiple of 2^-32."""
        return self.below(1 << 32) / 4294967296.0

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self.uniform() < probability

    def pick(self, choices: Sequence[T]) -> T:
        """One of the choices, evenly."""
        return choices[self.below(len(choices))]

    def sample(self, choices: Sequence[T], n: int) -> list[T]:
        """``n`` different ones of the choices, in random order."""
        rest = list(choices)
        if n > len(rest):
            raise ValueError(f"cannot draw {n} different ones of {len(rest)}")
        for i in range(n):
            j = i + self.below(len(rest) - i)
            rest[i], rest[j] = rest[j], rest[i]
        return rest[:n]

    def shuffled(self, choices: Sequence[T]) -> list[T]:
        """The choices in random order."""
        return self.sample(choices, len(choices))

    def _refill(self) -> None:
        size = _BLOCK if self._block else _FIRST_BLOCK
        digest = shake_128(self._name + b"#%d" % self._block).digest(size)
        self._numbers = list(unpack(f"<{size // 4}I", digest))
        self._block += 1
