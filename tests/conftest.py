"""Records that tests of several folders need."""

from collections.abc import Callable
from typing import Any

import pytest

from minference_green.results import (
    CarbonTerms,
    Device,
    EmissionFactor,
    Fingerprint,
    Header,
    MethodSpec,
    Plan,
    Reading,
    Window,
)
from minference_green.workload import Workload


@pytest.fixture
def header() -> Header:
    """A header as a small CPU run writes it."""
    workload = Workload(model="planted:tiny", context_lengths=(4096,), dtype="float32")
    return Header(
        run_id="test-run",
        created_at="2026-01-01T00:00:00+00:00",
        version="0",
        command=("run",),
        fingerprint=Fingerprint(
            devices=(Device(kind="cpu", name="a processor"),),
            model=workload.model,
            model_revision="1",
            weights="planted weights",
            parameters=1000,
            dtype=workload.dtype,
            workload_hash=workload.hash,
            software={"torch": "2.11"},
            kernel_hash="0",
            code_commit=None,
            code_dirty=None,
        ),
        workload=workload,
        methods=(
            MethodSpec(name="dense", parameters={}),
            MethodSpec(name="minference", parameters={}),
        ),
        plan=Plan(blocks=2, window_seconds=2.0, warmup_seconds=5.0, quick=True),
        carbon=CarbonTerms(
            factor=EmissionFactor(
                g_per_kwh=100.0,
                location="FRA",
                year=2023,
                kind="average",
                boundary="lifecycle",
                source="test",
            )
        ),
        energy="a test",
        request={},
    )


@pytest.fixture
def window() -> Callable[..., Window]:
    """Windows with two seconds and a given energy; any field can be set."""

    def make(joules: float | None = 100.0, **fields: Any) -> Window:
        reading = Reading(
            device="cpu",
            scope="cpu model",
            obtained="modelled",
            source="a test",
            joules=joules,
            reason=None if joules is not None else "not measured",
        )
        values: dict[str, Any] = {
            "block": 0,
            "order": 0,
            "context_length": 4096,
            "method": "dense",
            "repeats": 1,
            "tokens": 4096,
            "start_seconds": 10.0,
            "end_seconds": 12.0,
            "started_at": "2026-01-01T00:00:00+00:00",
            "readings": (reading,),
        }
        return Window(**{**values, **fields})

    return make
