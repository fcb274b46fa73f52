"""A year of a workload, and every gram of a run, by the published formulas done by hand."""

import json
from statistics import fmean, geometric_mean

import pytest

from minference_green.errors import UsageError
from minference_green.projection import project
from minference_green.render.export import as_json, records

LENGTH = 8192
ENERGY = {(LENGTH, "dense"): [[20000.0], [22000.0]], (LENGTH, "minference"): [[10000.0], [11000.0]]}


def test_a_year_is_prompts_times_tokens_times_the_cost_per_token(make_run) -> None:
    dense, _ = project(make_run(ENERGY), 1000, LENGTH)
    mtok = 1000 * 365 * LENGTH / 1e6
    joules = geometric_mean([20000.0, 22000.0]) * mtok
    assert dense.kwh.value == pytest.approx(joules / 3.6e6 * 1.2, rel=1e-9)
    assert dense.operational_kg.value == pytest.approx(joules / 3.6e9 * 1.2 * 56.039, rel=1e-9)
    # The fixture's windows last as long as their joules do at 500 W.
    assert dense.embodied_kg.value == pytest.approx(joules / 500 * 0.0104 / 1000, rel=1e-9)


def test_the_interval_of_kg_holds_the_factors_uncertainty_and_that_of_kwh_does_not(
    make_run,
) -> None:
    dense, _ = project(make_run(ENERGY), 1000, LENGTH)
    kg_per_kwh = 0.056039
    assert dense.operational_kg.low == pytest.approx(dense.kwh.low * kg_per_kwh * 0.9)
    assert dense.operational_kg.high == pytest.approx(dense.kwh.high * kg_per_kwh * 1.1)


def test_a_length_that_was_not_measured_is_refused_with_those_that_were(make_run) -> None:
    with pytest.raises(UsageError, match="measured 8k tokens and not 4096"):
        project(make_run(ENERGY), 1000, 4096)


@pytest.mark.parametrize("prompts", [0.0, -1.0, float("inf"), float("nan")])
def test_prompts_that_are_no_number_above_zero_are_refused(make_run, prompts) -> None:
    with pytest.raises(UsageError, match="--prompts-per-day"):
        project(make_run(ENERGY), prompts, LENGTH)


def test_without_a_rate_embodied_grams_are_null_with_the_reason(make_run) -> None:
    run = make_run(ENERGY)
    carbon = run.header.carbon.model_copy(
        update={"embodied_g_per_second": 0.0, "embodied_source": "not counted: no default"}
    )
    header = run.header.model_copy(update={"carbon": carbon})
    dense, _ = project(run.model_copy(update={"header": header}), 1000, LENGTH)
    assert dense.embodied_kg.value is None
    assert "not counted" in dense.embodied_kg.reason


def test_every_gram_of_a_run_follows_from_the_file_by_the_published_formula(six_blocks) -> None:
    """O = E / 3.6e6 * PUE * I and SCI = O + M, recomputed from the file's own numbers to 1e-9."""
    header = json.loads(as_json(six_blocks))["header"]["carbon"]
    intensity, pue = header["factor"]["g_per_kwh"], header["pue"]
    rate = header["embodied_g_per_second"]
    for record in records(six_blocks):
        own = [
            w
            for w in six_blocks.windows
            if (w.context_length, w.method) == (record["context_length_tokens"], record["method"])
        ]
        operational, sci = [], []
        for block in sorted({w.block for w in own}):
            here = [w for w in own if w.block == block]
            per_mtok = [1e6 * sum(r.joules for r in w.readings) / w.tokens for w in here]
            grams = [e / 3.6e6 * pue * intensity for e in per_mtok]
            operational.append(geometric_mean(grams))
            held = [1e6 * (w.end_seconds - w.start_seconds) / w.tokens * rate for w in here]
            sci.append(geometric_mean(o + m for o, m in zip(grams, held, strict=True)))
        assert record["operational_g_per_mtok"] == pytest.approx(
            geometric_mean(operational), rel=1e-9
        )
        assert record["sci_g_per_mtok"] == pytest.approx(geometric_mean(sci), rel=1e-9)
        assert fmean(sci) > fmean(operational), "embodied grams are in one and not in the other"
