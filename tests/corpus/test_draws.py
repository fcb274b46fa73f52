from hashlib import sha256

import pytest

from minference_green.corpus.draws import Draws


def test_the_same_seed_and_path_give_the_same_numbers_on_every_machine():
    draws = Draws(7, "a", 3)
    numbers = [draws.below(1 << 32) for _ in range(2500)]  # beyond the first two blocks
    assert numbers[:3] == [3158872320, 2360327307, 2475949732]
    digest = sha256(",".join(map(str, numbers)).encode()).hexdigest()
    assert digest.startswith("1bf2ad27198fa239")


def test_another_seed_or_path_gives_other_numbers():
    rows = [
        tuple(draws.below(1 << 32) for _ in range(4))
        for draws in (Draws(1), Draws(2), Draws(1, "x"), Draws(1, "y"), Draws(1, "x", "y"))
    ]
    assert len(set(rows)) == len(rows)


def test_a_child_does_not_depend_on_what_was_drawn_before():
    parent = Draws(5, "p")
    before = parent.child("c").below(1000)
    for _ in range(99):
        parent.below(9)
    assert parent.child("c").below(1000) == before == Draws(5, "p", "c").below(1000)


@pytest.mark.parametrize("n", [1, 2, 7, 13, 1000])
def test_numbers_stay_below_the_bound_and_reach_both_ends(n):
    draws = Draws(0, n)
    seen = {draws.below(n) for _ in range(20 * n)}
    assert min(seen) == 0
    assert max(seen) == n - 1


def test_between_reaches_both_ends():
    draws = Draws(0)
    assert {draws.between(-1, 1) for _ in range(100)} == {-1, 0, 1}


def test_uniform_numbers_are_spread_evenly():
    draws = Draws(3)
    numbers = [draws.uniform() for _ in range(4000)]
    assert all(0 <= number < 1 for number in numbers)
    assert sum(numbers) / len(numbers) == pytest.approx(0.5, abs=0.03)  # six standard errors
    assert sum(Draws(4, i).chance(0.25) for i in range(4000)) == pytest.approx(1000, abs=165)


def test_a_sample_holds_different_choices_and_reaches_every_order():
    draws = Draws(1)
    orders = {tuple(draws.sample("abc", 2)) for _ in range(200)}
    assert orders == {("a", "b"), ("a", "c"), ("b", "a"), ("b", "c"), ("c", "a"), ("c", "b")}
    assert sorted(draws.shuffled(range(63))) == list(range(63))


def test_a_sample_larger_than_its_choices_is_refused():
    with pytest.raises(ValueError, match="cannot draw 4 different ones of 3"):
        Draws(1).sample("abc", 4)
