"""The file of a run or an audit: records on disk at once, damage told from a cut, one writer."""

import json
import resource
from collections.abc import Callable
from pathlib import Path

import pytest

from minference_green.errors import ExitCode, MeasurementError, NotComparableError, UsageError
from minference_green.journal import Journal, SealError
from minference_green.results import (
    FILE_NAME,
    BlockDone,
    Header,
    Note,
    Window,
    load,
)

MakeWindow = Callable[..., Window]


@pytest.fixture
def written(tmp_path: Path, header: Header, window: MakeWindow) -> Path:
    with Journal(tmp_path / "run" / FILE_NAME) as journal:
        for event in (header, window(), window(90.0, method="minference"), BlockDone(block=0)):
            journal.append(event)
    return tmp_path / "run"


def test_what_is_written_reads_back_equal(
    written: Path, header: Header, window: MakeWindow
) -> None:
    run = load(written)
    assert run.header == header
    assert run.windows == (window(), window(90.0, method="minference"))
    assert run.blocks_done == {0}
    assert not run.cut
    assert not run.complete  # one of two blocks


def test_a_record_is_on_disk_before_append_returns(tmp_path: Path, header: Header) -> None:
    with Journal(tmp_path / FILE_NAME) as journal:
        journal.append(header)
        journal.append(Note(message="seen"))
        on_disk = (tmp_path / FILE_NAME).read_text().splitlines()
    assert [json.loads(line)["event"] for line in on_disk] == ["header", "note"]


def test_any_cut_of_the_file_loses_at_most_the_last_record(written: Path) -> None:
    whole = (written / FILE_NAME).read_bytes()
    first = whole.index(b"\n") + 1
    for size in range(first, len(whole), 7):
        (written / FILE_NAME).write_bytes(whole[:size])
        run = load(written)
        assert len(run.events) == whole[:size].count(b"\n") - 1
        assert run.cut == (whole[size - 1 : size] != b"\n")


def test_a_cut_line_is_dropped_when_the_run_goes_on(written: Path) -> None:
    file = written / FILE_NAME
    file.write_bytes(file.read_bytes()[:-5])
    with Journal(written / FILE_NAME) as journal:
        journal.append(BlockDone(block=0))
    run = load(written)
    assert not run.cut
    assert run.blocks_done == {0}


def test_a_file_cut_in_its_header_says_there_is_nothing_to_read(written: Path) -> None:
    file = written / FILE_NAME
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(UsageError, match="no complete header line"):
        load(written)


def test_damage_in_the_middle_names_the_line(written: Path) -> None:
    file = written / FILE_NAME
    lines = file.read_bytes().splitlines(keepends=True)
    lines[1] = lines[1][:30] + b"\n"
    file.write_bytes(b"".join(lines))
    with pytest.raises(UsageError, match="line 2 is not JSON"):
        load(written)


def test_an_unknown_field_is_refused_by_name(written: Path) -> None:
    file = written / FILE_NAME
    file.write_text(file.read_text() + '{"event": "note", "message": "x", "mood": "good"}\n')
    with pytest.raises(UsageError, match="mood"):
        load(written)


def test_another_schema_is_refused_with_both_versions(written: Path) -> None:
    file = written / FILE_NAME
    file.write_text(file.read_text().replace('"schema_version":"1.0"', '"schema_version":"9.0"'))
    with pytest.raises(NotComparableError, match=r"schema 9\.0, this version reads 1\.x"):
        load(written)


def test_a_missing_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        load(tmp_path / "nothing")


def test_a_second_writer_is_refused(tmp_path: Path, header: Header) -> None:
    with Journal(tmp_path / FILE_NAME) as journal:
        journal.append(header)
        with pytest.raises(UsageError, match="being written by another run"):
            Journal(tmp_path / FILE_NAME)
    assert load(tmp_path).header == header


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="--output"):
        Journal(tmp_path / "file" / "run" / FILE_NAME)


def test_a_full_disk_keeps_what_was_written_and_leaves_no_torn_line(
    tmp_path: Path, header: Header
) -> None:
    with Journal(tmp_path / FILE_NAME) as journal:
        journal.append(header)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        room = (tmp_path / FILE_NAME).stat().st_size + 20  # less than a record
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        try:
            with pytest.raises(MeasurementError, match="everything before is kept"):
                journal.append(Note(message="lost"))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        journal.append(Note(message="kept"))
    assert [e.message for e in load(tmp_path).of(Note)] == ["kept"]


@pytest.fixture
def sealed(written: Path) -> Path:
    with Journal(written / FILE_NAME) as journal:
        journal.append(BlockDone(block=0))
        journal.seal()
    return written / FILE_NAME


def test_a_sealed_run_says_so_until_more_is_written(sealed: Path) -> None:
    assert load(sealed).sealed
    with Journal(sealed.parent / FILE_NAME) as journal:
        journal.append(Note(message="more"))
    assert not load(sealed).sealed
    with Journal(sealed.parent / FILE_NAME) as journal:
        journal.seal()
    assert load(sealed).sealed


def test_any_changed_byte_of_a_sealed_run_is_found(sealed: Path) -> None:
    """Also in the seal itself, and where JSON would mean the same."""
    raw = sealed.read_bytes()
    missed = []
    for place in range(len(raw)):
        changed = bytearray(raw)
        changed[place] ^= 1
        sealed.write_bytes(changed)
        try:
            if load(sealed).sealed:
                missed.append(place)
        except (SealError, UsageError, NotComparableError):
            continue
    assert missed == []


def test_a_seal_written_otherwise_is_found_though_it_says_the_same(sealed: Path) -> None:
    sealed.write_text(sealed.read_text().replace('"seal","sha256"', '"seal", "sha256"'))
    with pytest.raises(SealError):
        load(sealed)


def test_an_edited_figure_is_told_from_damage(sealed: Path) -> None:
    sealed.write_text(sealed.read_text().replace('"joules":100.0', '"joules":50.0'))
    with pytest.raises(SealError, match="was changed after it was sealed") as error:
        load(sealed)
    assert error.value.exit_code == ExitCode.INVALID_MEASUREMENT
