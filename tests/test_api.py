"""What ``import minference_green`` offers: run, measure, compare."""

import json
import time
from pathlib import Path

import pytest

import minference_green as green
from minference_green.errors import UsageError
from minference_green.grams import operational_grams
from minference_green.results import CarbonTerms, EmissionFactor

FRANCE = CarbonTerms(
    factor=EmissionFactor(
        g_per_kwh=56.0, location="FRA", year=2023, kind="average", boundary="lifecycle", source="x"
    )
)


@pytest.fixture
def steady(tmp_path: Path) -> str:
    """A simulated GPU that draws 300 W whatever happens."""
    spec = tmp_path / "gpu.json"
    spec.write_text(json.dumps({"gpus": [{"watts": 300.0}]}))
    return f"simulated:{spec}"


def test_measure_gives_joules_and_seconds_per_call(steady: str) -> None:
    calls: list[float] = []
    cost = green.measure(
        lambda: calls.append(time.sleep(0.05) or 0.0), window_seconds=0.5, meter=steady
    )
    assert len(calls) == cost.repeats + 2  # one to warm up, one to time
    assert cost.seconds >= 0.5
    assert cost.joules == pytest.approx(300.0 * cost.seconds / cost.repeats, rel=0.02)
    assert cost.grams(FRANCE) == operational_grams(cost.joules, FRANCE)


def test_measure_without_a_meter_has_null_joules() -> None:
    cost = green.measure(lambda: None, window_seconds=0.01, meter="none")
    assert cost.joules is None
    assert cost.grams(FRANCE) is None
    assert cost.seconds > 0


def test_run_measures_and_returns_the_run(steady: str, tmp_path: Path) -> None:
    run = green.run(
        "planted:tiny",
        context_lengths=[300],
        blocks=1,
        window_seconds=0.2,
        warmup_seconds=0.1,
        device="cpu",
        meter=steady,
        output=tmp_path / "runs",
    )
    assert run.complete
    assert {w.method for w in run.windows} == {"dense", "minference"}
    verdict = green.compare(run, run)
    assert (verdict.blocks, verdict.exit_code) == (1, 3)  # one block decides nothing


def test_run_refuses_a_setting_it_does_not_know_by_name() -> None:
    with pytest.raises(UsageError, match=r"no setting speed.*window_seconds"):
        green.run(speed=11)


def test_the_package_has_nothing_else() -> None:
    with pytest.raises(AttributeError, match="no attribute 'ruin'"):
        green.ruin  # noqa: B018
