"""What an audit's figures are on answers small enough to reckon by hand, and at their edges."""

import itertools
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
from scipy import stats as scipy_stats

from minference_green import permutation
from minference_green.answers import Answer, collect
from minference_green.detectable import planned_detectable
from minference_green.errors import UsageError
from minference_green.groups import (
    Trend,
    by_depth,
    by_kind,
    depth_trend,
)
from minference_green.retention import (
    Finding,
    detectable,
    disparity,
    flips,
    intra_haystack_correlation,
    judge,
    loss,
    retention,
    shift,
)


def answer(haystack=0, kind="date", *, dense=True, sparse=True, depth=0.5, **fields):
    row = Answer(haystack, kind, depth, "after", 8192, dense, sparse)
    return replace(row, **fields)


def audit(haystacks, questions=10, *, lost=0, gained=0, wrong=0, kinds=("date", "url")):
    """Haystacks with so many answers lost, and so many dense answers wrong, each."""
    rows = []
    for h, q in itertools.product(range(haystacks), range(questions)):
        first = q - wrong
        dense = q >= wrong
        sparse = first >= lost if dense else q < gained
        rows.append(answer(h, kinds[q % len(kinds)], dense=dense, sparse=sparse))
    return collect(rows)


def varied(seed=0, haystacks=40, questions=14, share=0.2, kinds=("a", "b", "c")):
    """Answers with losses and gains at random."""
    rng = np.random.default_rng(seed)
    return collect(
        answer(
            h,
            kinds[(q + h) % len(kinds)],
            dense=bool(rng.random() > 0.1),
            sparse=bool(rng.random() > share),
            depth=float(rng.random()),
        )
        for h in range(haystacks)
        for q in range(questions)
    )


def finite(value):
    """Every number within a result is one."""
    if isinstance(value, dict):
        return all(finite(v) for v in value.values())
    if isinstance(value, (tuple, list)):
        return all(finite(v) for v in value)
    return not isinstance(value, float) or math.isfinite(value)


# --- the answers themselves


def test_answers_by_columns_keep_every_field_and_can_be_chosen_from():
    rows = [
        answer(7, "hex", sparse=False, place="inside", context_tokens=131072, depth=0.02),
        answer(9, "date", log_probability_change=-0.5, kl_above_floor_nats=0.25),
    ]
    answers = collect(iter(rows))
    assert len(answers) == 2
    assert answers.haystack.tolist() == [7, 9]
    assert answers.context_tokens.tolist() == [131072, 8192]
    inside = answers.where(answers.place == "inside")
    assert (inside.kind.tolist(), inside.depth.tolist()) == (["hex"], [0.02])
    assert np.isnan(inside.log_probability_change).all()
    assert answers.where(answers.place == "after").kl_above_floor_nats.tolist() == [0.25]


def test_no_answers_at_all_are_refused():
    with pytest.raises(UsageError, match="no answers to judge"):
        collect([])


@pytest.mark.parametrize("depth", [-0.01, 1.5, math.nan])
def test_a_depth_outside_the_context_is_refused(depth):
    with pytest.raises(UsageError, match=f"depth of {depth:g} is not within the context"):
        collect([answer(depth=depth)])


def test_a_question_asked_nowhere_is_refused():
    with pytest.raises(UsageError, match="inside or after, not 'before'"):
        collect([answer(place="before")])


# --- retention and its interval


def test_retention_counts_only_what_dense_gave_right():
    kept = retention(audit(20, 10, lost=2, wrong=3, gained=1))
    assert kept.value == pytest.approx(5 / 7)
    assert (kept.items, kept.haystacks) == (140, 20)


def test_the_interval_is_the_bca_bootstrap_of_haystacks():
    answers = varied()
    right = np.bincount(answers.haystack, answers.dense_right)
    kept = np.bincount(answers.haystack, answers.dense_right & answers.sparse_right)
    wanted = scipy_stats.bootstrap(
        (kept, right),
        lambda k, n, axis=-1: k.sum(axis) / n.sum(axis),
        paired=True,
        vectorized=True,
        confidence_level=0.90,
        n_resamples=9999,
        method="BCa",
        random_state=np.random.default_rng(1),
    ).confidence_interval
    found = retention(answers)
    assert found.how == "bootstrap"
    assert (found.low, found.high) == pytest.approx(tuple(wanted), abs=0.003)


