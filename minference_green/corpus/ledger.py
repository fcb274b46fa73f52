"""What has been said in one haystack, so that each value has one source."""

from collections.abc import Callable

from minference_green.corpus.draws import Draws
from minference_green.corpus.kinds import value
from minference_green.corpus.language import Key
from minference_green.errors import UsageError

_TRIES = 1000


class Ledger:
    """Keys and values drawn so far; a new one is drawn again until it differs enough.

    No value is part of another or of a key, two of a kind are at least two edits apart, no key
    comes twice. Raises ``UsageError`` where a kind has no such value left.
    """

    def __init__(self) -> None:
        self._keys: list[str] = []
        self._of_kind: dict[str, list[str]] = {}

    @property
    def values(self) -> tuple[str, ...]:
        """All values drawn."""
        return tuple(value for values in self._of_kind.values() for value in values)

    def key(self, draw: Callable[[], Key]) -> Key:
        """A key that ``draw`` gives and that is new."""
        for _ in range(_TRIES):
            new = draw()
            text = str(new)
            if text not in self._keys and not any(value in text for value in self.values):
                self._keys.append(text)
                return new
        raise UsageError(f"no further key like {text!r}: ask for fewer questions or competitors")

    def value(self, kind: str, draws: Draws) -> str:
        """A new value of this kind."""
        known = self._of_kind.setdefault(kind, [])
        for _ in range(_TRIES):
            new = value(kind, draws)
            if not any(within_one_edit(new, old) for old in known) and not self._overlaps(new):
                known.append(new)
                return new
        raise UsageError(
            f"kind {kind!r} has no further value that differs enough from {len(known)} others: "
            "ask for fewer questions or competitors"
        )

    def _overlaps(self, new: str) -> bool:
        return any(new in old or old in new for old in self.values) or any(
            new in key for key in self._keys
        )


def within_one_edit(a: str, b: str) -> bool:
    """Whether one insertion, deletion or substitution, or none, makes ``a`` into ``b``."""
    if abs(len(a) - len(b)) > 1:
        return False
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
    if same is None:
        return True
    rest_a, rest_b = a[same:], b[same:]
    return rest_a[1:] == rest_b[1:] or rest_a == rest_b[1:] or rest_a[1:] == rest_b
