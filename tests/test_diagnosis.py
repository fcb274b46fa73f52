"""Findings of the doctor on disk, and what they do to later runs."""

import pytest

from minference_green import parent
from minference_green.diagnosis import Check, Diagnosis, cache_directory, store, stored
from minference_green.errors import UsageError
from minference_green.results import Device
from minference_green.validity import doubts


def diagnosis(outcome: str = "FAIL", driver: str = "580.1") -> Diagnosis:
    return Diagnosis(
        created_at="2026-05-01T10:00:00+00:00",
        device="GPU-a",
        name="H200",
        driver=driver,
        full=False,
        checks=(
            Check(name="idle", outcome="OK", finding="120 W"),
            Check(name="steady load", outcome=outcome, finding="off", figures={"watts": 600.5}),
        ),
    )


def test_findings_come_back_as_they_were_stored(tmp_path) -> None:
    file = store(diagnosis(), tmp_path / "new")
    assert file.name == "doctor-GPU-a.json"
    assert stored("GPU-a", tmp_path / "new") == diagnosis()
    assert stored("GPU-b", tmp_path / "new") is None


def test_the_worst_check_is_the_outcome() -> None:
    assert diagnosis("FAIL").outcome == "FAIL"
    assert diagnosis("WARN").outcome == "WARN"
    assert diagnosis("OK").outcome == "OK"
    assert diagnosis("FAIL").failing == ("steady load",)


def test_damaged_findings_are_refused_with_what_to_do(tmp_path) -> None:
    store(diagnosis(), tmp_path).write_text('{"device": "GPU-a"}')
    with pytest.raises(UsageError, match="run green-bench doctor again"):
        stored("GPU-a", tmp_path)


def test_a_place_that_cannot_be_written_is_refused(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="XDG_CACHE_HOME"):
        store(diagnosis(), tmp_path / "file")


def test_the_cache_follows_the_users_own_place(tmp_path) -> None:
    assert cache_directory({"XDG_CACHE_HOME": str(tmp_path)}) == tmp_path / "minference-green"
    assert cache_directory({}).parts[-2:] == (".cache", "minference-green")


class Meter:
    devices = (Device(kind="gpu", name="H200", uuid="GPU-a", driver="580.1"),)


def test_findings_hold_for_the_driver_they_were_made_under(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert parent.diagnoses_of([Meter()]) == []
    store(diagnosis(), cache_directory())
    assert parent.diagnoses_of([Meter()]) == [diagnosis()]
    store(diagnosis(driver="570.0"), cache_directory())
    assert parent.diagnoses_of([Meter()]) == []


def test_a_reading_of_a_distrusted_device_is_marked_with_the_reason(window) -> None:
    (reading,) = window().readings
    disputed = reading.model_copy(update={"disputed": True})
    valid, (mark,) = doubts(10.0, None, [disputed], (), (), {"cpu": "the doctor said so"})
    assert valid
    assert mark == "disputed: the doctor said so"