def test_the_same_seed_gives_the_same_interval_and_another_a_different_one():
    assert retention(varied(), seed=3) == retention(varied(), seed=3)
    assert retention(varied(), seed=3) != retention(varied(), seed=4)


def test_losses_that_share_haystacks_widen_the_interval():
    def width(answers):
        share = retention(answers)
        assert share.how == "bootstrap"
        assert share.value == 0.5
        return share.high - share.low

    spread = [answer(h, sparse=(q + h % 2) % 4 < 2) for h in range(60) for q in range(9)]
    shared = [answer(h, sparse=h % 2 == 0) for h in range(60) for _ in range(9)]
    # The first has 4 or 5 of 9 in each haystack, the second all or nothing.
    spread = [replace(a, sparse_right=(i % 9 + a.haystack) % 2 == 0) for i, a in enumerate(spread)]
    assert width(collect(shared)) > 5 * width(collect(spread))


@pytest.mark.parametrize("lost", [0, 10])
@pytest.mark.parametrize("haystacks", [1, 2, 7, 120])
def test_all_kept_and_none_kept_have_exact_bounds_with_width(haystacks, lost):
    kept = retention(audit(haystacks, 10, lost=lost))
    effective = haystacks * 10 / (1 + 9 * 0.2)
    bound = 0.05 ** (1 / effective)  # Clopper-Pearson where nothing, or all, was hit
    wanted = (1.0, bound, 1.0) if lost == 0 else (0.0, 0.0, 1 - bound)
    assert (kept.value, kept.low, kept.high) == pytest.approx(wanted)
    assert kept.how == "clopper-pearson"


def test_fully_alike_answers_count_as_one_per_haystack():
    kept = retention(audit(13, 10), correlation=1.0)
    assert kept.low == pytest.approx(0.05 ** (1 / 13))


def test_an_observed_correlation_above_the_assumed_one_is_believed():
    """All or nothing in each of eight haystacks: they are eight answers, not eighty."""
    rows = [answer(h, sparse=h > 1) for h in range(8) for _ in range(10)]
    kept = retention(collect(rows))
    wanted = scipy_stats.binomtest(6, 8).proportion_ci(0.90, "exact")
    assert (kept.low, kept.high) == pytest.approx((wanted.low, wanted.high))


def test_few_haystacks_with_a_loss_do_not_make_a_bootstrap():
    def how(losing):
        rows = [answer(h, sparse=q > 0 or h >= losing) for h in range(60) for q in range(5)]
        return retention(collect(rows)).how

    assert (how(14), how(15)) == ("clopper-pearson", "bootstrap")


def test_haystacks_that_are_all_the_same_still_have_an_interval():
    """A bootstrap of them has no width at all, and BCa is not defined."""
    kept = retention(audit(50, 7, lost=1))
    assert kept.how == "clopper-pearson"
    assert kept.value == pytest.approx(6 / 7)
    assert kept.low < kept.value < kept.high


def test_without_a_right_dense_answer_nothing_can_be_lost():
    answers = audit(5, 4, wrong=4)
    kept = retention(answers)
    assert (kept.value, kept.low, kept.high, kept.items) == (None, None, None, 0)
    assert kept.reason == "nothing-to-lose"
    assert detectable(answers) is None
    assert judge(answers).reason == "nothing-to-lose"
    assert judge(answers).finding is Finding.UNDECIDED


def test_no_answers_left_after_choosing_say_so():
    nobody = audit(5).where(np.zeros(50, bool))
    assert retention(nobody).reason == "no-answers"
    assert loss(nobody, "net").reason == "no-answers"
    assert flips(nobody).gained_share.reason == "no-answers"
    assert by_kind(nobody).groups == ()
    assert by_kind(nobody).p is None
    assert depth_trend(nobody).p is None
    assert disparity(nobody) is None


