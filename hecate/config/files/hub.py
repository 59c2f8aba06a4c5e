"""With `hub: true`, fetch what a configuration names on the Hugging Face Hub, and put the local path in the place of the name."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hecate.config.problems import shorten
from hecate.config.typed import INVALID
from hecate.errors import UserError

MODEL, SOURCES = "model.name_or_path", ("data.train", "data.eval")
_OWNER = r"[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}"
_MODEL_NAME = re.compile(_OWNER)
_DATA_NAME = re.compile(rf"({_OWNER})(?:/(.+))?")
_OF_A_MODEL = ["*.json", "*.safetensors", "*.jinja", "*.txt", "tokenizer.model"]
"""the files of a model that hecate or transformers reads; no code, and nothing that would have to be unpickled"""


def hub_hint(name: str) -> str:
    """Return what to say of a path that is not there, but may be a name on the hub; "": it cannot be one, or its first folder is there."""
    return f" hub: true fetches {shorten(name)} from the hub, if it is a name there." if _data_name(name) else ""


def _data_name(path: str) -> re.Match[str] | None:
    """The parts of a path that may be the name of data on the hub; None: it is none, or its first folder is there."""
    return None if os.path.isdir(path.split("/")[0]) else _DATA_NAME.fullmatch(path)


def with_local_paths(
    values: dict[str, Any], add: Callable[[str, str, str], None], *, may_fetch: bool, trains: bool = True, inputs: bool = True
) -> dict[str, Any]:
    """Return a configuration's values with local paths in the place of names on the hub. Paths that exist stay as they are, and so do
    paths of data whose first folder exists.

    The model is called `OWNER/NAME`; data are called `OWNER/NAME`, which means the whole data set, or `OWNER/NAME/PATH`, where PATH is
    a file of it or a pattern. What was fetched lies in the hub's own cache, and the path names its revision.

    Args:
        add: is called with the key, the problem and a hint for each name that cannot be had. The value is INVALID then.
        may_fetch: False on all ranks but the one whose launcher has fetched: they find what is in the cache.
        trains: whether data.train is read, of which data.eval_share reads a part in any case; it stays as it is otherwise.
        inputs: whether any data are read.
    """
    found = dict(values)
    name = values.get(MODEL)
    if isinstance(name, str) and _MODEL_NAME.fullmatch(name) and not os.path.exists(name):
        try:
            found[MODEL] = str(_snapshot(name, "model", _OF_A_MODEL, may_fetch=may_fetch))
        except UserError as error:
            what, _, hint = str(error).partition("\n")
            add(MODEL, what, hint)
            found[MODEL] = INVALID
    read = SOURCES if trains or values.get("data.eval_share") else SOURCES[1:]
    for key in read if inputs else ():
        if isinstance(sources := values.get(key), tuple):
            fetched = tuple(_of_source(source, f"{key}[{at}].path", add, may_fetch=may_fetch) for at, source in enumerate(sources))
            found[key] = INVALID if INVALID in fetched else fetched
    return found


def _of_source(source: dict[str, Any], key: str, add: Callable[[str, str, str], None], *, may_fetch: bool) -> dict[str, Any] | object:
    path = source.get("path")
    match = _data_name(path) if isinstance(path, str) else None
    if match is None:
        return source
    name, inside = match[1], match[2]
    try:
        folder = _snapshot(name, "dataset", None if inside is None else [inside], may_fetch=may_fetch)
    except UserError as error:
        what, _, hint = str(error).partition("\n")
        add(key, what, hint)
        return INVALID
    called = {"name": name.partition("/")[2]} if source.get("name") is None else {}
    return source | called | {"path": str(folder if inside is None else folder / inside)}


def _snapshot(name: str, kind: str, patterns: list[str] | None, *, may_fetch: bool) -> Path:
    """Return the folder in the hub's cache with the files of a model or a data set.

    Raises:
        UserError: the hub has none of that name, cannot be reached, or may not be asked and the cache has none.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, repo_type=kind, allow_patterns=patterns, local_files_only=not may_fetch))
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"the {kind} {name} is not in the hub's cache, and the hub cannot be reached or may not be asked\n"
            f"fetch it on this machine: hf download {name}{' --repo-type dataset' if kind == 'dataset' else ''}"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        first = str(error).strip().partition("\n")[0][:200]
        raise UserError(f"the hub does not give the {kind} {name}: {first}\nlook at its name, and at HF_TOKEN if it is private") from error
