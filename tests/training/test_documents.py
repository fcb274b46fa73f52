"""Texts to learn from: exact lengths, marked answers, the same bytes everywhere."""

import hashlib

import numpy as np
import pytest

from training.documents import (
    BOS,
    CHAINED_NAMES,
    FIRST,
    MANY_NAMES,
    OTHERS,
    RENAMED,
    SOME_NAMES,
    TOLD_BY_NAME,
    Names,
    document,
)


def far_names(names: Names) -> int:
    """Other names that stand 500 bytes and more before their fact, in ten texts."""
    far = 0
    for index in range(10):
        ids = document(3, index, 9000, names).ids
        text = bytes(ids[1:].astype(np.uint8)).decode(errors="ignore")
        for piece in text.split(" is the same as that of ")[1:]:
            name = piece.split(". ")[0]
            named = text.index(f" is the same as that of {name}. ")
            stated = [text.find(form) for form in (f" of {name} is ", f"For {name}, the ")]
            first = min((at for at in stated if at >= 0), default=0)
            far += first > named + 500
    return far


def test_names_stand_far_before_their_fact_where_asked():
    assert far_names(SOME_NAMES) < 4
    assert far_names(MANY_NAMES) > 10


def test_names_of_names_come_where_chains_are_asked():
    def chained(names: Names) -> int:
        links = 0
        for index in range(10):
            ids = document(3, index, 9000, names).ids
            text = bytes(ids[1:].astype(np.uint8)).decode(errors="ignore")
            given, of = set(), []
            for piece in text.split("The ")[1:]:
                before, said, after = piece.partition(" is the same as that of ")
                if said and " of " in before:
                    given.add(before.split(" of ", 1)[1])
                    of.append(after.split(". ")[0])
            links += sum(name in given for name in of)
        return links

    assert chained(CHAINED_NAMES) > 2 * chained(MANY_NAMES) > 0


def test_narrow_texts_ask_for_facts_that_their_attribute_does_not_tell():
    def rivals(names: Names) -> float:
        """Other keys of the attribute that was asked for, before the question, on average."""
        found = []
        for index in range(12):
            text = bytes(document(3, index, 9000, names).ids[1:].astype(np.uint8))
            before, *asked = text.decode(errors="ignore").split("\nAnswer: The ")
            for piece in asked:
                attribute, _, name = piece.split(" is ")[0].partition(" of ")
                keys = {part.split(" is ")[0] for part in before.split(f"he {attribute} of ")[1:]}
                found.append(len(keys - {name}))
                before += piece
        return float(np.mean(found))

    assert rivals(TOLD_BY_NAME) > 3 * rivals(CHAINED_NAMES)


@pytest.mark.parametrize("length", [64, 65, 512, 2048, 9000])  # short, ragged, own filler
def test_a_document_has_its_length_and_marks_answers(length):
    documents = [document(3, index, length) for index in range(20)]
    for made in documents:
        assert made.ids.shape == made.answer.shape == (length,)
        assert made.ids[0] == BOS
        assert made.answer[0] == 0
        assert set(np.unique(made.answer)) <= {0, FIRST, OTHERS, RENAMED}
        assert made.ids[1:].max() < 256
    marked = np.mean([(made.answer > 0).mean() for made in documents])
    assert length < 512 or 0.02 < marked < 0.3


def test_an_answer_begins_with_one_first_byte():
    answer = document(3, 1, 4096).answer
    before = np.concatenate([[0], answer[:-1]])
    assert (answer == FIRST).sum() > 5
    assert (before[answer == OTHERS] != 0).all()
    assert not np.isin(before[np.isin(answer, (FIRST, RENAMED))], (FIRST, RENAMED)).any()


def test_what_is_asked_under_another_name_is_marked_so():
    made = document(4, 3, 30_000, MANY_NAMES)
    text = bytes(made.ids[1:].astype(np.uint8))
    found = {FIRST: 0, RENAMED: 0}
    for start in np.flatnonzero(np.isin(made.answer, (FIRST, RENAMED))) - 1:
        before = text[:start].decode(errors="ignore")
        key = before.rpartition("\nAnswer: The ")[2].removesuffix(" is ")
        if "\n" in key:  # no question
            continue
        other_name = f"The {key} is the same as that of " in before
        assert other_name == (made.answer[start + 1] == RENAMED)
        found[made.answer[start + 1]] += 1
    assert min(found.values()) > 5


def test_what_a_question_asks_was_said_before():
    text = bytes(document(5, 2, 20_000).ids[1:].astype(np.uint8)).decode(errors="ignore")
    asked = text.split("\nAnswer: The ")[1:]
    assert len(asked) > 5
    for number, piece in enumerate(asked, 1):
        answer = piece.split(" is ", 1)[1].split(".\n")[0]
        before = "\nAnswer: The ".join(text.split("\nAnswer: The ")[:number])
        assert answer[:20] in before


def test_the_same_numbers_give_the_same_bytes_on_every_machine():
    digest = hashlib.sha256()
    for length in (512, 2048, 8192):
        made = document(1, 7, length)
        marks = np.where(made.answer == RENAMED, FIRST, made.answer).astype(np.int8)
        digest.update(made.ids.astype("<i2").tobytes() + marks.tobytes())
    assert digest.hexdigest()[:16] == "93238126baee2b71"
    assert not np.array_equal(document(1, 8, 512).ids, document(1, 7, 512).ids)
    assert not np.array_equal(document(2, 7, 512).ids, document(1, 7, 512).ids)