def test_no_figure_is_ever_nan():
    edges = [
        audit(1, 1),
        audit(1, 1, lost=1),
        audit(1, 9, lost=4),
        audit(2, 5, wrong=5, gained=2),
        audit(30, 4, lost=4, kinds=("one",)),
        audit(30, 4, lost=1, wrong=1, gained=1),
        varied(haystacks=3),
        varied(),
    ]
    for answers in edges:
        for score in ("loss", "net"):
            found = (
                loss(answers, score, resamples=99),
                judge(answers, 0.05, score, resamples=99),
                by_kind(answers, score, resamples=99),
                by_depth(answers, score, resamples=99),
                depth_trend(answers, score, resamples=99),
            )
            assert all(finite(asdict(f)) for f in found)
        others = flips(answers, resamples=99), shift(answers), detectable(answers)
        assert all(finite(asdict(f)) for f in others if f is not None)
        unequal = disparity(answers, resamples=99)
        assert unequal is None or finite(asdict(unequal))


# --- flips


def test_flips_are_counted_both_ways_each_over_its_own_answers():
    found = flips(audit(20, 10, lost=2, wrong=4, gained=1))
    assert (found.lost, found.gained) == (40, 20)
    assert found.lost_share.value == pytest.approx(2 / 6)
    assert found.gained_share.value == pytest.approx(1 / 4)
    assert found.gained_share.items == 80


def test_where_dense_was_always_right_nothing_can_be_gained():
    assert flips(audit(20, lost=1)).gained_share.reason == "nothing-to-gain"


def test_flips_by_haystacks_see_what_mcnemar_takes_for_independent():
    """Thirty answers lost in one haystack of thirty are one event."""
    rows = [answer(h, sparse=h > 0) for h in range(30) for _ in range(30)]
    found = flips(collect(rows), resamples=999)
    assert found.p_mcnemar < 1e-6
    assert found.p_haystacks == 1.0


def test_sign_flips_of_haystacks_approach_their_exact_p():
    """Eight haystacks that lose one each: two of 256 sign patterns are as extreme."""
    assert flips(audit(8, lost=1), resamples=20_000).p_haystacks == pytest.approx(
        2 / 256, abs=0.002
    )


# --- verdict


def test_a_plain_loss_is_shown():
    verdict = judge(varied(share=0.3), 0.1)
    assert (verdict.finding, verdict.reason) == (Finding.LOSS, "beyond-margin")
    assert verdict.loss.low > 0.1
    assert verdict.more_haystacks is None


def test_no_loss_is_shown_to_be_within_the_margin_given_enough_haystacks():
    verdict = judge(audit(120, 28), 0.02)
    assert (verdict.finding, verdict.reason) == (Finding.NO_LOSS, "within-margin")
    assert verdict.loss.high < 0.02


def test_with_nothing_lost_the_haystacks_asked_for_are_just_enough():
    verdict = judge(audit(24, 28), 0.02)
    assert (verdict.finding, verdict.reason) == (Finding.UNDECIDED, "margin-in-interval")
    enough = 24 + verdict.more_haystacks
    assert judge(audit(enough, 28), 0.02).finding is Finding.NO_LOSS
    assert judge(audit(enough - 1, 28), 0.02).finding is Finding.UNDECIDED


def test_more_haystacks_are_needed_the_nearer_the_loss_is_to_the_margin():
    answers = varied(share=0.2)
    value = loss(answers).value
    needed = [judge(answers, value + gap).more_haystacks for gap in (0.02, 0.01, 0.005, -0.01)]
    assert needed[0] < needed[1] < needed[2]
    assert needed[3] > 100
    assert judge(answers, value).more_haystacks is None


def test_net_loss_takes_gains_off():
    answers = audit(60, 10, lost=2, wrong=4, gained=2)
    assert loss(answers, "net").value == 0.0
    assert judge(answers, 0.1).finding is Finding.LOSS
    assert judge(answers, 0.1, "net").loss.low < 0 < judge(answers, 0.1, "net").loss.high


def test_net_loss_without_a_single_flip_allows_for_unseen_ones_on_both_sides():
    unmoved = loss(audit(30, 10), "net")
    one_sided = 1 - 0.05 ** (1 / (300 / 2.8))
    assert (unmoved.low, unmoved.high) == pytest.approx((-one_sided, one_sided))


