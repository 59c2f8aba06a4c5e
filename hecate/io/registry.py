"""Things of one kind that are files of one folder: being there is being registered, under the file's name.

Names come from the folder alone, so that the configuration knows them without an import of the files, which may need numpy or torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import hecate

_ROOT = Path(hecate.__file__).parent


def registered_names(package: str, first: Sequence[str] = ()) -> tuple[str, ...]:
    """The names of the files in a package of hecate's: `first` in their order, then the others by the alphabet. Nothing is imported."""
    found = {path.stem for path in _ROOT.joinpath(*package.split(".")[1:]).glob("*.py")} - {"__init__"}
    return (*(name for name in first if name in found), *sorted(found.difference(first)))


def registered(package: str, attribute: str, first: Sequence[str] = ()) -> dict[str, Any]:
    """What each file in a package calls `attribute`, by the file's name, in the order of `registered_names`."""
    return {name: getattr(import_module(f"{package}.{name}"), attribute) for name in registered_names(package, first)}
