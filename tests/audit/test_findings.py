"""What a report says of answers whose errors are known."""

import csv
import io
import random
from xml.etree import ElementTree

import pytest
from rich.console import Console

from minference_green.errors import UsageError
from minference_green.findings import findings, treatment
from minference_green.ledger import NOISE_FLOOR, Asked, KindOfText, OfText, Spent
from minference_green.render.audit import audit_document, conclusion
from minference_green.render.audit_export import audit_csv
from minference_green.render.audit_frontier import cheapest, picture
from minference_green.render.audit_page import audit_page, heat_map
from minference_green.render.table import show
from minference_green.results import Reading
from minference_green.retention import Finding

LENGTH = 12 * 1024


def chance(share, *what):
    """Whether something of this share happens, always the same for the same question."""
    return random.Random(repr(what)).random() < share


def sometimes(arm, haystack, fact, place):
    """Dense errs in one of twenty; the other arm there and in three of ten inside the prompt."""
    if chance(0.05, haystack, fact.id):
        return True
    return arm == "a-shape" and place == "inside" and chance(0.3, haystack, fact.id, "sparse")


@pytest.fixture(scope="module")
def half_blind(planned):
    return planned(sometimes)


def test_retention_is_told_apart_by_place(half_blind):
    arm = findings(half_blind).arm(LENGTH, "a-shape")
    assert arm.places["inside"].retention.value == pytest.approx(0.7, abs=0.06)
    assert arm.places["after"].retention.value == 1.0
    assert arm.places["inside"].verdict.finding is Finding.LOSS
    assert arm.places["after"].verdict.finding is not Finding.LOSS
    assert arm.places["after"].retention.low < 1.0


def test_a_loss_spread_evenly_names_no_kind_and_no_depth(half_blind):
    arm = findings(half_blind).arm(LENGTH, "a-shape")
    assert arm.kinds.named == ()
    assert arm.depths.named == ()


def test_every_sheet_has_as_many_cells_as_columns(half_blind):
    document = audit_document(half_blind)
    assert len(document.sheets) >= 8
    for sheet in document.sheets:
        assert all(len(row) == len(sheet.columns) for row in sheet.rows), sheet.caption


def test_the_conclusion_is_one_plain_sentence_with_both_figures(half_blind):
    (sentence,) = conclusion(findings(half_blind))
    assert sentence.startswith("At 12k tokens a-shape keeps of the answers ")
    assert "inside the prompt, a loss beyond 2 points is shown" in sentence
    assert "100 % [" in sentence


@pytest.mark.parametrize("kind", ["hex", "negated", "script"])
def test_a_method_that_drops_one_kind_has_that_kind_named_and_no_other(planned, kind):
    def drops(arm, haystack, fact, place):
        return arm == "a-shape" and fact.kind == kind and chance(0.7, haystack, fact.id)

    arm = findings(planned(drops)).arm(LENGTH, "a-shape")
    assert arm.kinds.named == (kind,)
    assert arm.depths.named == ()
    assert arm.disparity.worst == kind


def test_a_method_that_drops_a_range_of_depths_has_that_range_named(planned):
    def drops(arm, haystack, fact, place):
        return arm == "a-shape" and 0.4 <= fact.depth < 0.6 and chance(0.8, haystack, fact.id)

    arm = findings(planned(drops)).arm(LENGTH, "a-shape")
    assert arm.depths.named == ("0.4-0.6",)
    assert arm.kinds.named == ()


@pytest.mark.parametrize("width", [50, 80, 100, 200])
def test_no_figure_is_broken_over_lines_on_a_narrow_terminal(half_blind, width):
    document = audit_document(half_blind)
    console = Console(width=width, record=True, file=io.StringIO())
    show(document, console)
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= width
    cells = {cell for sheet in document.sheets for row in sheet.rows for cell in row if cell}
    assert not {c for c in cells if len(c) < 44 and not any(c in line for line in lines)}


