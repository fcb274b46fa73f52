"""What the worker decides by itself: orders, repeats, when it is warm."""

import pytest
import torch

from minference_green.cell import repeats_for
from minference_green.torch_device import resolve_device
from minference_green.worker import settled, window_order


def test_two_arms_run_abba_and_the_next_block_baab() -> None:
    assert [name for _, name in window_order(["a", "b"], 0)] == ["a", "b", "b", "a"]
    assert [name for _, name in window_order(["a", "b"], 1)] == ["b", "a", "a", "b"]


@pytest.mark.parametrize("arms", [1, 2, 3, 5])
@pytest.mark.parametrize("block", [0, 1, 2, 7])
def test_a_linear_drift_is_the_same_for_every_arm(arms: int, block: int) -> None:
    order = [name for _, name in window_order([str(i) for i in range(arms)], block)]
    places = {name: [i for i, n in enumerate(order) if n == name] for name in order}
    assert {sum(at) / 2 for at in places.values()} == {(2 * arms - 1) / 2}


@pytest.mark.parametrize(("seconds", "repeats"), [(10.0, 1), (2.1, 1), (2.0, 2), (0.5, 5)])
def test_repeats_fill_the_window_with_a_margin(seconds: float, repeats: int) -> None:
    assert repeats_for(2.0, seconds) == repeats


@pytest.mark.parametrize(
    ("rounds", "warm"),
    [
        ([(1.0, 50.0), (1.0, 50.0)], False),  # three are needed
        ([(2.0, 40.0), (1.0, 50.0), (1.001, 50.5), (1.002, 51.0)], True),
        ([(1.0, 50.0), (1.001, 50.5), (1.006, 50.5)], False),  # still 0.6 % apart
        ([(1.0, 50.0), (1.0, 50.5), (1.0, 51.5)], False),  # still warming
        ([(1.0, None), (1.0, None), (1.0, None)], True),  # nothing tells its temperature
    ],
)
def test_warm_is_three_rounds_within_half_a_percent_and_a_degree(
    rounds: list[tuple[float, float | None]], warm: bool
) -> None:
    assert settled(rounds) == warm


def test_auto_is_the_cpu_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu")
