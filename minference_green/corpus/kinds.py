"""The kinds of information an audit tells apart, and how a value of each is made.

No value comes from a list of real names or a copied text: letters, syllables and digits are
drawn, so that a model cannot know an answer without reading it.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from minference_green.corpus.draws import Draws

ONSETS = (
    "b", "br", "c", "d", "dr", "f", "g", "gr", "h", "k", "l", "m", "n", "p", "pl", "r", "s", "st",
    "t", "tr", "v", "w", "z", "sh", "th",
)  # fmt: skip
VOWELS = ("a", "a", "e", "e", "i", "i", "o", "o", "u", "ai", "ea", "io")
CODAS = ("", "", "", "", "l", "n", "r", "s", "m", "nd", "rk")
_VERBS = ("get", "set", "load", "parse", "read", "send", "find", "make", "drop", "sort")
_STATES = (
    "valid", "sealed", "paid", "open", "signed", "listed", "secured", "ready", "active",
    "approved", "tested", "loaded", "stable", "public", "cleared", "mapped", "locked", "shared",
    "indexed", "granted", "archived", "visible", "pending", "closed",
)  # fmt: skip
_UNITS = ("km", "kg", "cm", "mm", "litres", "hours", "volts", "tonnes", "pages", "knots")
_MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September",
    "October", "November", "December",
)  # fmt: skip
_PLACES = ("Port {}", "Mount {}", "{} Bay", "{} Hill", "Lake {}", "{} Bridge", "Fort {}", "{}")
_SCRIPTS: tuple[tuple[int, int], ...] = (
    (0x03B1, 0x03C1),  # Greek
    (0x0430, 0x044F),  # Cyrillic
    (0x0561, 0x0586),  # Armenian
    (0x05D0, 0x05EA),  # Hebrew
    (0x0628, 0x063A),  # Arabic
    (0x0905, 0x0939),  # Devanagari
    (0x10D0, 0x10F0),  # Georgian
    (0x3042, 0x3093),  # Hiragana
    (0x4E00, 0x9FA5),  # Han
    (0xAC00, 0xD7A3),  # Hangul
)


def syllable(draws: Draws) -> str:
    """A pronounceable syllable, two to six letters."""
    return draws.pick(ONSETS) + draws.pick(VOWELS) + draws.pick(CODAS)


def word(draws: Draws, low: int = 2, high: int = 3) -> str:
    """A pseudo-word of ``low`` to ``high`` syllables, lower case."""
    return "".join(syllable(draws) for _ in range(draws.between(low, high)))


def name(draws: Draws, low: int = 2, high: int = 2) -> str:
    """A pseudo-word with a capital."""
    return word(draws, low, high).capitalize()


def _integer(draws: Draws) -> str:
    digits = draws.between(4, 8)
    return str(draws.between(1, 9)) + "".join(str(draws.below(10)) for _ in range(digits - 1))


def _decimal(draws: Draws) -> str:
    if draws.chance(0.5):
        return f"{draws.below(1000)}.{draws.below(10000):04d}"
    return f"${draws.between(1, 999)},{draws.below(1000):03d}.{draws.below(100):02d}"


def _date(draws: Draws) -> str:
    day, year = draws.between(1, 28), draws.between(1100, 2099)
    if draws.chance(0.5):
        return f"{day} {draws.pick(_MONTHS)} {year}"
    return f"{year}-{draws.between(1, 12):02d}-{day:02d}"


def _person(draws: Draws) -> str:
    return f"{name(draws)} {name(draws)}"


def _place(draws: Draws) -> str:
    return draws.pick(_PLACES).format(name(draws, 2, 3))


def _identifier(draws: Draws) -> str:
    verb, parts = draws.pick(_VERBS), [word(draws, 1, 2), word(draws, 1, 2)]
    if draws.chance(0.5):
        return "_".join([verb, *parts])
    return verb + "".join(part.capitalize() for part in parts)


def _path(draws: Draws) -> str:
    parts = [word(draws, 1, 2) for _ in range(3)]
    if draws.chance(0.5):
        return f"https://{parts[0]}.net/{parts[1]}/{parts[2]}"
    return f"/{parts[0]}/{parts[1]}/{parts[2]}.cfg"


def _hex(draws: Draws) -> str:
    def digits(n: int) -> str:
        return "".join("0123456789abcdef"[draws.below(16)] for _ in range(n))

    return digits(12) if draws.chance(0.5) else f"{digits(8)}-{digits(4)}-{digits(4)}"


def _negated(draws: Draws) -> str:
    state = f"{draws.pick(_STATES)} and {draws.pick(_STATES)}"
    return f"not {state}" if draws.chance(0.5) else state


def _rare(draws: Draws) -> str:
    letters = "bcdfghjklmnpqrstvwxyz"
    head = "".join(letters[draws.below(len(letters))] for _ in range(3))
    return head + word(draws, 1, 2) + letters[draws.below(len(letters))]


def _quotation(draws: Draws) -> str:
    return '"' + " ".join(word(draws, 1, 2) for _ in range(draws.between(3, 4))) + '"'


def _cell(draws: Draws) -> str:
    letters = "ABCDEFGHJKLMNPRSTUVWXYZ"
    return f"{letters[draws.below(23)]}{letters[draws.below(23)]}{draws.below(10000):04d}"


def _script(draws: Draws) -> str:
    low, high = draws.pick(_SCRIPTS)
    return "".join(chr(draws.between(low, high)) for _ in range(draws.between(3, 5)))


def _measure(draws: Draws) -> str:
    return f"{draws.between(10, 9999)}.{draws.below(10)} {draws.pick(_UNITS)}"


_MAKERS: Mapping[str, Callable[[Draws], str]] = MappingProxyType(
    {
        "integer": _integer,
        "decimal": _decimal,
        "date": _date,
        "person": _person,
        "place": _place,
        "identifier": _identifier,
        "path": _path,
        "hex": _hex,
        "negated": _negated,
        "rare": _rare,
        "quotation": _quotation,
        "cell": _cell,
        "script": _script,
        "measure": _measure,
    }
)

KINDS: tuple[str, ...] = tuple(_MAKERS)
"""Integer; decimal or currency; date; person; place; code identifier; URL or path; hex or UUID;
a status that may be negated; rare pseudo-word; quotation; table cell; another script; measure."""


def value(kind: str, draws: Draws) -> str:
    """A value of this kind, 3 to about 40 bytes of UTF-8. Raises ``KeyError`` for another kind."""
    return _MAKERS[kind](draws)
