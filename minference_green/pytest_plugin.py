"""A pytest plugin: tests that fail when a function's energy rises against its control.

``@pytest.mark.energy(margin="5%", baseline="main")`` and the fixture ``green``::

    def test_prefill(green):
        green.measure(sparse_prefill, control=dense_prefill)

Off without ``--green``. What is judged is joules per call over those of the control, now
against the stored baseline, by the rules of ``green-bench check``.
"""

import hashlib
import math
import re
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import pytest

from minference_green.errors import GreenBenchError, MeasurementError, UsageError

if TYPE_CHECKING:
    from minference_green.meters.meter import Meter
    from minference_green.results import Event, Header, Run, Window
    from minference_green.verdict import Verdict

NAMES = ("control", "candidate")
"""The arms; the control is the reference."""


class GreenBenchWarning(pytest.PytestWarning):
    """A verdict that is open."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of the plugin."""
    group = parser.getgroup("green-bench", "energy of functions (green-bench)")
    group.addoption("--green", action="store_true", help="measure energy; off without it")
    group.addoption(
        "--green-save", action="store_true", help="store what is measured as the baseline"
    )
    group.addoption(
        "--green-strict", action="store_true", help="an inconclusive verdict fails its test"
    )
    group.addoption("--green-blocks", type=int, default=6, help="ABBA blocks per test")
    group.addoption("--green-window", type=float, default=2.0, help="seconds a window lasts")
    group.addoption("--green-meter", default="auto", help="as --meter of green-bench run")
    group.addoption(
        "--green-baselines", default="reports/baselines/pytest", help="folder of the baselines"
    )
    group.addoption(
        "--green-output", default="green-bench-runs/pytest", help="folder of what is measured"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker."""
    config.addinivalue_line(
        "markers",
        'energy(margin="5%", baseline="main"): margin and baseline of the fixture green',
    )


@pytest.fixture
def green(request: pytest.FixtureRequest) -> "Green":
    """Measures functions and holds them to their baseline; skips without ``--green``."""
    if not request.config.getoption("--green"):
        pytest.skip("energy is measured with --green only")
    return Green(request)


class Green:
    """What the fixture ``green`` gives a test."""

    def __init__(self, request: pytest.FixtureRequest) -> None:
        self._config = request.config
        self._test: str = request.node.nodeid
        marker = request.node.get_closest_marker("energy")
        self._given = dict(marker.kwargs) if marker else {}
        if marker and (marker.args or self._given.keys() - {"margin", "baseline"}):
            raise pytest.UsageError(
                f"{self._test}: @pytest.mark.energy takes margin= and baseline=, got "
                f"{[*marker.args, *self._given]}"
            )

    def measure(
        self, function: Callable[[], object], *, control: Callable[[], object]
    ) -> "Verdict | None":
        """Measure ``function`` beside ``control`` and judge it; ``None`` after ``--green-save``.

        The test fails on a proven regression, a missing baseline or windows that do not count,
        and is skipped where no meter exists. An open verdict is a warning, and a failure with
        ``--green-strict``.
        """
        try:
            margin = self._margin()
            stored = None if self._option("save") else self._stored()
            directory = self._record({"control": control, "candidate": function})
            if stored is not None:
                return self._judge(stored, directory, margin)
            self._save(directory)
        except GreenBenchError as error:
            self._fail(str(error))
        return None

    def _option(self, name: str) -> object:
        return self._config.getoption(f"--green-{name}")

    def _margin(self) -> float:
        from minference_green.config import parse_margin

        return parse_margin("margin", self._given.get("margin", "5%"))

    @property
    def _root(self) -> Path:
        return self._config.rootpath / str(self._option("baselines"))

    @property
    def _baseline(self) -> str:
        """The marker's name with the test's: each test has a baseline of its own."""
        readable = re.sub(r"[^A-Za-z0-9]+", "-", self._test.rpartition("::")[2]).strip("-")
        unique = hashlib.sha256(self._test.encode()).hexdigest()[:8]
        return f"{self._given.get('baseline', 'main')}.{readable}-{unique}"

    def _stored(self) -> "Sequence[Run]":
        from minference_green import baseline

        try:
            return baseline.read(self._root, self._baseline).runs
        except baseline.BaselineMissingError:
            raise baseline.BaselineMissingError(
                f"there is no baseline {self._baseline} in {self._root}; "
                "make it on code that is right, with: pytest --green --green-save"
            ) from None

    def _record(self, arms: dict[str, Callable[[], object]]) -> Path:
        from minference_green.journal import Journal
        from minference_green.results import FILE_NAME, BlockDone

        blocks, seconds = self._option("blocks"), self._option("window")
        assert isinstance(blocks, int)
        assert isinstance(seconds, float)
        if blocks < 1 or not seconds > 0:
            raise UsageError(
                f"--green-blocks {blocks} and --green-window {seconds:g} must be above 0"
            )
        stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S-%f")
        directory = self._config.rootpath / str(self._option("output")) / self._baseline / stamp
        repeats = {name: _repeats(function, seconds) for name, function in arms.items()}
        with self._meters() as meters, Journal(directory / FILE_NAME) as journal:
            journal.append(_header(self._test, stamp, meters, blocks, seconds))
            for event in _blocks(arms, repeats, meters, blocks):
                journal.append(event)
                if isinstance(event, BlockDone) and event.block == blocks - 1:
                    journal.seal()
        return directory

    @contextmanager
    def _meters(self) -> "Iterator[list[Meter]]":
        from minference_green.api import current_gpu
        from minference_green.meters import choose

        try:
            meters = choose.open_meters(str(self._option("meter")), gpu_uuids=current_gpu())
        except MeasurementError as error:
            pytest.skip(f"no energy can be measured here: {error}")
        try:
            yield meters
        finally:
            for meter in meters:
                meter.close()

    def _save(self, directory: Path) -> None:
        from minference_green import baseline

        baseline.save(self._root, self._baseline, directory, replace=True)

    def _judge(self, stored: "Sequence[Run]", directory: Path, margin: float) -> "Verdict":
        from minference_green.render.numbers import percent
        from minference_green.render.verdict import reason
        from minference_green.results import load
        from minference_green.verdict import Outcome, compare

        verdict = compare(stored, load(directory), margin={"energy_ratio": margin})
        (criterion,) = verdict.criteria
        said = (
            f"joules per call over the control's changed by {percent(criterion.change)} at a "
            f"margin of {margin:.1%}: {verdict.outcome.upper()}, {reason(criterion)}"
        )
        if verdict.outcome is Outcome.FAIL:
            self._fail(said)
        if verdict.outcome is Outcome.INCONCLUSIVE:
            if self._option("strict"):
                self._fail(said)
            warnings.warn(f"{self._test}: {said}", GreenBenchWarning, stacklevel=3)
        return verdict

    def _fail(self, message: str) -> NoReturn:
        pytest.fail(f"{self._test}: {message}", pytrace=False)


def _repeats(function: Callable[[], object], seconds: float) -> int:
    """Calls that fill a window, by one call after a first that warms up."""
    from minference_green.api import cuda_synchronize

    function()
    synchronize = cuda_synchronize()
    start = time.monotonic()
    function()
    synchronize()
    return max(1, math.ceil(1.05 * seconds / max(time.monotonic() - start, 1e-7)))


def _blocks(
    arms: dict[str, Callable[[], object]],
    repeats: dict[str, int],
    meters: "list[Meter]",
    blocks: int,
) -> "Iterator[Event]":
    """ABBA windows, the first arm alternating; all in this process, which a block here is not."""
    from minference_green.results import BlockDone

    for block in range(blocks):
        forth = NAMES if block % 2 == 0 else NAMES[::-1]
        for order, name in enumerate((*forth, *forth[::-1])):
            yield _window(arms[name], repeats[name], meters, block, order, name)
        yield BlockDone(block=block)


def _window(
    function: Callable[[], object],
    repeats: int,
    meters: "list[Meter]",
    block: int,
    order: int,
    name: str,
) -> "Window":
    from minference_green.api import cuda_synchronize
    from minference_green.results import Window
    from minference_green.validity import doubts

    synchronize = cuda_synchronize()
    before = tuple(s for m in meters for s in m.state())
    for meter in meters:
        meter.begin()
    started, start = datetime.now(UTC), time.monotonic()
    for _ in range(repeats):
        function()
    synchronize()
    end = time.monotonic()
    readings = tuple(r for m in meters for r in m.end(start, end))
    after = tuple(s for m in meters for s in m.state())
    valid, reasons = doubts(end - start, None, readings, before, after)
    return Window(
        block=block,
        order=order,
        context_length=1,
        method=name,
        repeats=repeats,
        tokens=repeats,
        start_seconds=start,
        end_seconds=end,
        started_at=started.isoformat(timespec="seconds"),
        readings=readings,
        before=before,
        after=after,
        valid=valid,
        reasons=reasons,
    )


def _header(test: str, run_id: str, meters: "list[Meter]", blocks: int, seconds: float) -> "Header":
    """A run whose tokens are calls, so that all that reads runs can read it."""
    import minference_green
    from minference_green import fingerprint
    from minference_green.carbon import terms
    from minference_green.results import Device, Fingerprint, Header, MethodSpec, Plan
    from minference_green.workload import Workload

    workload = Workload(model=f"pytest:{test}", context_lengths=(1,), dtype="none")
    devices = tuple(d for m in meters for d in m.devices)
    commit, dirty = fingerprint.repository_state(Path.cwd())
    return Header(
        run_id=run_id,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        version=minference_green.__version__,
        command=("pytest", test),
        fingerprint=Fingerprint(
            devices=devices or (Device(kind="cpu", name=fingerprint.cpu_name()),),
            model=workload.model,
            model_revision="none",
            weights="none: a function",
            parameters=0,
            dtype=workload.dtype,
            workload_hash=workload.hash,
            software=fingerprint.software(None),
            kernel_hash=fingerprint.kernel_hash(),
            code_commit=commit,
            code_dirty=dirty,
            cpu=fingerprint.cpu_name(),
            hostname_hash=fingerprint.hostname_hash(),
        ),
        workload=workload,
        methods=tuple(MethodSpec(name=name, parameters={}) for name in NAMES),
        plan=Plan(blocks=blocks, window_seconds=seconds, warmup_seconds=0.0, quick=False),
        carbon=terms(gpus=sum(d.kind == "gpu" for d in devices)),
        energy="; ".join(m.description for m in meters) or "not measured",
        request={},
    )