def test_net_loss_of_many_haystacks_asks_for_as_many_as_the_normal_approximation():
    answers = varied(share=0.2)
    verdict = judge(answers, 0.08, "net")
    per_haystack = np.bincount(answers.haystack, answers.dense_right * 1.0 - answers.sparse_right)
    spread, gap = (per_haystack / 14).std(), abs(verdict.loss.value - 0.08)
    wanted = ((1.6449 + 0.8416) * spread / gap) ** 2
    assert verdict.finding is Finding.UNDECIDED
    assert 40 + verdict.more_haystacks == pytest.approx(wanted, abs=1)


@pytest.mark.parametrize("haystacks", [1, 4])
def test_a_handful_of_haystacks_decides_nothing(haystacks):
    verdict = judge(audit(haystacks, 28, lost=28))
    assert (verdict.finding, verdict.reason) == (Finding.UNDECIDED, "few-haystacks")
    assert verdict.more_haystacks == 5 - haystacks
    assert judge(audit(5, 28, lost=28)).finding is Finding.LOSS


@pytest.mark.parametrize("margin", [0.0, 1.0, 2.0, -0.02])
def test_a_margin_that_is_no_share_is_refused(margin):
    with pytest.raises(UsageError, match=r"0\.02 means 2 points"):
        judge(audit(5), margin)
    with pytest.raises(UsageError, match=r"0\.02 means 2 points"):
        planned_detectable(["date"], 10, margin=margin)


# --- groups


def test_a_kind_lost_everywhere_is_named_with_its_counts():
    rows = [
        answer(h, kind, sparse=kind != "hex", dense=q > 0)
        for h in range(12)
        for q in range(3)
        for kind in ("hex", "url", "date")
    ]
    found = by_kind(collect(rows))
    assert found.named == ("hex",)
    assert found.p == 0.0001
    worst = next(g for g in found.groups if g.name == "hex")
    assert (worst.dense_right, worst.lost, worst.gained, worst.retention) == (24, 24, 0, 0.0)
    assert (worst.p, worst.p_adjusted) == pytest.approx((0.0001, 0.0003))
    # 24.5 to 0.5 lost in hex, 0.5 to 48.5 in the others.
    assert worst.odds_ratio == pytest.approx(24.5 / 0.5 * 48.5 / 0.5)
    assert [g.name for g in found.groups] == ["date", "hex", "url"]


def test_p_is_what_all_permutations_give():
    """Four haystacks of three kinds with one loss each: 81 ways to place them."""
    lost = ("a", "a", "a", "b")
    rows = [
        answer(h, kind, sparse=kind != lost[h % 4]) for h in range(4) for kind in ("a", "b", "c")
    ]
    # As many again of haystacks without any loss, so that the kinds can be tested.
    rows += [answer(h, kind) for h in range(4, 8) for kind in ("a", "b", "c")]
    found = by_kind(collect(rows), resamples=40_000)
    ways = list(itertools.product("abc", repeat=4))
    worse = {k: sum(w.count(k) >= lost.count(k) for w in ways) / 81 for k in "abc"}
    squares = [sum(w.count(k) ** 2 for k in "abc") for w in ways]
    assert {g.name: g.p for g in found.groups} == pytest.approx(worse, abs=0.01)
    assert found.p == pytest.approx(sum(s >= 10 for s in squares) / 81, abs=0.01)


def test_kinds_are_permuted_within_place_and_length_too():
    """All of the loss is inside; a kind asked there more often is not to blame."""
    rows = [
        answer(
            h,
            kind,
            sparse=place == "after" or q % 2 == 0,
            place=place,
        )
        for h in range(40)
        for kind, place, questions in (
            ("hex", "inside", 6),
            ("url", "inside", 2),
            ("hex", "after", 2),
            ("url", "after", 6),
        )
        for q in range(questions)
    ]
    answers = collect(rows)
    assert by_kind(answers, resamples=999).named == ()
    assert by_kind(replace(answers, place=np.full(len(answers), "after")), resamples=999).named == (
        "hex",
    )


def test_a_test_on_no_loss_at_all_names_nobody():
    found = by_kind(audit(30), resamples=199)
    assert found.p == 1.0
    assert all(g.p == 1.0 and not g.named for g in found.groups)