def test_the_caption_of_kinds_counts_those_tested_and_names_the_test(planned):
    def errs(arm, haystack, fact, place):
        return fact.kind == "hex" or sometimes(arm, haystack, fact, place)

    audit = planned(errs)
    (sheet,) = (s for s in audit_document(audit).sheets if " by kind, " in s.caption)
    assert "Holm over 13; that any loses more: p " in sheet.caption


def test_a_kind_that_dense_fails_is_not_testable_rather_than_unharmed(planned):
    def fails(arm, haystack, fact, place):
        return fact.kind == "hex" or (arm == "a-shape" and chance(0.2, haystack, fact.id))

    found = findings(planned(fails))
    kinds = {g.name: g for g in found.arm(LENGTH, "a-shape").kinds.groups}
    assert kinds["hex"].untestable == "few-right"
    assert kinds["date"].untestable is None
    assert "none right" in heat_map(found, LENGTH)
    (sheet,) = (s for s in audit_document(found.audit).sheets if " by kind, " in s.caption)
    assert next(row for row in sheet.rows if row[1] == "hex")[-1] == "not tested: under 5 right"


def test_kinds_too_few_to_test_are_not_said_to_be_failed_by_dense(planned):
    sheets = audit_document(planned(lambda *_: False, haystacks=1)).sheets
    (sheet,) = (s for s in sheets if " by kind, " in s.caption)
    assert sheet.caption.endswith("none tested")
    assert {row[-1] for row in sheet.rows} == {"not tested: under 5 right"}
    assert {row[-4] for row in sheet.rows} == {"100.0 %"}


def test_the_trend_over_depths_says_which_end_loses_more(planned):
    def verdicts(lost):
        def errs(arm, haystack, fact, place):
            return arm == "a-shape" and chance(lost(fact.depth), haystack, fact.id)

        sheets = audit_document(planned(errs, haystacks=8)).sheets
        (sheet,) = (s for s in sheets if s.caption.startswith("Verdict"))
        return dict(zip(sheet.columns, sheet.rows[0], strict=True))["Start to end"]

    assert verdicts(lambda depth: 0.4 * depth).startswith("+")
    assert verdicts(lambda depth: 0.4 * (1 - depth)).startswith("-")
    assert verdicts(lambda depth: 0.0) == "+0 points, p = 1.000"


def test_a_model_that_fails_everything_loses_nothing_and_is_told_so(planned):
    audit = planned(lambda *_: True, haystacks=2)
    assert "nothing can be lost" in conclusion(findings(audit))[0]
    assert "n/a" in str(audit_document(audit).sheets[0].rows)
    assert "nothing can be lost" in audit_page(audit)


def test_flips_both_ways_balance_and_are_no_loss(planned):
    def swaps(arm, haystack, fact, place):
        dense_wrong = chance(0.1, haystack, fact.id)
        swapped = arm == "a-shape" and chance(0.1, haystack, fact.id, "swap")
        if not swapped:
            return dense_wrong
        return chance(0.5, haystack, fact.id, "way")

    arm = findings(planned(swaps)).arm(LENGTH, "a-shape")
    assert arm.flips.lost > 0
    assert arm.flips.gained > 0
    assert arm.kinds.named == ()


def test_conflicting_facts_enter_the_preference_and_nothing_else(planned):
    audit = planned(lambda *_: False)
    arm = findings(audit).arm(LENGTH, "a-shape")
    conflicting = [i for i in arm.items if i.asked.regime == "conflicting"]
    assert conflicting
    assert len(arm.answers) == len(arm.items) - len(conflicting)
    assert arm.preference_shift.items == len(conflicting)
    assert arm.preference_shift.mean == pytest.approx(-2.0)  # from +1 under dense to -1
    assert all(t.name != "conflicting" for t in arm.treatments)


