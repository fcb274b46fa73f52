"""Texts to learn from: exact lengths, marked answers, the same bytes everywhere."""

import hashlib

import numpy as np
import pytest

from training.documents import BOS, MANY_NAMES, SOME_NAMES, Names, document


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


@pytest.mark.parametrize("length", [64, 65, 512, 2048, 9000])  # short, ragged, own filler
def test_a_document_has_its_length_and_marks_answers(length):
    documents = [document(3, index, length) for index in range(20)]
    for made in documents:
        assert made.ids.shape == made.answer.shape == (length,)
        assert made.ids[0] == BOS
        assert made.answer[0] == 0
        assert set(np.unique(made.answer)) <= {0, 1, 2}
        assert made.ids[1:].max() < 256
    marked = np.mean([(made.answer > 0).mean() for made in documents])
    assert length < 512 or 0.02 < marked < 0.3


def test_an_answer_begins_with_one_first_byte():
    answer = document(3, 1, 4096).answer
    before = np.concatenate([[0], answer[:-1]])
    assert (answer == 1).sum() > 5
    assert (before[answer == 2] != 0).all()


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
        digest.update(made.ids.astype("<i2").tobytes() + made.answer.tobytes())
    assert digest.hexdigest()[:16] == "93238126baee2b71"
    assert not np.array_equal(document(1, 8, 512).ids, document(1, 7, 512).ids)
    assert not np.array_equal(document(2, 7, 512).ids, document(1, 7, 512).ids)
