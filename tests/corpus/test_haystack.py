import re
import subprocess
import sys
from collections import Counter
from hashlib import sha256
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minference_green.corpus.draws import Draws
from minference_green.corpus.filler import FILLERS, SEAM, OwnText
from minference_green.corpus.haystack import haystack, plan, shortest
from minference_green.corpus.kinds import KINDS
from minference_green.corpus.language import ATTRIBUTES, ending
from minference_green.corpus.ledger import within_one_edit
from minference_green.corpus.recipe import PLAIN, Recipe, Slot, Treatment, items
from minference_green.errors import UsageError

SMALL = Recipe(inside=5, after=5, competitors=1)
OWN = OwnText("A user's line\nwith 1234 words. And ünïcode! " * 9)

DIGESTS = {
    (1, 0, 12_000, "prose"): "af6b87eed2ef64a2",
    (1, 0, 12_000, "records"): "42b9ea03757af65d",
    (1, 0, 12_000, "code"): "37967b1275c90a6a",
    (1, 0, 70_001, "prose"): "e700d7757bbc0ad3",
    (2, 7, 12_000, "prose"): "22597dc958394816",
    (3, 119, 33_333, "records"): "c32e80e17fab9455",
}


def items_of(seed, index, recipe):
    return items(recipe, Draws(seed, "kinds").shuffled(recipe.kinds), index)


def found_at(needle, text):
    return [match.start() for match in re.finditer(b"(?=%s)" % re.escape(needle), text)]


def asked_with(seed, recipe, treatment, place="after"):
    """The first haystack that asks for a fact in this treatment, and the fact."""
    for index in range(60):
        for number, item in enumerate(items_of(seed, index, recipe)):
            if item.treatment == treatment and item.place == place and item.slot.share < 0.9:
                stack = haystack(seed, index, length=20_000, recipe=recipe)
                return stack, stack.facts[number]
    raise AssertionError(f"{treatment} is never asked")


def answer_of_a_reader(text, asked):
    """The value of a key by reading: its first statement or last update, aliases followed."""
    known, same = {}, {}
    attribute = "|".join(name for names in ATTRIBUTES.values() for name in names)
    entity = r"(?:[A-Z][a-z]+ [A-Z][a-z]+|[A-Z]\d\d)"
    patterns = {
        "alias": rf"The ({attribute}) of ({entity}) is the same as that of ({entity})\. ",
        "update": rf"The ({attribute}) of ({entity}) is now (.+?)\. (?!\d)",
        "statement": rf"The ({attribute}) of ({entity}) is (.+?)\. (?!\d)",
        "paraphrase": rf"For ({entity}), the ({attribute}) is (.+?)\. (?!\d)",
        "row update": rf"\| ({attribute}) of ({entity}) now \| (.+?) \|\n",
        "row": rf"\| ({attribute}) of ({entity}) \| (.+?) \|\n",
        "row paraphrase": rf"\| ({entity}) \| ({attribute}) \| (.+?) \|\n",
    }
    sentence = re.compile("|".join(f"(?P<m{i}>{p})" for i, p in enumerate(patterns.values())))
    for match in sentence.finditer(text):
        form = list(patterns)[int(match.lastgroup[1:])]
        a, b, said = re.fullmatch(patterns[form], match.group()).groups()
        key = (b, a) if "paraphrase" in form else (a, b)
        if form == "alias":
            same[key] = (a, said)
        elif "update" in form:
            known[key] = said
        else:
            known.setdefault(key, said)

    def look_up(key):
        return known[key] if key in known else look_up(same[key])

    return look_up(tuple(asked.split(" of ")))


