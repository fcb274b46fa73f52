"""RAPL through powercap files: what is added up, wrap-around, and every refusal."""

from pathlib import Path

import pytest

from minference_green.meters.evidence import recompute
from minference_green.meters.faults import RaplError, WindowError
from minference_green.meters.rapl import RaplMeter, find_domains
from minference_green.meters.simulated import VirtualClock

RANGE_JOULES = 262_143.328850


def zone(root, place, name, joules=1000.0, kind="intel-rapl"):
    directory = root / f"{kind}:{place}"
    directory.mkdir(parents=True)
    (directory / "name").write_text(name + "\n")
    (directory / "max_energy_range_uj").write_text(f"{round(RANGE_JOULES * 1e6)}\n")
    (directory / "energy_uj").write_text(f"{round(joules * 1e6)}\n")
    return directory


class Host:
    """Counters in files, moved on by a clock."""

    def __init__(self, *zones, watts=50.0):
        self.zones, self.watts = zones, watts
        self.seconds, self.joules = 0.0, [1000.0] * len(zones)
        self.time = VirtualClock(10.0)
        clock = self.time.clock
        self.clock = type(clock)(clock.now, self.sleep)

    def sleep(self, seconds):
        self.time.pass_by(seconds)
        for i, directory in enumerate(self.zones):
            self.joules[i] = (self.joules[i] + self.watts * seconds) % RANGE_JOULES
            (directory / "energy_uj").write_text(f"{round(self.joules[i] * 1e6)}\n")

    def window(self, meter, seconds=2.0, watts=200.0):
        meter.begin()
        self.sleep(0.003)
        start = self.time.seconds
        idle, self.watts = self.watts, watts
        self.sleep(seconds)
        end = self.time.seconds
        self.watts = idle
        self.sleep(0.2)
        return meter.end(start, end)


@pytest.fixture
def host(tmp_path):
    return Host(zone(tmp_path, "0", "package-0"), zone(tmp_path, "0:1", "dram"))


@pytest.fixture
def meter(tmp_path, host):
    return RaplMeter("a CPU", headline=True, domains=find_domains(tmp_path), clock=host.clock)


def test_packages_and_dram_are_added_and_what_lies_inside_or_around_is_not(tmp_path):
    for place, name in (
        ("0", "package-0"),
        ("0:0", "core"),
        ("0:1", "uncore"),
        ("0:2", "dram"),
        ("1", "package-1"),
        ("1:0", "dram"),
        ("2", "psys"),
    ):
        zone(tmp_path, place, name)
    names = [d.name for d in find_domains(tmp_path)]
    assert names == ["package-0", "dram of package 0", "package-1", "dram of package 1"]


def test_the_memory_mapped_twin_is_not_counted_again(tmp_path):
    zone(tmp_path, "0", "package-0")
    zone(tmp_path, "0", "package-0", kind="intel-rapl-mmio")
    assert len(find_domains(tmp_path)) == 1


def test_the_twin_is_used_where_it_is_the_only_one(tmp_path):
    zone(tmp_path, "0", "package-0", kind="intel-rapl-mmio")
    assert len(find_domains(tmp_path)) == 1


def test_a_window_is_what_all_domains_gained_in_it(host, meter):
    [reading] = host.window(meter)
    assert reading.joules == pytest.approx(2 * 200.0 * 2.0, rel=1e-4)
    assert reading.scope == "package and DRAM"
    assert (reading.device, reading.obtained, reading.headline) == ("cpu", "counter", True)
    assert recompute(reading.evidence) == reading.joules


def test_a_wrap_around_is_undone(host, meter):
    host.joules = [RANGE_JOULES - 150.0, 1000.0]
    host.sleep(0.0)
    [reading] = host.window(meter)
    assert host.joules[0] < 1000, "the counter did wrap"
    assert reading.joules == pytest.approx(800.0, rel=1e-4)


def test_a_window_in_which_a_counter_may_wrap_twice_is_null(host, meter):
    [reading] = host.window(meter, seconds=300.0)
    assert reading.joules is None
    assert "wrapped" in reading.reason


def test_a_counter_that_went_back_without_wrapping_is_refused(host, meter):
    meter.begin()
    start = host.time.seconds
    host.sleep(1.0)
    host.joules[0] = 10.0
    host.sleep(1.0)
    with pytest.raises(RaplError, match="no host draws"):
        meter.end(start, host.time.seconds)


def test_counters_that_stand_still_are_refused(host, meter):
    host.watts = 0.0
    with pytest.raises(RaplError, match="stand still"):
        host.window(meter, watts=0.0)


def test_beside_a_gpu_the_reading_is_no_headline_and_the_cpu_no_device(tmp_path, host):
    meter = RaplMeter("a CPU", headline=False, domains=find_domains(tmp_path), clock=host.clock)
    [reading] = host.window(meter)
    assert not reading.headline
    assert meter.devices == ()
    assert "beside" in meter.description


def test_the_headline_names_the_cpu(meter):
    [device] = meter.devices
    assert (device.kind, device.name) == ("cpu", "a CPU")
    assert "a CPU" in meter.description
    assert meter.state() == []


def test_a_machine_without_counters_is_refused_with_the_way_on(tmp_path):
    with pytest.raises(RaplError, match="--meter modelled"):
        find_domains(tmp_path / "absent")


def test_only_psys_is_no_package(tmp_path):
    zone(tmp_path, "0", "psys")
    with pytest.raises(RaplError, match="no RAPL counters"):
        find_domains(tmp_path)


def test_a_counter_this_user_may_not_read_is_refused_with_the_command(tmp_path, monkeypatch):
    """Only root may read counters by default; the test itself may run as root."""
    zone(tmp_path, "0", "package-0")
    real = Path.read_text

    def read_text(path, *arguments):
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied")
        return real(path, *arguments)

    monkeypatch.setattr(Path, "read_text", read_text)
    with pytest.raises(RaplError, match="chmod"):
        find_domains(tmp_path)


def test_a_counter_that_is_no_number_is_refused(tmp_path):
    (zone(tmp_path, "0", "package-0") / "energy_uj").write_text("broken\n")
    with pytest.raises(RaplError, match="no number"):
        find_domains(tmp_path)


def test_a_counter_that_vanishes_is_refused(host, meter):
    (host.zones[0] / "energy_uj").unlink()
    with pytest.raises(RaplError, match="energy_uj"):
        meter.begin()


def test_end_without_begin_is_refused(meter):
    with pytest.raises(WindowError, match="without begin"):
        meter.end(1.0, 2.0)
