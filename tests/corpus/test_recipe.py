from collections import Counter

import pytest

from minference_green.corpus.kinds import KINDS
from minference_green.corpus.recipe import MIX, PLAIN, SLOTS, Recipe, Slot, items
from minference_green.errors import UsageError


def asked(recipe, haystacks):
    return [item for index in range(haystacks) for item in items(recipe, KINDS, index)]


def test_a_haystack_asks_every_kind_once_inside_and_once_after_and_one_at_the_end():
    for index in range(30):
        found = items(Recipe(), KINDS, index)
        for place in ("inside", "after"):
            assert sorted(i.kind for i in found if i.place == place) == sorted(KINDS)
        assert sum(item.place == "end" for item in found) == 1


@pytest.mark.parametrize("place", ["inside", "after"])
def test_every_haystack_holds_every_depth_of_a_place(place):
    for index in range(30):
        slots = [item.slot for item in items(Recipe(), KINDS, index) if item.place == place]
        assert Counter(slots) == Counter(SLOTS[place])


@pytest.mark.parametrize("per_place", [4, 7, 14])
@pytest.mark.parametrize("place", ["inside", "after"])
def test_every_kind_meets_the_same_mix_and_the_same_depths(place, per_place):
    recipe = Recipe(inside=per_place, after=per_place)
    rounds = 2 * len(MIX)  # both of each pair
    found = [i for i in asked(recipe, rounds * 14 // per_place) if i.place == place]
    for what in ("treatment", "slot"):
        by_kind = [Counter(getattr(i, what) for i in found if i.kind == kind) for kind in KINDS]
        assert len(found) > 300
        assert all(counts == by_kind[0] for counts in by_kind)


def test_over_196_haystacks_a_kind_meets_every_treatment_at_every_depth():
    found = Counter(
        (i.treatment is PLAIN, i.slot)
        for i in asked(Recipe(), 196)
        if i.place == "after" and i.kind == "date"
    )
    assert all(found[True, slot] == 8 * SLOTS["after"].count(slot) for slot in SLOTS["after"])
    assert all(found[False, slot] == 6 * SLOTS["after"].count(slot) for slot in SLOTS["after"])


def test_most_facts_are_plain_and_every_treatment_is_asked_in_both_places():
    found = asked(Recipe(), 28)
    plain = sum(item.treatment == PLAIN for item in found)
    assert plain / len(found) == pytest.approx(8 / 14, abs=0.02)
    for place in ("inside", "after"):
        counts = Counter(i.treatment for i in found if i.place == place and i.treatment != PLAIN)
        assert set(counts) == {t for pair in MIX for t in pair} - {PLAIN}
        assert len(set(counts.values())) == 1


def test_only_questions_behind_the_text_ask_for_its_last_bytes():
    assert Slot(1.0) in SLOTS["after"]
    assert all(slot.share < 1 for place in ("inside", "end") for slot in SLOTS[place])


def test_chosen_kinds_share_the_questions():
    found = items(Recipe(inside=4, after=2, end=0, kinds=("hex", "date")), ("hex", "date"), 5)
    assert Counter((i.place, i.kind) for i in found) == {
        ("inside", "hex"): 2,
        ("inside", "date"): 2,
        ("after", "hex"): 1,
        ("after", "date"): 1,
    }


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kinds": ("date", "dates")}, r"unknown kind \['dates'\]: choose one or more of integer,"),
        ({"kinds": ()}, "choose one or more of integer"),
        ({"inside": -1}, "inside is -1: give 0 or more"),
        ({"after": -2}, "after is -2"),
        ({"end": -1}, "end is -1"),
        ({"competitors": -7}, "competitors is -7"),
        ({"inside": 0, "after": 0, "end": 0}, "ask for at least one"),
        ({"mix": ()}, "the mix is empty"),
        ({"token_bytes": 0}, "token_bytes is 0: give 1 or more"),
    ],
)
def test_a_recipe_that_cannot_be_cooked_is_refused(wrong, message):
    with pytest.raises(UsageError, match=message):
        Recipe(**wrong)