@pytest.mark.parametrize("case", DIGESTS, ids=str)
def test_text_and_records_of_a_seed_never_change(case):
    seed, index, length, filler = case
    stack = haystack(seed, index, length=length, filler=filler)
    digest = sha256(stack.text + repr((stack.facts, stack.questions)).encode()).hexdigest()
    assert digest[:16] == DIGESTS[case]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**40),
    index=st.integers(0, 1000),
    more=st.integers(0, 9000),
    filler=st.sampled_from([*FILLERS, OWN]),
)
def test_every_record_is_true_of_its_text(seed, index, more, filler):
    length = shortest(seed, index, SMALL) + more
    stack = haystack(seed, index, length=length, filler=filler, recipe=SMALL)
    text = stack.text
    assert len(text) == length
    text.decode()
    sources = {}
    for number, fact in enumerate(stack.facts):
        assert fact.id == number
        for mention in fact.mentions:
            assert text[mention.start : mention.end] == mention.value.encode()
            sources.setdefault(mention.value, []).append(mention.start)
        decisive = fact.mentions[-1 if fact.regime == "updated" else 0]
        assert fact.value == decisive.value
        assert fact.depth == decisive.start / length
        assert [m.start for m in fact.mentions] == sorted(m.start for m in fact.mentions)
    for question in stack.questions:
        fact = stack.facts[question.fact]
        assert question.answer == fact.value
        prompt = question.prompt.encode()
        assert fact.key in question.prompt
        assert text.count(prompt) == (question.place == "inside")
        if question.place == "inside":
            start = question.answer_start
            assert text[start - len(prompt) : start] == prompt
            assert text[start:].startswith(fact.value.encode() + b".\n")
            assert fact.mentions[-1].end <= start - len(prompt)
            sources[fact.value].append(start)
        else:
            assert question.answer_start is None
    for value, starts in sources.items():
        assert found_at(value.encode(), text) == sorted(starts)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**40), index=st.integers(0, 1000))
def test_keys_and_values_are_unique_and_distractors_are_wrong(seed, index):
    stack = haystack(seed, index, length=12_000)
    facts, text = stack.facts, stack.text
    assert len({fact.key for fact in facts}) == len(facts)
    of_kind = {}
    for fact in facts:
        of_kind.setdefault(fact.kind, set()).update(m.value for m in fact.mentions)
    shared = sum(fact.neighbour == "same value" for fact in facts)
    said = Counter(value for f in facts for value in {m.value for m in f.mentions})
    assert sum(count - 1 for count in said.values()) == shared
    for values in of_kind.values():
        ordered = sorted(values)
        assert not any(within_one_edit(a, b) for i, a in enumerate(ordered) for b in ordered[:i])
    for question in stack.questions:
        fact = facts[question.fact]
        own = {mention.value for mention in fact.mentions}
        standing, nowhere = question.distractors[:4], question.distractors[4:]
        assert len(set(question.distractors)) == 8
        assert not own & set(question.distractors)
        assert set(standing) <= of_kind[fact.kind]
        assert not [value for value in nowhere if value.encode() in text]


@pytest.mark.parametrize("filler", ["prose", "records"])
@pytest.mark.parametrize("index", range(4))
def test_a_reader_who_follows_the_sentences_answers_every_question(filler, index):
    stack = haystack(9, index, length=20_000, filler=filler)
    for question in stack.questions:
        read = stack.text[: question.answer_start].decode()
        fact = stack.facts[question.fact]
        assert answer_of_a_reader(read, fact.key) == question.answer


@pytest.mark.parametrize("length", [16_384, 131_072, 1_000_003])
def test_facts_stand_at_the_depth_they_were_asked_for(length):
    """Sentences that want one place push each other by no more than all of them are long."""
    for index in range(3):
        planned = plan(4, index, length=length)
        limit = shortest(4, index) / length
        found = zip(items_of(4, index, Recipe()), planned.facts, strict=False)
        asked = [(item, fact) for item, fact in found if fact.regime != "legend"]
        off = [abs(fact.depth - item.slot.share) for item, fact in asked]
        assert max(off) <= limit
        assert sum(off) / len(off) <= limit / 8


@pytest.mark.parametrize("token_bytes", [1, 4])
def test_facts_stand_inside_the_window_and_just_before_it(token_bytes):
    recipe = Recipe(mix=((PLAIN, PLAIN),), token_bytes=token_bytes)
    length = 100_000
    for index in range(6):
        stack = haystack(2, index, length=length, recipe=recipe)
        slots = {item.slot: n for n, item in enumerate(items_of(2, index, recipe))}
        last, before = (stack.facts[slots[Slot(1.0, back)]] for back in (0, 64))
        assert stack.text.endswith((last.value + ending(last.kind)).encode())
        room = length - before.mentions[0].end
        assert 64 * token_bytes <= room < 64 * token_bytes + 60


def test_a_fact_begins_the_text():
    for index in range(6):
        stack = haystack(5, index, length=30_000, recipe=Recipe(mix=((PLAIN, PLAIN),)))
        first = min(stack.facts, key=lambda fact: fact.depth)
        assert first.id < 28  # one that is asked for
        assert stack.text.lstrip(b"\n").startswith((b"The ", b"| "))
        assert first.mentions[0].start < 60


