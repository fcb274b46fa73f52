"""Settings a team keeps in one file: ``green-bench.toml``, or ``[tool.green-bench]``.

``[run]`` and ``[check]`` hold defaults of those commands' options, ``[criteria]`` what a
comparison judges and by which margin. A key that means nothing is an error, never ignored.
"""

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from minference_green.errors import UsageError

FILE = "green-bench.toml"
SHARED_FILE = "pyproject.toml"
TABLE = "green-bench"
"""Under ``[tool]`` of ``pyproject.toml``."""

SECTIONS = ("run", "check", "criteria")


@dataclass(frozen=True)
class Settings:
    """What the file of a directory says."""

    run: Mapping[str, Any]
    check: Mapping[str, Any]
    """Option name to value, by the names of the command line without dashes in front."""
    criteria: Mapping[str, float]
    """Criterion to margin."""


def read(directory: Path, options: Mapping[str, Iterable[str]]) -> Settings | None:
    """The settings in ``directory``, ``None`` without a file that holds some.

    ``options`` are the valid keys of ``run`` and ``check``. Raises ``UsageError`` for a file
    that is no TOML, settings in both files, an unknown section or key (with the nearest valid
    one), or a margin that is none.
    """
    own, shared = directory / FILE, directory / SHARED_FILE
    found = {file: table for file in (own, shared) if (table := _table(file)) is not None}
    if not found:
        return None
    if len(found) > 1:
        raise UsageError(
            f"settings are in both {FILE} and [tool.{TABLE}] of {SHARED_FILE}; keep one"
        )
    ((file, table),) = found.items()
    _known(f"{file.name}", table, SECTIONS)
    for section in SECTIONS:
        if not isinstance(table.get(section, {}), dict):
            raise UsageError(f"{file.name}: {section} must be a table, written [{section}]")
    defaults = {}
    for command, valid in options.items():
        defaults[command] = {_dashed(k): v for k, v in table.get(command, {}).items()}
        _known(f"{file.name} [{command}]", defaults[command], valid)
    return Settings(defaults["run"], defaults["check"], _criteria(file, table.get("criteria", {})))


def parse_margin(name: str, given: object) -> float:
    """A fraction from ``5%``, ``"5 %"`` or ``0.05``; ``name`` is whose margin, for the error."""
    text = str(given)
    try:
        value = float(text.removesuffix("%").strip()) / (100 if text.endswith("%") else 1)
    except ValueError as error:
        raise UsageError(f"{name} {text!r} is not a margin; write for example 5%") from error
    if not 0 < value < 1:
        raise UsageError(f"{name} {text!r} must be more than 0 % and less than 100 %")
    return value


def _table(file: Path) -> dict[str, Any] | None:
    """The settings in a file; ``None`` if there is no such file or it holds none."""
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{file.name} cannot be read as TOML: {error}") from error
    if file.name == FILE:
        return content
    table = content.get("tool", {}).get(TABLE)
    return dict(table) if table is not None else None


def _criteria(file: Path, table: Mapping[str, Any]) -> dict[str, float]:
    from minference_green.verdict import CRITERIA, check_margins

    _known(f"{file.name} [criteria]", table, CRITERIA)
    margins = {name: parse_margin(f"{file.name} [criteria] {name}", m) for name, m in table.items()}
    return {str(n): m for n, m in check_margins(margins).items()} if margins else {}


def _known(where: str, keys: Iterable[str], valid: Iterable[str]) -> None:
    valid = sorted(valid)
    for key in keys:
        if key not in valid:
            near = get_close_matches(key, valid, 1)
            meant = f"did you mean {near[0]!r}? It" if near else "it"
            raise UsageError(f"{where} has no key {key!r}; {meant} takes {', '.join(valid)}")


def _dashed(key: str) -> str:
    return key.replace("_", "-")
