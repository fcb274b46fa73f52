"""Kinds in plain text, told by their looks."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minference_green.auditing.tags import TAGS, tagged


def found(text: str) -> dict[str, list[str]]:
    raw = text.encode()
    return {kind: [raw[a:b].decode() for a, b in spans] for kind, spans in tagged(text).items()}


@pytest.mark.parametrize(
    ("text", "kind", "what"),
    [
        ("see https://a.example/b?c=1 now", "path", "https://a.example/b?c=1"),
        ("edit /etc/hosts.d/x.cfg first", "path", "/etc/hosts.d/x.cfg"),
        ("id 550e8400-e29b-41d4-a716-446655440000.", "hex", "550e8400-e29b-41d4-a716-446655440000"),
        ("at 0xDEADBEEF it", "hex", "0xDEADBEEF"),
        ("commit 9fceb02d0 was", "hex", "9fceb02d0"),
        ("on 2024-02-29 we", "date", "2024-02-29"),
        ("on 3 March 2021 we", "date", "3 March 2021"),
        ("on Oct. 12, 1999 we", "date", "Oct. 12, 1999"),
        ("it took 12.5 ms to", "measure", "12.5 ms"),
        ("about 700 W here", "measure", "700 W"),
        ("call parse_line here", "identifier", "parse_line"),
        ("call parseLine here", "identifier", "parseLine"),
        ("row AB1234 is", "cell", "AB1234"),
        ("costs $1,234.50 each", "decimal", "$1,234.50"),
        ("pi is 3.1416 or", "decimal", "3.1416"),
        ("we saw 1,024 of", "integer", "1,024"),
        ("we saw 42.", "integer", "42"),
        ("this is not valid", "negated", "not"),
        ("it isn't so", "negated", "isn't"),
        ('he said "leave at once" and', "quotation", '"leave at once"'),
        ("the word δοκιμή means", "script", "δοκιμή"),
        ("the town 東京 is", "script", "東京"),
        ("we met Anna Brel there", "name", "Anna Brel"),
        ("we met Rothai there", "name", "Rothai"),
    ],
)
def test_a_kind_is_told_by_its_looks(text, kind, what):
    assert found(text) == {kind: [what]}


@pytest.mark.parametrize(
    "text",
    ["Then it stopped.", "a plain sentence of words", "The end. Another begins here", "über naïve"],
)
def test_plain_words_have_no_kind(text):
    assert found(text) == {}


def test_an_earlier_kind_keeps_what_it_took():
    assert found("https://a.example/2024-02-29/x_y") == {
        "path": ["https://a.example/2024-02-29/x_y"]
    }


def test_spans_are_bytes_not_characters():
    text = "naïve 東京 met 42 times"
    spans = tagged(text)
    assert text.encode()[slice(*spans["integer"][0])] == b"42"


@given(st.text(alphabet="aZ 09.-_/:'\"é東\n$%", max_size=80))
def test_no_byte_has_two_kinds_and_every_span_is_whole_characters(text):
    raw, seen = text.encode(), set()
    for kind, spans in tagged(text).items():
        assert kind in TAGS
        for start, end in spans:
            raw[start:end].decode()
            span = set(range(start, end))
            assert span and not span & seen
            seen |= span
