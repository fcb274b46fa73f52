"""Records and runs that tests of several folders need."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from minference_green.journal import Journal
from minference_green.results import (
    FILE_NAME,
    BlockDone,
    CarbonTerms,
    Device,
    EmissionFactor,
    Event,
    Fingerprint,
    Header,
    MethodSpec,
    Observation,
    Plan,
    Reading,
    Run,
    Setup,
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


WATTS = 500.0
REPEATS = 3

FRANCE = CarbonTerms(
    factor=EmissionFactor(
        g_per_kwh=56.039,
        location="FRA",
        year=2023,
        kind="average",
        boundary="lifecycle",
        source="a table",
    ),
    pue=1.2,
    embodied_g_per_second=0.0104,
    embodied_source="a study",
)

H200 = Device(
    kind="gpu",
    name="NVIDIA H200",
    uuid="GPU-1",
    memory_bytes=150754820096,
    power_limit_watts=700.0,
    driver="580.1",
)

Energy = Mapping[tuple[int, str], Sequence[Sequence[float | None]]]
"""(context length, method) to the joules per million tokens of each block's windows."""


def build_run(
    energy: Energy,
    *,
    seconds: Energy | None = None,
    density: Mapping[tuple[int, str], float] | None = None,
    blocks_planned: int | None = None,
    blocks_finished: int | None = None,
    invalid: Mapping[tuple[int, int, str], str] | None = None,
    marks: tuple[str, ...] = (),
    events: Sequence[Event] = (),
    header: Mapping[str, Any] | None = None,
    fingerprint: Mapping[str, Any] | None = None,
    obtained: str = "counter",
    batch: int = 2,
) -> Run:
    """A run whose windows have exactly these figures; ``invalid`` is by (block, order, method).

    Without ``seconds`` a window lasts as long as its joules do at 500 W.
    """
    lengths = tuple(dict.fromkeys(n for n, _ in energy))
    methods = tuple(dict.fromkeys(m for _, m in energy))
    blocks = max(len(per_block) for per_block in energy.values())
    workload = Workload(model="planted:8b", context_lengths=lengths, batch=batch)
    file: list[Event] = []
    for block in range(blocks):
        file.append(Setup(block=block, load_seconds=3.0, warmup_seconds=5.0, readings=()))
        for (length, method), per_block in energy.items():
            if block < len(per_block):
                times = (seconds or {}).get((length, method))
                for i, joules in enumerate(per_block[block]):
                    order = 2 * i + methods.index(method)
                    reason = (invalid or {}).get((block, order, method))
                    took = times[block][i] if times else joules and joules / WATTS
                    assert took is not None, "null joules need seconds"
                    tokens = REPEATS * batch * length
                    file.append(
                        Window(
                            block=block,
                            order=order,
                            context_length=length,
                            method=method,
                            repeats=REPEATS,
                            tokens=tokens,
                            start_seconds=100.0,
                            end_seconds=100.0 + took * tokens / 1e6,
                            started_at="2026-05-01T10:00:00+00:00",
                            readings=(
                                Reading(
                                    device="GPU-1",
                                    scope="board",
                                    obtained=obtained,
                                    source="total energy counter",
                                    joules=None if joules is None else joules * tokens / 1e6,
                                    reason="the counter stood still" if joules is None else None,
                                ),
                            ),
                            valid=reason is None,
                            reasons=marks if reason is None else (reason, *marks),
                        )
                    )
        for (length, method), value in (density or {}).items():
            file.append(
                Observation(
                    block=block,
                    context_length=length,
                    method=method,
                    density=value,
                    logits_relative_error=None if method == methods[0] else 0.031,
                    top1_agreement=None if method == methods[0] else 0.96875,
                    sampled_positions=256,
                )
            )
        if block < (blocks if blocks_finished is None else blocks_finished):
            file.append(BlockDone(block=block))
    told: dict[str, Any] = {
        "run_id": "20260501-100000-ab12",
        "created_at": "2026-05-01T10:00:00+00:00",
        "version": "0.1.0",
        "command": ("run",),
        "fingerprint": Fingerprint(
            **{
                "devices": (H200,),
                "model": "planted:8b",
                "model_revision": "recipe 1",
                "weights": "planted weights",
                "parameters": 8_000_000_000,
                "dtype": "bfloat16",
                "workload_hash": workload.hash,
                "software": {"torch": "2.11.0", "triton": "3.6.0"},
                "kernel_hash": "aaaa",
                "code_commit": "c0ffee",
                "code_dirty": False,
                "cpu": "a CPU (16 logical cores)",
                "hostname_hash": "beef",
                **(fingerprint or {}),
            }
        ),
        "workload": workload,
        "methods": tuple(MethodSpec(name=m, parameters={}) for m in methods),
        "plan": Plan(
            blocks=blocks_planned or blocks, window_seconds=10.0, warmup_seconds=20.0, quick=False
        ),
        "carbon": FRANCE,
        "energy": "NVML total energy counter of NVIDIA H200",
        "request": {},
    }
    return Run(header=Header(**{**told, **(header or {})}), events=(*file, *events))


@pytest.fixture
def make_run() -> Callable[..., Run]:
    """:func:`build_run`, for tests that state their own figures."""
    return build_run


@pytest.fixture
def store(tmp_path: Path) -> Callable[..., Path]:
    """Write a run to disk as the measuring loop does; returns its directory."""

    def write(run: Run, name: str = "", *, seal: bool = True) -> Path:
        directory = tmp_path / "runs" / (name or run.header.run_id)
        named = run.header.model_copy(update={"run_id": directory.name})
        with Journal(directory / FILE_NAME) as journal:
            for event in (named, *run.events):
                journal.append(event)
            if seal:
                journal.seal()
        return directory

    return write


@pytest.fixture
def six_blocks() -> Run:
    """Six blocks at 8k and 32k: 40 % and 62 % of dense energy on average, some spread."""
    wobble = (0.99, 1.0, 1.013, 1.004, 0.987, 1.006)
    energy = {
        (length, method): [[base * w, base * w * 1.002] for w in wobbles]
        for length, dense, ratio in ((8192, 21000.0, 0.62), (32768, 26000.0, 0.40))
        for method, base, wobbles in (
            ("dense", dense, wobble),
            ("minference", dense * ratio, wobble[::-1]),
        )
    }
    density = {key: 1.0 if key[1] == "dense" else 0.123 for key in energy}
    return build_run(energy, density=density)
