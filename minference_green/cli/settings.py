"""Puts the settings file behind the command line: its values are defaults, flags win."""

from pathlib import Path
from typing import Any

import typer

_NOT_SETTINGS = ("help", "resume", "json", "quiet", "exit-zero")
"""Options that belong to one call."""

_READ_BY = ("run", "check", "compare", "calibrate")
"""Commands that the file has something to say to."""


def apply(context: typer.Context) -> None:
    """Make the settings of the current directory the defaults of the command to come."""
    if context.invoked_subcommand not in _READ_BY:
        return
    from minference_green.config import read

    run, check = _options(context, "run"), _options(context, "check")
    del check["margin"]  # one place for margins: [criteria]
    found = read(Path.cwd(), {"run": run, "check": check})
    if found is None:
        return
    calibrate = _options(context, "calibrate")
    context.default_map = {
        "run": _defaults(run, found.run),
        "calibrate": _defaults(
            calibrate,
            {k: v for k, v in found.run.items() if k in calibrate and k != "blocks"},
        ),
        # What a run is given by default is what a check is there to judge.
        "check": _defaults(
            check, {k: v for k, v in found.run.items() if k == "method-option"} | dict(found.check)
        ),
    }
    context.obj = {"criteria": found.criteria}


def _options(context: typer.Context, command: str) -> dict[str, Any]:
    """Options of a command by their long name without the dashes in front."""
    commands: dict[str, Any] = context.command.commands  # type: ignore[attr-defined]
    named = {p.opts[0].removeprefix("--"): p for p in commands[command].params}
    return {name: option for name, option in named.items() if name not in _NOT_SETTINGS}


def _defaults(options: dict[str, Any], given: Any) -> dict[str, Any]:
    return {options[key].name: _value(options[key], value) for key, value in given.items()}


def _value(option: Any, value: object) -> object:
    """A list for an option that takes commas becomes text with commas."""
    if isinstance(value, list) and not option.multiple:
        return ",".join(map(str, value))
    return value
