"""The two arguments that most verbs take, and what --json writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from hecate.errors import UserError


def complete_override(incomplete: str) -> list[str]:
    """What a shell completes an override to: keys, and after the = those values that are names."""
    from hecate.config.schema import LEAVES

    key, equals, _ = incomplete.partition("=")
    if not equals:
        return [f"{name}=" for name in LEAVES if name.startswith(key)]
    names = [value for arm in (LEAVES[key].type,) if get_origin(arm) is Literal for value in get_args(arm)] if key in LEAVES else []
    return [text for value in names if (text := f"{key}={value}").startswith(incomplete)]


def complete_config(incomplete: str) -> list[str]:
    from hecate.config.files.presets import run_presets

    return [name for name in run_presets() if name.startswith(incomplete)]


ConfigFile = Annotated[
    Path,
    typer.Argument(metavar="CONFIG", help="the run's YAML file, or the name of a preset, such as mixlora", autocompletion=complete_config),
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="values that replace those of the file", autocompletion=complete_override)
]


def check_json(path: Path | None) -> None:
    """Check the file that --json names, before a command does what takes long.

    Raises:
        UserError: it is in a folder that does not exist.
    """
    if path is not None and not path.absolute().parent.is_dir():
        raise UserError(f"--json {path}: there is no folder {path.parent}; make it first")


def write_json(path: Path, value: Any) -> None:
    """Write the figures of a command to the file that its user names.

    Raises:
        UserError: it cannot be written.
    """
    from hecate.io.durable import replace_output

    try:
        replace_output(path, [json.dumps(value, indent=1).encode() + b"\n"])
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error
