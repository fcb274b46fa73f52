"""Kinds of information in a text of the user's own, told by their looks.

Regular expressions, tried in order: what an earlier one took, a later one leaves. They know
forms, not meanings: a capitalised word behind a full stop is no name, one that stands elsewhere
is.
"""

import re
from collections.abc import Mapping
from types import MappingProxyType

_UNITS = (
    "km|cm|mm|m|kg|g|mg|t|s|ms|min|h|hours?|days?|years?|W|kW|MW|kWh|MWh|J|V|A|Hz|kHz|MHz|GHz|"
    "B|kB|MB|GB|TB|KiB|MiB|GiB|TiB|l|litres?|miles?|feet|knots|°C|°F|K|%|tonnes?"
)
_MONTHS = (
    "(?:Jan(?:uary)?|Feb(?:ruary)?|Mar(?:ch)?|Apr(?:il)?|May|June?|July?|Aug(?:ust)?|"
    "Sep(?:t(?:ember)?)?|Oct(?:ober)?|Nov(?:ember)?|Dec(?:ember)?)"
)

_NOT_LATIN = r"[^\W\d_\u0000-\u024f\u1e00-\u1eff]"

TAGS: Mapping[str, re.Pattern[str]] = MappingProxyType(
    {
        "path": re.compile(
            r"\b[a-z][a-z0-9+.-]*://[^\s<>\"')\]]+|(?<![\w/])~?(?:/[\w.@+-]+){2,}/?"
        ),
        "hex": re.compile(
            r"\b[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}\b|\b0x[0-9a-fA-F]+\b|"
            r"\b(?=[0-9a-f]*[a-f])(?=[0-9a-f]*\d)[0-9a-f]{7,}\b"
        ),
        "date": re.compile(
            rf"\b\d{{4}}-\d{{2}}-\d{{2}}\b|\b\d{{1,2}}[./]\d{{1,2}}[./]\d{{2,4}}\b|"
            rf"\b\d{{1,2}}(?:st|nd|rd|th)? {_MONTHS}\.?(?:,? \d{{4}})?\b|"
            rf"\b{_MONTHS}\.? \d{{1,2}}(?:st|nd|rd|th)?(?:, \d{{4}})?\b|\b{_MONTHS} \d{{4}}\b"
        ),
        "measure": re.compile(rf"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?\s?(?:{_UNITS})(?!\w)"),
        "identifier": re.compile(
            r"\b[A-Za-z]\w*_\w+\b|\b_+\w+\b|\b[a-z]+(?:[A-Z][a-z0-9]*)+\b|"
            r"\b(?:[A-Z][a-z0-9]+){2,}\b|\b\w+(?=\(\))"
        ),
        "cell": re.compile(r"\b[A-Z]{1,4}-?\d{2,}\b"),
        "decimal": re.compile(
            r"(?<![\w.])[-+]?[$€£¥]\s?\d[\d,]*(?:\.\d+)?(?!\w)|(?<![\w.])[-+]?\d[\d,]*\.\d+(?![\w.])"
        ),
        "integer": re.compile(r"(?<![\w.])[-+]?\d+(?:,\d{3})*(?!\w|\.\d)"),
        "negated": re.compile(
            r"\b(?:not|never|no|none|nobody|nothing|neither|nor|without|cannot)\b|\b\w+n['’]t\b",
            re.IGNORECASE,
        ),
        "quotation": re.compile(r"[\"“][^\"“”\n]{3,200}[\"”]|«[^«»\n]{3,200}»"),
        "script": re.compile(
            r"[^\W\d_\u0000-\u024f\u1e00-\u1eff]+(?:[ ][^\W\d_\u0000-\u024f\u1e00-\u1eff]+)*"
        ),
        "name": re.compile(
            r"(?<=[a-z,;:\"“(]\s)[A-Z][a-z]+(?:[ -][A-Z][a-z]+)*|\b[A-Z][a-z]+(?: [A-Z][a-z]+)+\b"
        ),
    }
)
"""Kinds by name, in the order in which they are tried."""

OTHER = "other"
"""Everything that no expression takes."""


def tagged(text: str) -> dict[str, tuple[tuple[int, int], ...]]:
    """Byte spans ``[start, end)`` of each kind found in the text's UTF-8, in order."""
    before = [0]
    for character in text:
        before.append(before[-1] + len(character.encode()))
    taken = bytearray(len(text))
    found: dict[str, list[tuple[int, int]]] = {}
    for kind, pattern in TAGS.items():
        for match in pattern.finditer(text):
            start, end = match.span()
            if start == end or any(taken[start:end]):
                continue
            taken[start:end] = b"\x01" * (end - start)
            found.setdefault(kind, []).append((before[start], before[end]))
    return {kind: tuple(spans) for kind, spans in found.items()}
