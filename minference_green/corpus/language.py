"""Sentences that state a fact, and sentences that ask for it.

A fact is a value under a key, ``the <attribute> of <entity>``. Every form ends with the value,
so that its first token can only come from the place where it was stated.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from minference_green.corpus.draws import Draws
from minference_green.corpus.kinds import name

ATTRIBUTES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "integer": ("access code", "seat number", "badge number", "crate count"),
        "decimal": ("price", "balance", "index value", "share ratio"),
        "date": ("opening date", "renewal date", "landing date", "founding date"),
        "person": ("keeper", "first author", "surveyor", "night guard"),
        "place": ("home port", "meeting place", "storage site", "birthplace"),
        "identifier": ("entry function", "handler", "lock variable", "callback"),
        "path": ("manual page", "config path", "mirror address", "log location"),
        "hex": ("checksum", "device id", "session key", "build hash"),
        "negated": ("permit status", "audit status", "gate status", "claim status"),
        "rare": ("code word", "call sign", "brand name", "dialect term"),
        "quotation": ("motto", "closing line", "last remark", "inscription"),
        "cell": ("table entry", "shelf mark", "grid label", "row tag"),
        "script": ("native name", "seal text", "local spelling", "sign text"),
        "measure": ("length", "cargo load", "tank volume", "rated output"),
    }
)


@dataclass(frozen=True)
class Key:
    """What a fact is filed under."""

    attribute: str
    entity: str

    def __str__(self) -> str:
        return f"{self.attribute} of {self.entity}"


def entity(draws: Draws) -> str:
    """A two-word name for the bearer of a fact."""
    return f"{name(draws)} {name(draws)}"


def key(kind: str, draws: Draws) -> Key:
    """A key whose attribute suits this kind of value."""
    return Key(draws.pick(ATTRIBUTES[kind]), entity(draws))


def near_duplicate(key: Key, draws: Draws) -> Key:
    """Another entity, one word of its name the same."""
    first, second = key.entity.split(" ")
    fresh = name(draws)
    renamed = f"{first} {fresh}" if draws.chance(0.5) else f"{fresh} {second}"
    return Key(key.attribute, renamed)


def statement(kind: str, key: Key) -> str:
    """The text before the value where a fact is stated; ``ending`` follows it."""
    return f"| {key} | " if kind == "cell" else f"The {key} is "


def paraphrase(kind: str, key: Key) -> str:
    """The same in other words, the entity before the attribute."""
    if kind == "cell":
        return f"| {key.entity} | {key.attribute} | "
    return f"For {key.entity}, the {key.attribute} is "


def update(kind: str, key: Key) -> str:
    """The text before a value that replaces an earlier one."""
    return f"| {key} now | " if kind == "cell" else f"The {key} is now "


def ending(kind: str) -> str:
    """What follows a stated value."""
    return " |\n" if kind == "cell" else ". "


def alias(key: Key, other: str) -> str:
    """A whole sentence that gives ``other`` the same value as the entity of ``key``."""
    return f"The {key.attribute} of {other} is the same as that of {key.entity}. "


def question(key: Key) -> str:
    """A question and the prefix of its answer; the value follows, then ``ANSWER_END``."""
    return f"\nQuestion: What is the {key}?\nAnswer: The {key} is "


ANSWER_END = ".\n"
