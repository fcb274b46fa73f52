import re
from hashlib import sha256
from itertools import islice

import pytest

from minference_green.corpus.draws import Draws
from minference_green.corpus.filler import FILLERS, LONGEST_LINE, SEAM, OwnText, filler
from minference_green.corpus.language import ATTRIBUTES
from minference_green.errors import UsageError


def text_of(kind, seed, pieces=2000):
    return "".join(islice(filler(kind, Draws(seed, "filler")), pieces))


@pytest.mark.parametrize(
    ("kind", "digest"),
    [("prose", "93f09ab4cf88ce19"), ("records", "79dba98455e7db9d"), ("code", "59631450e8646ec9")],
)
def test_the_filler_of_a_seed_never_changes(kind, digest):
    assert sha256(text_of(kind, 1).encode()).hexdigest().startswith(digest)


@pytest.mark.parametrize("kind", FILLERS)
def test_every_piece_ends_with_its_separator(kind):
    end = ". " if kind == "prose" else "\n"
    for piece in islice(filler(kind, Draws(5)), 1000):
        assert piece.endswith((end, ".\n\n"))
        assert piece.strip()


@pytest.mark.parametrize("kind", FILLERS)
def test_another_seed_gives_other_words(kind):
    assert text_of(kind, 1, 50) != text_of(kind, 2, 50)


@pytest.mark.parametrize("kind", FILLERS)
def test_filler_states_no_fact(kind):
    text = text_of(kind, 3)
    attributes = [name for names in ATTRIBUTES.values() for name in names if " " in name]
    assert not [name for name in attributes if name in text]
    assert "Question" not in text
    assert "Answer" not in text


@pytest.mark.parametrize("kind", FILLERS)
def test_digits_capitals_and_other_scripts_stand_among_the_words(kind):
    text = text_of(kind, 4)
    letters = sum(c.isascii() and c.islower() for c in text) / len(text)
    assert letters > 0.5
    assert len(re.findall(r"\b[1-9]\d{3,7}\b", text)) > 5
    assert len(re.findall(r"\b[A-Z][a-z]+", text)) > 5
    assert 0 < sum(not c.isascii() for c in text) / len(text) < 0.1


def test_prose_has_sentences_of_five_to_twenty_words_in_paragraphs():
    pieces = list(islice(filler("prose", Draws(6)), 500))
    words = [len(piece.split()) for piece in pieces]
    assert min(words) >= 5
    assert max(words) <= 20 * 4  # a quotation of four words may stand for a word
    assert sum(words) / len(words) == pytest.approx(12.5, abs=2)
    assert 50 < sum(piece.endswith("\n\n") for piece in pieces) < 200


def test_the_fields_of_records_belong_to_one_section():
    sections = text_of("records", 7, 400).split("# ")[1:]
    fields = [set(re.findall(r"^([a-z]+): ", section, re.MULTILINE)) for section in sections]
    assert len(sections) > 5
    assert all(fields)
    assert not fields[0] & fields[1]


def test_code_is_functions_with_indented_bodies():
    blocks = text_of("code", 8, 500).split("\n\n\n")[:-1]
    assert len(blocks) > 30
    for block in blocks:
        head, *body = block.split("\n")
        assert re.fullmatch(r"def [a-zA-Z_]+\([a-z]+, [a-z]+\):", head)
        assert len(body) >= 3
        assert all(line.startswith("    ") for line in body)
        assert body[-1].startswith("    return ")


def test_an_unknown_filler_is_refused_with_the_valid_ones():
    with pytest.raises(UsageError, match="'poetry': choose prose, records, code"):
        filler("poetry", Draws(1))


OWN = "One is here. Two (yes!) is there? A line\nno end\n\n二つ。三つ。 Last words"


def test_a_users_text_is_cut_at_sentences_and_lines():
    pieces = sorted(set(islice(filler(OwnText(OWN), Draws(1)), 40)))
    assert pieces == sorted(
        [
            SEAM,
            *("One is here. ", "Two (yes!) ", "is there? ", "A line\n", "no end\n\n"),
            *("二つ。", "三つ。", " Last words\n"),
        ]
    )


def test_a_users_text_goes_round_with_a_seam():
    text = "".join(islice(filler(OwnText(OWN), Draws(3)), 40))
    assert f" Last words\n{SEAM}One is here. Two" in text
    assert text.count("Two (yes!) is there?") >= 3


def test_a_users_text_begins_anywhere():
    starts = {next(filler(OwnText(OWN), Draws(seed))) for seed in range(60)}
    assert len(starts) == 8
    assert SEAM not in starts


def test_a_users_text_is_cut_once_for_all_haystacks():
    text = OwnText(OWN)
    assert text.pieces is text.pieces
    assert next(filler(text, Draws(1))) in text.pieces


def test_a_line_without_an_end_is_wrapped():
    words = "word " * 1000
    pieces = list(islice(filler(OwnText(words + "x" * 5000), Draws(1)), 20))
    assert max(map(len, pieces)) <= LONGEST_LINE + 1
    assert all(piece[-1] in " \n" for piece in pieces)
    text = "".join(pieces).replace("\n", "")
    assert "x" * 5000 in text


@pytest.mark.parametrize("text", ["", " \n\t"])
def test_a_text_of_nothing_is_refused(text):
    with pytest.raises(UsageError, match="holds no words"):
        OwnText(text)


def test_a_users_text_is_named_by_its_content():
    assert OwnText("a").name == "text ca978112ca1b"