def test_the_noise_floor_is_told_beside_the_flips_and_judged_by_nobody(half_blind):
    found = findings(half_blind)
    assert NOISE_FLOOR not in {arm.method for arm in found.compared}
    flips = next(s for s in audit_document(half_blind).sheets if "Beyond noise" in s.columns)
    assert NOISE_FLOOR in {row[1] for row in flips.rows}


def test_facts_are_grouped_by_how_they_are_put(half_blind):
    arm = findings(half_blind).arm(LENGTH, "a-shape")
    names = [t.name for t in arm.treatments]
    assert names[0] == "plain"
    assert {"2 hops", "3 hops", "updated", "legend", "2 mentions"} <= set(names)
    assert sum(t.dense_right for t in arm.treatments) == int(arm.answers.dense_right.sum())
    assert treatment(arm.items[0].asked) in names


def test_a_random_index_below_and_an_oracle_above_give_the_regret(planned):
    shares = {"a-shape": 0.3, "oracle": 0.1, "random": 0.8}

    def errs(arm, haystack, fact, place):
        return chance(shares.get(arm, 0.0), haystack, fact.id)

    audit = planned(errs, arms=("dense", "a-shape", "oracle", "random"), haystacks=8)
    computed = [
        {"event": "computed", "context_length": LENGTH, "method": m, "density": 0.2} for m in shares
    ]
    from minference_green.ledger import EVENT

    told = tuple(EVENT.validate_python(c) for c in computed)
    audit = audit.model_copy(update={"events": (*audit.events, *told)})
    (regret,) = (s for s in audit_document(audit).sheets if s.caption.startswith("Regret"))
    lead = {(row[2], row[3]): float(row[-1].split()[0]) for row in regret.rows}
    assert lead["oracle", "inside the prompt"] > 0 > lead["random", "inside the prompt"]
    headline = audit_document(audit).sheets[0]
    (oracle,) = (row for row in headline.rows if row[1] == "oracle")
    assert oracle[-1].startswith("n/a")


def timed(audit, **seconds):
    """The same audit, each prefill window of a method so long."""
    longer = {name.replace("_", "-").replace("-x", " x"): s for name, s in seconds.items()}
    return audit.model_copy(
        update={
            "events": tuple(
                e.model_copy(update={"end_seconds": e.start_seconds + longer[e.method]})
                if isinstance(e, Spent) and e.method in longer
                else e
                for e in audit.events
            )
        }
    )


def test_a_noise_floor_of_fewer_texts_is_said_beside_what_is_beyond_it(half_blind):
    document = audit_document(half_blind)
    (sheet,) = (s for s in document.sheets if s.caption.startswith("Answers that changed"))
    beyond = dict(zip(sheet.columns, sheet.rows[0], strict=True))["Beyond noise"]
    footnote = document.footnotes[int(beyond[:-1].rpartition("(")[2]) - 1]
    assert footnote == "the noise floor was asked 29 of 696 questions"


def test_short_windows_of_many_arms_are_one_footnote(planned):
    metered = [
        e.model_copy(update={"readings": (READING,)}) if isinstance(e, Spent) else e
        for e in planned(lambda *_: False, haystacks=5).events  # four in a window, and one
    ]
    audit = planned(lambda *_: False, haystacks=5).model_copy(update={"events": tuple(metered)})
    document = audit_document(timed(audit, dense=0.9, a_shape=1.1, noise_floor=2.5))
    short = [i for i, t in enumerate(document.footnotes, 1) if t.startswith("windows below 2 s")]
    assert len(short) == 1
    joules = {row[1]: row[4] for row in document.sheets[-1].rows}
    assert joules == {
        "dense": f"20.0 ({short[0]})", "a-shape": f"20.0 ({short[0]})", "noise-floor": "10.0"
    }  # fmt: skip


READING = Reading(device="gpu 0", scope="board", obtained="counter", source="", joules=10.0)