def test_a_kind_that_dense_hardly_knows_is_not_testable_rather_than_unbiased():
    rows = [answer(h, kind) for h in range(20) for kind in ("date", "url")]
    rows += [answer(h, "hex", dense=h < 4, sparse=False) for h in range(20)]
    found = by_kind(collect(rows), resamples=99)
    assert found.untestable == ("hex",)
    hex_ = next(g for g in found.groups if g.name == "hex")
    assert (hex_.untestable, hex_.p, hex_.p_adjusted, hex_.named) == (
        "few-right",
        None,
        None,
        False,
    )
    assert (hex_.dense_right, hex_.lost, hex_.odds_ratio) == (4, 4, None)
    assert detectable(collect(rows)).one_kind["hex"] is None
    rows += [answer(20, "hex", sparse=False), answer(20, "url")]
    assert by_kind(collect(rows), resamples=99).untestable == ()


def test_a_kind_never_asked_beside_another_is_not_testable():
    rows = [answer(h, kind, sparse=kind == "url") for h in range(9) for kind in ("date", "url")]
    rows += [answer(h, "hex", sparse=False) for h in range(9, 30)]
    found = by_kind(collect(rows), resamples=99)
    assert found.untestable == ("hex",)
    assert found.groups[1].untestable == "never-beside-another"


@pytest.mark.parametrize(
    "rows",
    [
        [answer(h, "date", sparse=h % 2 == 0) for h in range(20) for _ in range(3)],
        [answer(h, "date" if h < 16 or q else "url") for h in range(20) for q in range(2)],
    ],
    ids=["one kind", "its only neighbour cannot be tested"],
)
def test_one_kind_alone_cannot_be_compared(rows):
    found = by_kind(collect(rows), resamples=99)
    assert found.p is None
    assert "date" in found.untestable


def test_names_do_not_depend_on_the_order_of_answers():
    answers = varied()
    shuffled = answers.where(np.random.default_rng(0).permutation(len(answers)))
    one, other = (by_kind(a, resamples=4999) for a in (answers, shuffled))
    assert one.p == pytest.approx(other.p, abs=0.03)
    assert [g.lost for g in one.groups] == [g.lost for g in other.groups]


def test_a_large_audit_is_permuted_in_pieces_without_changing_what_it_says(monkeypatch):
    answers = varied(share=0.3)
    whole = by_kind(answers, resamples=3000)
    monkeypatch.setattr(permutation, "AT_ONCE", 1000)
    pieces = by_kind(answers, resamples=3000)
    assert pieces.p == pytest.approx(whole.p, abs=0.04)
    assert whole.resamples == pieces.resamples == 3000


def test_net_ranks_losing_kinds_as_loss_does_where_nothing_is_gained():
    rows = [answer(h, k, sparse=(h + ord(k)) % 5 > 1) for h in range(30) for k in "abcd"]
    by_loss, by_net = (by_kind(collect(rows), score, resamples=999) for score in ("loss", "net"))
    assert [g.p for g in by_loss.groups] == [g.p for g in by_net.groups]


def test_a_kind_that_gains_what_it_loses_is_named_by_loss_and_not_by_net():
    rows = []
    for h in range(40):
        rows += [answer(h, "date") for _ in range(8)]
        rows += [answer(h, "hex", sparse=q > 0) for q in range(4)]
        rows += [answer(h, "hex", dense=False, sparse=q == 0) for q in range(4)]
    assert by_kind(collect(rows), resamples=999).named == ("hex",)
    assert by_kind(collect(rows), "net", resamples=999).named == ()


def test_depths_are_told_apart_between_their_edges():
    depths = (0.02, 0.1, 0.25, 0.5, 0.75, 0.9, 0.98)
    rows = [answer(h, depth=d, sparse=d not in (0.25, 0.5)) for h in range(12) for d in depths]
    found = by_depth(collect(rows), resamples=1999)
    assert [g.name for g in found.groups] == [
        "0-0.05", "0.05-0.2", "0.2-0.4", "0.4-0.6", "0.6-0.8", "0.8-0.95", "0.95-1",
    ]  # fmt: skip
    assert found.named == ("0.2-0.4", "0.4-0.6")
    assert [g.name for g in by_depth(collect(rows), edges=(0.5,), resamples=99).groups] == [
        "0-0.5", "0.5-1",
    ]  # fmt: skip


