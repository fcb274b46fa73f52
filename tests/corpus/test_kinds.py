import re
from hashlib import sha256

import pytest

from minference_green.corpus.draws import Draws
from minference_green.corpus.kinds import KINDS, name, value, word

FORMS = {
    "integer": r"[1-9]\d{3,7}",
    "decimal": r"\d{1,3}\.\d{4}|\$[1-9]\d{0,2},\d{3}\.\d{2}",
    "date": r"\d{1,2} [A-Z][a-z]{2,8} \d{4}|\d{4}-[01]\d-[0-2]\d",
    "person": r"[A-Z][a-z]+ [A-Z][a-z]+",
    "place": r"((Port|Mount|Lake|Fort) )?[A-Z][a-z]+( (Bay|Hill|Bridge))?",
    "identifier": r"[a-z]+(_[a-z]+){2}|[a-z]+([A-Z][a-z]+){2}",
    "path": r"https://[a-z]+\.net/[a-z]+/[a-z]+|/[a-z]+/[a-z]+/[a-z]+\.cfg",
    "hex": r"[0-9a-f]{12}|[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}",
    "negated": r"(not )?[a-z]+ and [a-z]+",
    "rare": r"[b-df-hj-np-tv-z]{3}[a-z]+",
    "quotation": r'"[a-z]+( [a-z]+){2,3}"',
    "cell": r"[A-Z]{2}\d{4}",
    "script": r"[^\x00-\x7f]{3,5}",
    "measure": r"\d{2,4}\.\d [a-z]+",
}


def test_there_are_fourteen_kinds():
    assert set(FORMS) == set(KINDS)
    assert len(KINDS) == 14


@pytest.mark.parametrize("kind", KINDS)
def test_every_value_has_the_form_of_its_kind(kind):
    draws = Draws(11, kind)
    values = [value(kind, draws) for _ in range(500)]
    assert all(re.fullmatch(FORMS[kind], said) for said in values)
    assert all(3 <= len(said.encode()) <= 45 for said in values)
    assert len(set(values)) > 300  # the fewest: two states, negated or not


def test_the_values_of_a_seed_never_change():
    draws = Draws(1, "kinds")
    values = [value(kind, draws) for _ in range(50) for kind in KINDS]
    digest = sha256("\n".join(values).encode()).hexdigest()
    assert digest.startswith("eb4b1b091175393c")


def test_an_unknown_kind_is_refused():
    with pytest.raises(KeyError, match="integral"):
        value("integral", Draws(0))


def test_half_of_the_statuses_are_negated():
    draws = Draws(2)
    negated = sum(value("negated", draws).startswith("not ") for _ in range(1000))
    assert negated == pytest.approx(500, abs=95)  # six standard errors


def test_words_are_lower_case_and_names_have_one_capital():
    draws = Draws(3)
    assert all(re.fullmatch("[a-z]+", word(draws)) for _ in range(100))
    assert all(re.fullmatch("[A-Z][a-z]+", name(draws)) for _ in range(100))