def test_the_cheapest_budget_that_keeps_enough_is_named(planned):
    shares = {"a-shape x0.25": 0.5, "a-shape x0.5": 0.1, "a-shape": 0.0, "a-shape x2": 0.0}

    def errs(arm, haystack, fact, place):
        return chance(shares.get(arm, 0.0), haystack, fact.id)

    measured = planned(errs, arms=("dense", *shares), haystacks=6, frontier=True)
    audit = timed(measured, dense=2.0, **{"a_shape_x0.25": 0.5, "a_shape": 1.0, "a_shape_x2": 1.5})
    sentence = cheapest(findings(audit), LENGTH)
    assert "the least time that keeps 99 % of the answers is a-shape's: 100.0 % kept" in sentence
    assert sentence.endswith("(no energy was measured), 50 % less than dense.")
    rows = next(s for s in audit_document(audit).sheets if s.columns[2] == "Budget").rows
    kept = {(row[1], row[2]): row[5] for row in rows}
    assert kept["dense", "1"] == "100 %"  # by definition, with nothing to estimate
    assert kept["a-shape", "1"].startswith("100 % [")
    drawn = picture(findings(audit), LENGTH)
    assert drawn.count("<circle") == 5 + 2  # five points, two names
    assert "seconds per million tokens" in drawn
    assert drawn in audit_page(audit)
    texts = [t.text or "" for t in ElementTree.fromstring(drawn).iter() if t.tag.endswith("text")]
    assert "Answers kept at 12k; bars are 90 % intervals, the dashed line 99 %" in texts


def test_a_budget_that_keeps_enough_and_costs_more_than_dense_is_no_advice(planned):
    audit = timed(planned(lambda *_: False, haystacks=2), dense=1.0, a_shape=2.5)
    sentence = cheapest(findings(audit), LENGTH)
    assert sentence.startswith(
        "At 12k no method and budget that keeps 99 % of the answers takes less time than dense "
        "prefill; a-shape comes nearest: 100.0 % kept"
    )
    assert sentence.endswith("150 % more than dense.")


def test_a_long_name_has_the_room_it_needs_above_its_columns(planned):
    svg = heat_map(findings(planned(lambda *_: False, arms=("dense", NAME), haystacks=1)), LENGTH)
    drawn = ElementTree.fromstring(svg[svg.index("<svg") : svg.index("</svg>") + 6])
    rows = drawn.findall("{http://www.w3.org/2000/svg}rect")
    assert {float(r.get("width")) for r in rows} == {7 * len(NAME) + 6}
    assert max(float(r.get("x")) + float(r.get("width")) for r in rows) < float(drawn.get("width"))


NAME = "package.module:AMethodWithALongName x0.25"


@pytest.mark.parametrize("damage", ["not asked", "fewer questions"])
def test_answers_to_other_questions_are_refused(planned, damage):
    audit = planned(lambda *_: False, haystacks=2)

    def damaged(event):
        if not isinstance(event, Asked) or event.haystack != 1:
            return [event]
        fewer = event.model_copy(update={"questions": event.questions[:3]})
        return [fewer] if damage == "fewer questions" else []

    events = tuple(e for event in audit.events for e in damaged(event))
    n = 3 if damage == "fewer questions" else 0
    with pytest.raises(UsageError, match=f"haystack 1 at {LENGTH} tokens asks {n} questions"):
        findings(audit.model_copy(update={"events": events}))


def test_a_budget_without_a_valid_window_is_not_chosen_and_said(planned):
    names = ("dense", "a-shape x0.5", "a-shape")
    audit = planned(lambda *_: False, arms=names, haystacks=3)

    def spoiled(*methods):
        return audit.model_copy(
            update={
                "events": tuple(
                    e.model_copy(update={"valid": False})
                    if isinstance(e, Spent) and e.method in methods
                    else e
                    for e in audit.events
                )
            }
        )

    one = cheapest(findings(spoiled("a-shape")), LENGTH)
    assert "a-shape x0.5" in one
    assert one.endswith("; what a-shape takes was not measured.")
    none = cheapest(findings(spoiled(*names)), LENGTH)
    assert none == "At 12k no prefill that keeps 99 % of the answers was measured."


