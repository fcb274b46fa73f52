"""Right, wrong and how surely, from logits made by hand."""

import math

import pytest
import torch

from minference_green.auditing.score import Probe, Rival, rival, score


def rows(*likely: dict[int, float], vocabulary: int = 7) -> torch.Tensor:
    """Logits whose softmax gives each token named its probability, the rest to token 6."""
    out = torch.full((len(likely), vocabulary), -torch.inf)
    for row, probabilities in enumerate(likely):
        for token, p in probabilities.items():
            out[row, token] = math.log(p)
        out[row, 6] = math.log(max(1e-9, 1 - sum(probabilities.values())))
    return out


def test_an_answer_is_right_when_each_token_is_the_most_likely() -> None:
    found = score(rows({1: 0.6}, {2: 0.9}), [Probe((1, 2))])
    assert (found[0].right, found[0].first_right, found[0].rest_right) == (True, True, True)
    assert found[0].logprob == pytest.approx(math.log(0.6 * 0.9))
    assert found[0].first_logprob == pytest.approx(math.log(0.6))


def test_first_token_and_continuation_are_judged_apart() -> None:
    wrong_first, wrong_rest = Probe((1, 2)), Probe((3, 4))
    logits = rows({1: 0.2, 0: 0.7}, {2: 0.9}, {3: 0.9}, {4: 0.1, 5: 0.8})
    first, rest = score(logits, [wrong_first, wrong_rest])
    assert (first.first_right, first.rest_right, first.right) == (False, True, False)
    assert (rest.first_right, rest.rest_right, rest.right) == (True, False, False)


def test_an_answer_of_one_token_has_no_continuation() -> None:
    (found,) = score(rows({1: 0.9}), [Probe((1,))])
    assert found.rest_right is None
    assert found.right


def test_the_margin_is_taken_where_the_nearest_wrong_value_first_differs() -> None:
    near, far = Rival(1, 5), Rival(0, 0)
    probe = Probe((1, 2), present=(near, far), fresh=(Rival(1, 4),))
    (found,) = score(rows({1: 0.5, 0: 0.1}, {2: 0.4, 5: 0.3, 4: 0.2}), [probe])
    assert found.margin == pytest.approx(math.log(0.4 / 0.3))
    assert found.fresh_margin == pytest.approx(math.log(0.4 / 0.2))


def test_preference_is_the_log_odds_of_the_first_statement() -> None:
    probe = Probe((1, 2), conflicting=Rival(0, 3))
    (found,) = score(rows({1: 0.2, 3: 0.6}, {2: 0.9}), [probe])
    assert found.preference == pytest.approx(math.log(0.2 / 0.6))
    assert found.margin is None
    assert found.fresh_margin is None


def test_answers_one_behind_the_other_do_not_mix() -> None:
    probes = [Probe((1,), (Rival(0, 2),)), Probe((3, 4, 5)), Probe((2,), (), (Rival(0, 0),))]
    logits = rows({1: 0.5, 2: 0.25}, {3: 0.9}, {4: 0.9}, {5: 0.8}, {2: 0.5, 0: 0.125})
    together = score(logits, probes)
    apart = [*score(logits[:1], probes[:1]), *score(logits[1:4], probes[1:2])]
    apart += score(logits[4:], probes[2:])
    assert together == apart
    assert together[2].fresh_margin == pytest.approx(math.log(4))


def test_logits_are_normalised_in_fp32() -> None:
    logits = rows({1: 0.6}, {2: 0.9}).clamp(min=-30)
    (exact,) = score(logits, [Probe((1, 2))])
    (rounded,) = score(logits.bfloat16(), [Probe((1, 2))])
    assert rounded.logprob == pytest.approx(exact.logprob, abs=0.02)


def test_a_wrong_number_of_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="3 answer tokens need as many rows of logits, got 2"):
        score(torch.zeros(2, 7), [Probe((1, 2)), Probe((3,))])


@pytest.mark.parametrize(
    ("other", "found"),
    [((1, 9, 3), Rival(1, 9)), ((9,), Rival(0, 9)), ((1, 2), None), ((1, 2, 3, 4), None)],
)
def test_a_rival_is_where_values_first_differ(other, found) -> None:
    assert rival((1, 2, 3), other) == found