@pytest.mark.parametrize("edges", [(0.5, 0.5), (0.6, 0.4), (0.0, 0.5), (0.5, 1.0)])
def test_edges_that_do_not_rise_are_refused(edges):
    with pytest.raises(UsageError, match="do not rise within 0 to 1"):
        by_depth(audit(5), edges=edges)


def test_a_trend_is_the_least_squares_slope_within_haystacks():
    rng = np.random.default_rng(2)
    # Unlucky haystacks are asked at the start: a slope across them would be downward.
    rows = [
        answer(h, depth=d, sparse=bool(rng.random() > 0.3 * d + 0.4 * (h % 2)))
        for h in range(40)
        for d in (rng.random(15) * (0.5 if h % 2 else 1.0)).tolist()
    ]
    answers = collect(rows)
    lost = (answers.dense_right & ~answers.sparse_right).astype(float)
    within = [answers.haystack == h for h in range(40)]
    x, y = (np.concatenate([v[m] - v[m].mean() for m in within]) for v in (answers.depth, lost))
    assert depth_trend(answers, resamples=99).slope == pytest.approx(float(x @ y / (x @ x)))


def test_a_trend_is_two_sided():
    down = [answer(h, depth=d / 10, sparse=d > 4) for h in range(9) for d in range(10)]
    up = [replace(a, depth=0.9 - a.depth) for a in down]
    falling, rising = (depth_trend(collect(rows), resamples=999) for rows in (down, up))
    assert falling.slope == pytest.approx(-rising.slope)
    assert falling.slope < 0
    assert (falling.p, rising.p) == (0.001, 0.001)


def test_one_depth_per_haystack_makes_no_trend():
    rows = [answer(h, depth=h / 10, sparse=h > 5) for h in range(10) for _ in range(7)]
    assert depth_trend(collect(rows)) == Trend(None, None, 70)


# --- what is measured on a scale


def test_a_shift_is_the_mean_of_haystack_means_with_students_t():
    changes = {0: [-1.0, -2.0, -3.0], 1: [-0.5], 2: [0.25, 0.75], 3: [-1.5, -1.5]}
    rows = [answer(h, log_probability_change=c) for h, cs in changes.items() for c in cs]
    rows += [answer(4)]  # not taken
    found = shift(collect(rows))
    means = [-2.0, -0.5, 0.5, -1.5]
    wanted = scipy_stats.ttest_1samp(means, 0).confidence_interval(0.90)
    assert found.mean == pytest.approx(-0.875)
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high))
    assert (found.items, found.haystacks) == (8, 4)
    ways = [
        sum(m * s for m, s in zip(means, signs, strict=True))
        for signs in itertools.product((1, -1), repeat=4)
    ]
    assert found.p == pytest.approx(np.mean([abs(w) >= 3.5 for w in ways]), abs=0.02)


def test_a_shift_of_one_haystack_has_no_interval_and_proves_nothing():
    found = shift(
        collect([answer(kl_above_floor_nats=0.4), answer(kl_above_floor_nats=0.6)]),
        "kl_above_floor_nats",
    )
    assert (found.mean, found.low, found.high, found.p) == (0.5, None, None, 1.0)
    assert found.reason == "one-haystack"


def test_a_shift_that_was_not_taken_says_so():
    found = shift(audit(5))
    assert (found.mean, found.p, found.items, found.reason) == (None, None, 0, "not-taken")


# --- disparity


def test_disparity_is_the_worst_kind_over_the_best():
    rows = [
        answer(h, kind, sparse=(h + q) % 10 >= lost)
        for h in range(40)
        for kind, lost in (("hex", 4), ("url", 1), ("date", 2))
        for q in range(5)
    ]
    found = disparity(collect(rows))
    assert (found.worst, found.best) == ("hex", "url")
    assert found.ratio == pytest.approx(0.6 / 0.9)
    assert found.low < found.ratio < found.high < 1
    assert found.ratio < found.by_chance < 1
    assert found.odds_ratio == pytest.approx((80.5 / 120.5) / (20.5 / 180.5))


def test_two_kinds_that_lost_nothing_are_level_with_an_interval_around_it():
    found = disparity(audit(30))
    assert (found.ratio, found.by_chance, found.odds_ratio) == (1.0, 1.0, 1.0)
    assert found.worst != found.best
    assert found.low < 1 < found.high


