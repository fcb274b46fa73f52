"""When a window counts and when it is only marked."""

from collections.abc import Callable

from minference_green.results import DeviceState, Window
from minference_green.validity import doubts

COOL = DeviceState(device="GPU-0", throttle_seconds={"thermal": 4.0, "power_cap": 100.0})


def test_a_long_undisturbed_window_is_valid_without_a_mark(window: Callable[..., Window]) -> None:
    assert doubts(10.0, 10.0, window().readings, (COOL,), (COOL,)) == (True, ())


def test_a_power_cap_does_not_invalidate_but_heat_and_the_power_brake_do(
    window: Callable[..., Window],
) -> None:
    readings = window().readings
    capped = COOL.model_copy(update={"throttle_seconds": {"thermal": 4.0, "power_cap": 109.0}})
    assert doubts(10.0, None, readings, (COOL,), (capped,)) == (True, ())
    for cause in ("thermal", "power_brake"):
        hot = COOL.model_copy(update={"throttle_seconds": {"thermal": 4.0, cause: 4.5}})
        valid, (reason,) = doubts(10.0, None, readings, (COOL,), (hot,))
        assert not valid
        assert "slowdown" in reason


def test_clocks_may_differ_by_half_a_percent_and_a_millisecond(
    window: Callable[..., Window],
) -> None:
    readings = window().readings
    assert doubts(10.0, 9.95, readings, (), ())[0]
    valid, (reason,) = doubts(10.0, 9.90, readings, (), ())
    assert not valid
    assert "9.9000" in reason


def test_a_short_window_is_marked_and_still_valid(window: Callable[..., Window]) -> None:
    valid, (mark,) = doubts(1.2, None, window().readings, (), ())
    assert valid
    assert "1.20 s" in mark
    assert "--window" in mark


def test_a_disputed_reading_is_marked(window: Callable[..., Window]) -> None:
    (reading,) = window().readings
    disputed = reading.model_copy(update={"disputed": True})
    valid, (mark,) = doubts(10.0, None, [disputed], (), ())
    assert valid
    assert "disputed" in mark


def test_missing_headline_joules_invalidate_with_their_reason(
    window: Callable[..., Window],
) -> None:
    valid, reasons = doubts(10.0, None, window(None).readings, (), ())
    assert not valid
    assert reasons == ("not measured",)