def test_inside_questions_stand_everywhere_from_early_to_late_and_near_to_far():
    starts, distances = [], []
    for index in range(14):
        planned = plan(6, index, length=200_000)
        for question in planned.questions:
            if question.place == "inside":
                fact = planned.facts[question.fact]
                starts.append(question.answer_start / 200_000)
                distances.append(question.answer_start - fact.mentions[-1].end)
    tenths = Counter(int(10 * start) for start in starts)
    assert all(tenths[tenth] >= 3 for tenth in range(10))
    assert sum(distance < 140 for distance in distances) >= 14
    assert sum(distance > 50_000 for distance in distances) >= 14


def test_one_question_is_left_for_the_end_of_the_prompt():
    stack = haystack(1, 3, length=12_000)
    (last,) = [question for question in stack.questions if question.place == "end"]
    assert last.prompt.encode() not in stack.text
    assert last.fact not in {q.fact for q in stack.questions if q is not last}


@pytest.mark.parametrize("place", ["inside", "after"])
@pytest.mark.parametrize("mentions", [2, 4, 8])
def test_a_repeated_fact_is_stated_so_often(mentions, place):
    _, fact = asked_with(1, SMALL, Treatment("repeated", mentions=mentions), place)
    assert fact.regime == "repeated"
    assert [mention.value for mention in fact.mentions] == [fact.value] * mentions


def test_of_an_updated_fact_the_last_statement_wins():
    stack, fact = asked_with(1, SMALL, Treatment("updated"))
    old, new = fact.mentions
    assert old.value != new.value == fact.value
    assert stack.text[: new.start].endswith((b" is now ", b" now | "))
    assert not stack.text[: old.start].endswith((b" is now ", b" now | "))


def test_a_conflicting_fact_is_stated_twice_in_the_same_words():
    stack, fact = asked_with(1, SMALL, Treatment("conflicting"))
    first, second = fact.mentions
    assert first.value == fact.value != second.value
    for mention in fact.mentions:
        said = stack.text[: mention.start].decode()
        assert said.endswith((f"The {fact.key} is ", f"| {fact.key} | "))


@pytest.mark.parametrize(
    ("treatment", "chain"),
    [
        (Treatment(hops=2), ["fact", "alias"]),
        (Treatment(hops=2, alias_first=True), ["alias", "fact"]),
        (Treatment(hops=3), ["alias", "fact", "alias"]),
    ],
)
def test_an_alias_is_asked_and_stands_before_or_after_the_fact(treatment, chain):
    stack, fact = asked_with(3, SMALL, treatment)
    text = stack.text.decode()
    attribute, entity = fact.key.split(" of ")
    links = []
    for _ in range(treatment.hops - 1):
        link = re.search(rf"The {attribute} of {entity} is the same as that of ([^.]+)\. ", text)
        links.append(len(text[: link.start()].encode()))
        entity = link[1]
    said = text.encode()[: fact.mentions[0].start].decode()
    assert said.endswith((f"The {attribute} of {entity} is ", f"| {attribute} of {entity} | "))
    order = [("alias", at) for at in links] + [("fact", fact.mentions[0].start)]
    assert [name for name, _ in sorted(order, key=lambda pair: pair[1])] == chain
    assert fact.hops == treatment.hops


def test_a_legend_stands_near_the_beginning_and_is_used_all_over():
    stack, fact = asked_with(1, SMALL, Treatment("legend", hops=2))
    text = stack.text.decode()
    code = re.search(
        r"(?:of|\|) ([A-Z]\d\d) (?:is|\|) $", text.encode()[: fact.mentions[0].start].decode()
    )
    uses = [match.start() for match in re.finditer(rf"same as that of {code[1]}\. ", text)]
    assert fact.depth < 0.1
    assert len(uses) == 5
    assert uses[-1] - uses[0] > len(text) / 4