def test_a_kind_of_which_nothing_is_kept_has_a_ratio_of_nothing():
    rows = [answer(h, k, sparse=k == "url") for h in range(30) for k in ("hex", "url")]
    found = disparity(collect(rows))
    assert (found.ratio, found.low) == (0.0, 0.0)
    assert 0 < found.high < 0.2


def test_where_no_kind_keeps_anything_there_is_no_ratio():
    found = disparity(audit(30, lost=10))
    assert (found.ratio, found.low, found.high) == (None, None, None)
    assert found.odds_ratio == 1.0


def test_one_kind_has_no_disparity():
    assert disparity(audit(30, kinds=("date",))) is None


def test_answers_that_share_everything_correlate_fully_and_independent_ones_not_at_all():
    alike = collect([answer(h, sparse=h % 3 > 0) for h in range(30) for _ in range(7)])
    assert intra_haystack_correlation(alike) == pytest.approx(1.0)
    # Each haystack loses the same share: less alike than chance would have it.
    assert intra_haystack_correlation(audit(30, 7, lost=2)) == 0.0


@pytest.mark.parametrize("answers", [audit(1, lost=3), audit(30, 1), audit(30), audit(30, lost=10)])
def test_a_correlation_that_cannot_be_told_is_null(answers):
    assert intra_haystack_correlation(answers) is None


def test_an_audit_without_losses_reckons_with_the_stated_correlation():
    found = detectable(audit(40, 28), correlation=0.1)
    assert (found.correlation, found.correlation_is) == (0.1, "stated")
    clustered = detectable(varied(share=0.3), correlation=0.1)
    assert clustered.correlation_is == "observed"
    assert clustered.correlation == intra_haystack_correlation(varied(share=0.3))


def test_too_few_haystacks_to_decide_can_detect_no_loss_at_all():
    assert detectable(audit(4, 28), score="net").loss is None
    assert detectable(audit(4, 28)).loss is None
    assert detectable(audit(5, 28), score="net").loss < 1.0
    # Were all of five answers lost, 10 points net would be shown and 20 would not.
    assert detectable(audit(5, 1), 0.05, "net").loss is not None
    assert detectable(audit(5, 1), 0.2, "net").loss is None


def test_less_is_detectable_with_fewer_haystacks_more_likeness_and_more_kinds():
    def planned(kinds=14, haystacks=120, correlation=0.1, **more):
        names = [f"kind {k}" for k in range(kinds)]
        found = planned_detectable(names, haystacks, correlation=correlation, **more)
        return found.loss, found.one_kind["kind 0"]

    usual = planned()
    assert all(a < b for a, b in zip(usual, planned(haystacks=30), strict=True))
    assert planned(correlation=0.3)[0] > usual[0]
    assert planned(margin=0.05)[0] > usual[0] > 0.02
    assert planned(other_loss=0.2)[1] > usual[1]
    # The same questions per kind, and a smaller share of the 5 % for each of more kinds.
    assert planned(kinds=28)[1] > usual[1]


def test_a_plan_is_what_an_audit_of_that_size_without_losses_says():
    kinds = tuple("abcdefg")
    found = detectable(audit(60, 14, kinds=kinds))
    planned = planned_detectable(kinds, 60, items_per_kind=2, other_loss=0.0)
    assert found == planned


def test_one_kind_or_one_question_cannot_be_detected_as_worse():
    assert planned_detectable(["date"], 120).one_kind == {"date": None}
    # Two kinds of five answers: even all lost is not rare enough among seven kinds.
    assert (
        planned_detectable(list("abcdefg"), 5, items_per_kind=1, other_loss=0.6).one_kind["a"]
        is None
    )


@pytest.mark.parametrize(
    ("kinds", "haystacks", "items"), [([], 10, 2), (["date"], 0, 2), (["date"], 10, 0)]
)
def test_a_plan_that_asks_nothing_is_refused(kinds, haystacks, items):
    with pytest.raises(UsageError, match="asks nothing"):
        planned_detectable(kinds, haystacks, items_per_kind=items)


@pytest.mark.parametrize("name", ["other_loss", "correlation"])
@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_a_stated_share_that_is_none_is_refused(name, share):
    with pytest.raises(UsageError, match=f"{name}: {share:g} is not a share"):
        planned_detectable(["date", "url"], 10, **{name: share})
