"""The two arguments that most verbs take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="the run's YAML file, or the name of a preset, such as finetune")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="values that replace those of the file")]
