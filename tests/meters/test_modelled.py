"""The CPU model: labelled as one, from a table with a source, never taken for a reading."""

import time

import pytest

from minference_green.errors import UsageError
from minference_green.meters import modelled
from minference_green.meters.evidence import recompute
from minference_green.meters.faults import WindowError
from minference_green.meters.modelled import CpuModel, ModelledMeter, look_up, open_modelled


def test_a_known_cpu_has_its_rated_power_and_the_table_as_source():
    cpu = look_up("Intel Xeon Platinum 8480+", threads=112, sockets=1)
    assert cpu.rated_watts == 350.0
    assert "codecarbon" in cpu.source
    assert "cpu_power.csv" in cpu.source


@pytest.mark.parametrize(
    "name",
    ["Intel(R) Xeon(R) Platinum 8480+", "intel xeon  platinum 8480+ CPU @ 2.00GHz"],
)
def test_what_firmware_writes_differently_is_the_same_cpu(name):
    assert look_up(name, 112, 1).rated_watts == 350.0


def test_each_socket_counts():
    assert look_up("Intel Xeon Platinum 8480+", 224, 2).rated_watts == 700.0


def test_an_unknown_cpu_is_generic_and_says_so():
    cpu = look_up("Zilog Z80", threads=6, sockets=1)
    assert cpu.rated_watts == 24.0
    assert "Zilog Z80" in cpu.source
    assert "not in" in cpu.source


def test_a_similar_name_is_not_taken_for_a_match():
    assert "not in" in look_up("Intel Xeon Platinum 848", 8, 1).source


def test_an_entry_of_the_table_that_is_no_number_is_not_used(monkeypatch):
    from minference_green.carbon import Table

    table = Table("cpu_power.csv", b"Name,TDP\nBroken,27.29.5\n")
    monkeypatch.setattr(modelled, "table", lambda file: table)
    assert "not in" in look_up("Broken", 4, 1).source


@pytest.fixture
def meter():
    return ModelledMeter(CpuModel("a CPU", 100.0, 2, "a table"), headline=True, why="no RAPL")


def test_a_reading_is_rated_power_times_the_busy_share(meter, monkeypatch):
    busy = iter([50.0, 50.0, 53.0, 53.0])
    monkeypatch.setattr(modelled, "_busy_seconds", lambda: next(busy))
    meter.begin()
    start = time.monotonic()
    time.sleep(0.2)
    end = time.monotonic()
    [reading] = meter.end(start, end)
    # 3 CPU seconds cannot fit into 0.2 s of two threads: all of them were busy.
    assert reading.joules == pytest.approx(100.0 * (end - start))
    assert reading.uncertainty_joules == pytest.approx(reading.joules / 2)


def test_an_idle_host_still_draws_the_idle_share(meter, monkeypatch):
    monkeypatch.setattr(modelled, "_busy_seconds", lambda: 50.0)
    meter.begin()
    start = time.monotonic()
    time.sleep(0.05)
    end = time.monotonic()
    [reading] = meter.end(start, end)
    assert reading.joules == pytest.approx(10.0 * (end - start))


def test_a_busy_process_raises_the_figure(meter):
    meter.begin()
    start = time.monotonic()
    while time.monotonic() < start + 0.5:
        sum(range(1000))
    [reading] = meter.end(start, time.monotonic())
    assert reading.joules > 0.3 * 100.0 * 0.5


def test_the_reading_is_labelled_and_can_be_recomputed(meter):
    meter.begin()
    start = time.monotonic()
    time.sleep(0.05)
    [reading] = meter.end(start, time.monotonic())
    assert (reading.obtained, reading.scope, reading.device) == ("modelled", "cpu model", "cpu")
    assert "a table" in reading.source
    assert recompute(reading.evidence) == reading.joules
    assert "modelled, not measured" in meter.description
    assert "no RAPL" in meter.description
    assert meter.state() == []


def test_beside_a_gpu_it_is_no_headline():
    meter = open_modelled(headline=False)
    meter.begin()
    start = time.monotonic()
    time.sleep(0.02)
    [reading] = meter.end(start, time.monotonic())
    assert not reading.headline
    assert meter.devices == ()


def missing(file):
    raise UsageError("codecarbon is not installed")


def test_without_the_table_a_headline_is_refused(monkeypatch):
    monkeypatch.setattr(modelled, "table", missing)
    with pytest.raises(UsageError, match="not installed"):
        open_modelled(headline=True)


def test_without_the_table_the_figure_beside_a_gpu_is_null_with_the_reason(monkeypatch):
    monkeypatch.setattr(modelled, "table", missing)
    meter = open_modelled(headline=False)
    meter.begin()
    start = time.monotonic()
    time.sleep(0.02)
    [reading] = meter.end(start, time.monotonic())
    assert reading.joules is None
    assert "not installed" in reading.reason
    assert "not installed" in meter.description


def test_end_without_begin_is_refused(meter):
    with pytest.raises(WindowError, match="without begin"):
        meter.end(1.0, 2.0)
