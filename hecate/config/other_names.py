"""What to write in the place of another trainer's key, or of a whole file of theirs: the app `hecate.apps.convert` says it.

An app is found by its name, so where hecate is installed without it there are no such hints.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from hecate.config.sections import APPS

_APP = "hecate.apps.convert"


def key_hint(key: str) -> str:
    """What to write in the place of another trainer's key, a hint for the message that refuses it. "" if the key is not known.

    Args:
        key: as it was given, such as lora_r or training.bf16; only its last part counts.
    """
    if key.partition(".")[0] in APPS:  # no other trainer has these, and the same words mean other keys of the run
        return ""
    table = _found("meanings")
    return "" if table is None else table.HINTS.get(key.rpartition(".")[2].replace("-", "_").lower(), "")


def value_hint(key: str, value: str) -> str:
    """What to write in the place of another trainer's value of a key that hecate has, too. "" if the value is not known."""
    table = _found("meanings")
    return "" if table is None else table.VALUE_HINTS.get(key, {}).get(value, "")


def whole_file(file: str) -> str:
    """What becomes of each key of a file, if it is a configuration of another trainer; "": it is not."""
    app = _found("convert")
    return "" if app is None else app.instead(file)


def _found(module: str) -> ModuleType | None:
    try:
        return import_module(f"{_APP}.{module}")
    except ModuleNotFoundError as error:
        if error.name is None or not _APP.startswith(error.name):
            raise
        return None
