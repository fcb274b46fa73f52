import pytest

from minference_green.corpus import language
from minference_green.corpus.draws import Draws
from minference_green.corpus.kinds import KINDS
from minference_green.corpus.language import Key

KEY = Key("price", "Kora Belan")
ROW = Key("shelf mark", "Kora Belan")


def test_the_sentences_are_these():
    assert language.statement("decimal", KEY) == "The price of Kora Belan is "
    assert language.paraphrase("decimal", KEY) == "For Kora Belan, the price is "
    assert language.update("decimal", KEY) == "The price of Kora Belan is now "
    assert language.ending("decimal") == ". "
    assert language.statement("cell", ROW) == "| shelf mark of Kora Belan | "
    assert language.paraphrase("cell", ROW) == "| Kora Belan | shelf mark | "
    assert language.update("cell", ROW) == "| shelf mark of Kora Belan now | "
    assert language.ending("cell") == " |\n"
    assert language.alias(KEY, "Sti Moa") == (
        "The price of Sti Moa is the same as that of Kora Belan. "
    )
    assert language.question(KEY) + "7" + language.ANSWER_END == (
        "\nQuestion: What is the price of Kora Belan?\nAnswer: The price of Kora Belan is 7.\n"
    )


def test_no_attribute_belongs_to_two_kinds():
    attributes = [name for kind in KINDS for name in language.ATTRIBUTES[kind]]
    assert len(set(attributes)) == len(attributes) == 4 * len(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_key_has_an_attribute_of_its_kind_and_a_two_word_entity(kind):
    key = language.key(kind, Draws(1, kind))
    assert key.attribute in language.ATTRIBUTES[kind]
    assert len(key.entity.split(" ")) == 2


def test_a_near_duplicate_shares_attribute_and_one_word():
    shared = set()
    for i in range(50):
        near = language.near_duplicate(KEY, Draws(2, i))
        assert near.attribute == KEY.attribute
        assert near != KEY
        common = set(near.entity.split()) & set(KEY.entity.split())
        assert len(common) == 1
        shared |= common
    assert shared == {"Kora", "Belan"}