def test_no_budget_that_keeps_enough_is_said_with_the_nearest(planned):
    def errs(arm, haystack, fact, place):
        return arm != "dense" and chance(0.4 if "x" in arm else 0.2, haystack, fact.id)

    arms = ("dense", "a-shape x0.5", "a-shape")
    sentence = cheapest(findings(planned(errs, arms=arms, haystacks=6)), LENGTH)
    assert "no method and budget keeps" in sentence
    assert "a-shape comes nearest" in sentence


def test_the_page_asks_nothing_of_any_network_and_holds_every_kind(half_blind, kinds):
    page = audit_page(half_blind)
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in page
    assert "<script" not in page
    for kind in kinds:
        assert f">{kind}<" in page
    assert len(page.encode()) < 300_000
    # Long facts wrap on a telephone; all other tables scroll in a box of their own.
    assert page.count("<table") - page.count('<div class="wide"><table') == 1
    assert '<table class="facts">' in page
    assert ".facts td { white-space: normal;" in page
    svg = heat_map(findings(half_blind), LENGTH)
    drawn = ElementTree.fromstring(svg[svg.index("<svg") : svg.index("</svg>") + 6])
    cells = drawn.findall("{http://www.w3.org/2000/svg}rect")
    assert len(cells) == len(kinds) * 3


def text_audit(audit, tokens, **recall):
    """An audit of a text of ``tokens`` tokens at 2k, which kept so much of each kind."""
    kinds = [
        KindOfText(
            kind=kind, tokens=500, attention=0.5, recall=kept, positions=256, kl_nats=0.1,
            top1_agreement=0.9, nll_change_nats=0.0,
        )
        for kind, kept in recall.items()
    ]  # fmt: skip
    record = OfText(context_length=2048, method="a-shape", tokens=tokens, kinds=tuple(kinds))
    plan = audit.header.plan.model_copy(update={"text": "mine.txt", "context_lengths": (2048,)})
    header = audit.header.model_copy(update={"plan": plan})
    return audit.model_copy(update={"header": header, "events": (record,)})


def of_text(audit, tokens, **recall):
    return audit_document(text_audit(audit, tokens, **recall))


def test_the_csv_of_a_text_has_a_row_for_every_kind(half_blind):
    rows = list(
        csv.DictReader(audit_csv(text_audit(half_blind, 2048, date=0.5, hex=None)).split("\n"))
    )
    assert [(r["method"], r["kind"], r["recall"]) for r in rows] == [
        ("a-shape", "date", "0.5"),
        ("a-shape", "hex", ""),
    ]
    assert rows[0]["kl_nats"] == "0.1"


def test_a_text_that_is_longer_than_what_was_read_is_not_said_to_be_all(half_blind):
    cut = of_text(half_blind, 2048, date=0.5, hex=0.75)
    assert "a-shape on the first 2048 tokens of the text" in cut.sheets[0].caption
    assert "the first 2k tokens of your text" in cut.conclusion[0]
    whole = of_text(half_blind, 2000, date=0.5, hex=0.75)
    assert "a-shape on all 2000 tokens of the text" in whole.sheets[0].caption
    assert "keeps least of that to date (50.0 %) and most of that to hex" in whole.conclusion[0]


def test_one_kind_in_a_text_is_not_its_own_best_and_worst(half_blind):
    (sentence,) = of_text(half_blind, 2000, other=0.5).conclusion
    assert "keeps 50.0 % of that to other, the only kind with 20 tokens or more;" in sentence
    (sentence,) = of_text(half_blind, 2000, other=0.99999, date=1.0).conclusion
    assert "keeps 100.0 % of that to each kind;" in sentence
