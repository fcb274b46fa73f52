"""What ``green-bench doctor`` found of one device, kept where later runs look it up."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from minference_green.errors import UsageError
from minference_green.journal import Record

Outcome = Literal["OK", "WARN", "FAIL"]


class Check(Record):
    """One thing looked at."""

    name: str
    outcome: Outcome
    finding: str
    """What was seen, with its figures."""
    advice: str = ""
    """What to do about it; empty if all is well."""
    figures: dict[str, float] = Field(default_factory=dict)
    """The raw figures, with units in their names."""


class Diagnosis(Record):
    """Every check of one device, or of the machine around it."""

    created_at: str
    device: str
    """GPU UUID, ``cpu``, or ``machine``."""
    name: str
    driver: str | None
    full: bool
    checks: tuple[Check, ...]

    @property
    def outcome(self) -> Outcome:
        """The worst of the checks."""
        outcomes = {c.outcome for c in self.checks}
        return "FAIL" if "FAIL" in outcomes else "WARN" if "WARN" in outcomes else "OK"

    @property
    def failing(self) -> tuple[str, ...]:
        """Names of the checks that failed."""
        return tuple(c.name for c in self.checks if c.outcome == "FAIL")


def cache_directory(environ: Mapping[str, str] = os.environ) -> Path:
    """Where findings are kept: ``XDG_CACHE_HOME``, or ``~/.cache``."""
    home = environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "minference-green"


def store(diagnosis: Diagnosis, directory: Path) -> Path:
    """Write a diagnosis to its device's file; raises ``UsageError`` if that is not possible."""
    file = _file(diagnosis.device, directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        partial.write_text(diagnosis.model_dump_json(indent=1) + "\n", encoding="utf-8")
        partial.replace(file)
    except OSError as error:
        raise UsageError(
            f"cannot keep the findings in {file}: {error.strerror}; set XDG_CACHE_HOME to a "
            "directory you can write to"
        ) from error
    return file


def stored(device: str, directory: Path) -> Diagnosis | None:
    """The last diagnosis of a device, if there is one.

    Raises ``UsageError`` for a file that cannot be read as one.
    """
    file = _file(device, directory)
    try:
        return Diagnosis.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        raise UsageError(
            f"the doctor's findings in {file} cannot be read ({str(error).splitlines()[0]}); "
            "run green-bench doctor again, or delete the file"
        ) from error


def _file(device: str, directory: Path) -> Path:
    return directory / f"doctor-{device}.json"
