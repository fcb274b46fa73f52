import pytest
from hypothesis import given
from hypothesis import strategies as st

from minference_green.corpus.draws import Draws
from minference_green.corpus.kinds import KINDS
from minference_green.corpus.language import Key
from minference_green.corpus.ledger import Ledger, within_one_edit
from minference_green.errors import UsageError


def distance(a, b):
    """Levenshtein by its table."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row, above = [i], row
        for j, y in enumerate(b, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (x != y)))
    return row[-1]


@given(st.text("ab", max_size=6), st.text("ab", max_size=6))
def test_within_one_edit_is_a_levenshtein_distance_of_at_most_one(a, b):
    assert within_one_edit(a, b) == (distance(a, b) <= 1)


def test_values_differ_by_two_edits_and_none_is_part_of_another():
    ledger = Ledger()
    draws = Draws(1)
    of_kind = {kind: [ledger.value(kind, draws) for _ in range(25)] for kind in KINDS}
    for values in of_kind.values():
        assert all(distance(a, b) >= 2 for i, a in enumerate(values) for b in values[:i])
    assert sorted(ledger.values) == sorted(v for values in of_kind.values() for v in values)
    assert not [(a, b) for a in ledger.values for b in ledger.values if a != b and a in b]


def test_a_key_that_was_given_or_holds_a_value_is_drawn_again():
    ledger = Ledger()
    value = ledger.value("person", Draws(2))
    first, second = Key("keeper", "Kora Belan"), Key("keeper", "Sti Moa")
    keys = iter([first, first, Key("keeper", value), second])
    assert ledger.key(lambda: next(keys)) == first
    assert ledger.key(lambda: next(keys)) == second


def test_a_value_that_is_part_of_a_key_is_drawn_again():
    ledger = Ledger()
    plain = Ledger().value("person", Draws(4))
    ledger.key(lambda: Key("keeper", plain))
    assert ledger.value("person", Draws(4)) != plain


def test_a_kind_that_has_run_out_says_so():
    ledger = Ledger()
    draws = Draws(3)
    with pytest.raises(UsageError, match=r"kind 'negated' has no further value .* from \d{2,4} o"):
        for _ in range(1200):
            ledger.value("negated", draws)


def test_a_key_that_never_changes_says_so():
    ledger = Ledger()
    ledger.key(lambda: Key("price", "Kora Belan"))
    with pytest.raises(UsageError, match="no further key like 'price of Kora Belan'"):
        ledger.key(lambda: Key("price", "Kora Belan"))
