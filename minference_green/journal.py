"""The file of a run or an audit: a header line, then one line per finished step.

Each line is a record as JSON, on disk before the next step begins, so that whatever ends a
process loses no more than a step; a seal ends a finished file.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from minference_green.errors import MeasurementError, NotComparableError, UsageError


class Record(BaseModel):
    """Frozen, and strict about its fields: an unknown one means another schema."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Seal(Record):
    """Digest of all bytes of the file before this line; written when a run has its blocks.

    It finds damage and careless edits, not a forger: it has no key. A run that is given more
    blocks keeps its earlier seals, which stay checkable.
    """

    event: Literal["seal"] = "seal"
    sha256: str


class SealError(MeasurementError):
    """A file was changed after it was sealed."""


Head = TypeVar("Head", bound=Record)
"""The record of a first line."""

Step = TypeVar("Step", bound=Record)
"""The union of all records of a file, its header's among them."""


class Recorded(Record, Generic[Head, Step]):
    """A file of records in memory."""

    header: Head
    events: tuple[Step, ...]
    cut: bool = False
    """The last line was cut short (a killed process, a full disk) and was left out."""

    def of(self, kind: type[Any]) -> Iterator[Any]:
        """Events of one record type, in file order."""
        return (e for e in self.events if isinstance(e, kind))

    @property
    def sealed(self) -> bool:
        """Whether a digest covers the whole file; an unfinished one has none yet."""
        return bool(self.events) and isinstance(self.events[-1], Seal) and not self.cut


def read_records(
    file: Path,
    what: Literal["run", "audit"],
    schema: str,
    records: TypeAdapter[Step],
    header: type[Head],
) -> tuple[Head, tuple[Step, ...], bool]:
    """Header and other records of the file of a run or an audit, and whether it was cut short.

    A last line cut short is left out; damage anywhere else is an error. Raises ``UsageError``
    naming file, line and what is wrong, ``SealError`` for a file that is not what was sealed,
    ``NotComparableError`` for another schema than ``schema``, by its major version.
    """
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {what} {file}: {error.strerror}") from error
    *lines, rest = raw.split(b"\n")
    events: list[Step] = []
    digest = hashlib.sha256()
    for number, line in enumerate(lines, 1):
        event = _parse(line, f"{file} line {number}", what, schema, records)
        # A seal says nothing of its own line: only as it is written is it unchanged.
        if isinstance(event, Seal) and (
            event.sha256 != digest.hexdigest() or line + b"\n" != _line(event)
        ):
            raise SealError(
                f"{file} was changed after it was sealed (line {number} seals other bytes than "
                "those before it); its figures cannot be trusted: restore it, or measure again"
            )
        digest.update(line + b"\n")
        events.append(event)
    if not events or not isinstance(events[0], header):
        raise UsageError(
            f"{file} holds no complete header line, so there is nothing to read; "
            f"give a file written by green-bench {what}, or its directory"
        )
    return events[0], tuple(events[1:]), rest != b""


def stored_request(kind: type[Head], stored: Mapping[str, Any], version: str) -> Head:
    """What a run or an audit was asked to do, from the header that ``version`` wrote.

    Raises ``UsageError`` for a request this version does not know: going on would do another job.
    """
    try:
        return kind.model_validate(stored)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise UsageError(
            f"what was asked for cannot be read: {field}: {first['msg']}; go on with "
            f"minference-green {version}, which wrote it, or start anew"
        ) from error


def _parse(
    line: bytes,
    where: str,
    what: Literal["run", "audit"],
    schema: str,
    records: TypeAdapter[Step],
) -> Step:
    try:
        data = json.loads(line)
    except ValueError as error:
        raise UsageError(
            f"{where} is not JSON ({error}); the file was damaged or edited: "
            f"restore it, or delete from that line on and resume the {what}"
        ) from error
    if isinstance(data, dict) and data.get("event") == "header":
        found, major = str(data.get("schema_version")), schema.split(".")[0]
        if found.split(".")[0] != major:
            raise NotComparableError(
                f"{where} has schema {found}, this version reads {major}.x; "
                "read it with the green-bench version that wrote it"
            )
    try:
        return records.validate_python(data)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        article = "an" if what == "audit" else "a"
        raise UsageError(
            f"{where} is not a record of {article} {what}: {field}: {first['msg']}"
        ) from error


def _line(event: Record) -> bytes:
    return event.model_dump_json().encode() + b"\n"


class Journal:
    """Appends records to a file of them, each on disk before :meth:`append` returns.

    The file is locked while open, so that two processes never write one.
    """

    def __init__(self, file: Path) -> None:
        self.path = file
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            # Unbuffered: bytes a full disk refused must not come back with the next record.
            self._file = self.path.open("ab", buffering=0)
        except OSError as error:
            raise UsageError(
                f"cannot write to {file.parent}: {error.strerror}; "
                "choose another place with --output"
            ) from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise UsageError(
                f"{self.path} is being written by another run; wait for it, "
                "or start a new run with another --output"
            ) from error
        self._drop_cut_line()

    def append(self, event: Record) -> None:
        """Write one record; raises ``MeasurementError`` when the disk refuses it."""
        fd = self._file.fileno()
        before = os.fstat(fd).st_size
        line = _line(event)
        try:
            while line:
                line = line[os.write(fd, line) :]
            os.fsync(fd)
        except OSError as error:
            # What was written of the line would make the next record unreadable.
            os.ftruncate(fd, before)
            raise MeasurementError(
                f"could not write to {self.path}: {error.strerror}; "
                "everything before is kept, make room and resume"
            ) from error

    def seal(self) -> Seal:
        """Write the digest of everything in the file as its last record."""
        event = Seal(sha256=hashlib.sha256(self.path.read_bytes()).hexdigest())
        self.append(event)
        return event

    def close(self) -> None:
        """Release the file and its lock."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _drop_cut_line(self) -> None:
        raw = self.path.read_bytes()
        keep = raw.rfind(b"\n") + 1
        if keep < len(raw):
            os.ftruncate(self._file.fileno(), keep)