@pytest.mark.parametrize("neighbour", ["same entity", "near key", "same value"])
def test_a_neighbour_stands_beside_an_asked_fact(neighbour):
    stack, fact = asked_with(1, SMALL, Treatment(neighbour=neighbour))
    attribute, entity = fact.key.split(" of ")
    others = [f for f in stack.facts if f.kind == fact.kind and f is not fact]
    near = {
        "same entity": lambda f: f.key.endswith(entity) and not f.key.startswith(attribute),
        "near key": lambda f: (
            f.key.startswith(attribute)
            and len(set(f.key.split(" of ")[1].split()) & set(entity.split())) == 1
        ),
        "same value": lambda f: f.value == fact.value,
    }[neighbour]
    assert any(near(other) for other in others)
    assert not any(f.value == fact.value for f in others) or neighbour == "same value"


def test_another_length_and_filler_give_the_same_facts_in_the_same_order():
    def told(planned):
        order = sorted((m.start, m.value) for f in planned.facts for m in f.mentions)
        return (
            [(f.id, f.kind, f.key, f.value, f.regime, f.neighbour, f.hops) for f in planned.facts],
            [(q.prompt, q.answer, q.distractors, q.place, q.fact) for q in planned.questions],
            [value for _, value in order],
            [text for _, text in planned.sentences],
        )

    plans = [
        plan(8, 2, length=length, filler=filler)
        for length in (8_000, 50_021, 3_000_000)
        for filler in ("prose", "code")
    ]
    assert all(told(planned) == told(plans[0]) for planned in plans)
    assert len({planned.facts for planned in plans}) == 3


def test_another_seed_or_index_gives_other_facts():
    stacks = [haystack(seed, index, length=9_000) for seed, index in ((1, 1), (1, 2), (2, 1))]
    values = [{fact.value for fact in stack.facts} for stack in stacks]
    assert not values[0] & values[1]
    assert not values[0] & values[2]


def test_every_kind_is_an_unasked_competitor():
    planned = plan(1, 1, length=12_000)
    asked = {question.fact for question in planned.questions}
    unasked = Counter(fact.kind for fact in planned.facts if fact.id not in asked)
    assert set(unasked) == set(KINDS)
    assert min(unasked.values()) == 3


def test_the_shortest_text_is_all_facts_and_one_byte_less_is_refused():
    least = shortest(3, 4, SMALL)
    stack = haystack(3, 4, length=least, recipe=SMALL)
    assert len(stack.text) == least
    assert b"".join(text for _, text in plan(3, 4, length=least, recipe=SMALL).sentences) == (
        stack.text
    )
    with pytest.raises(UsageError, match=rf"{least - 1} bytes is too short for 11 .* {least} byt"):
        haystack(3, 4, length=least - 1, recipe=SMALL)


@pytest.mark.parametrize("length", [-1, 0, 1, 999])
def test_a_short_length_is_refused_with_the_shortest_possible(length):
    with pytest.raises(UsageError, match="ask for a longer text or fewer of them"):
        haystack(1, 0, length=length)


def test_an_unknown_filler_is_refused():
    with pytest.raises(UsageError, match="unknown filler 'novel'"):
        haystack(1, 0, length=12_000, filler="novel")


def test_a_text_without_end_can_be_read_from_its_beginning():
    planned = plan(1, 0, length=10**13)
    beginning = b"".join(islice(planned.pieces(), 500))
    first = min(planned.facts, key=lambda fact: fact.depth).mentions[0]
    assert beginning[first.start : first.end] == first.value.encode()


def test_pieces_in_a_row_are_the_text():
    for filler in (*FILLERS, OWN):
        planned = plan(1, 5, length=20_011, filler=filler)
        stack = haystack(1, 5, length=20_011, filler=filler)
        assert b"".join(planned.pieces()) == stack.text
        assert planned.facts == stack.facts
        assert planned.questions == stack.questions


def test_a_users_sentence_that_holds_an_answer_is_left_out():
    facts = plan(1, 0, length=12_000).facts
    value = facts[3].mentions[0].value
    own = OwnText(f"A harmless line.\nIt was {value} then.\nAnother line.\n")
    stack = haystack(1, 0, length=12_000, filler=own)
    assert b"A harmless line.\n" in stack.text
    assert SEAM.encode() in stack.text
    assert b"It was" not in stack.text
    assert stack.filler == own.name


def test_the_corpus_loads_the_standard_library_only():
    code = (
        "import sys, minference_green.corpus.haystack\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules} - sys.stdlib_module_names))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert {"torch", "numpy", "scipy", "pydantic"}.isdisjoint(done.stdout.split())
    assert "minference_green" in done.stdout
