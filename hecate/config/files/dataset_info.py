"""Read LLaMA-Factory's dataset_info.json: a path FOLDER/dataset_info.json:NAME becomes the source that the file describes."""

from __future__ import annotations

import os
import re
from typing import Any

from hecate.config.problems import did_you_mean, shorten
from hecate.errors import UserError
from hecate.io.plain_files import read_plain
from hecate.io.strict_json import JsonError, parse_json

_PATH = re.compile(r"(?P<file>(?:.*/)?dataset_info\.json):(?P<name>.+)")
_ALPACA = {"prompt": "instruction", "query": "input", "response": "output", "history": "history"}
"""Columns, and what hecate calls them, of records of alpaca's form; those of `_OF_ALL` are in records of every form."""
_OF_ALL = {"system": "system", "tools": "tools"}
TAGS = {
    "user_tag": ("human", "user"),
    "assistant_tag": ("gpt", "assistant"),
    "observation_tag": ("observation", "tool"),
    "function_tag": ("function_call",),
    "system_tag": ("system",),
    "role_tag": ("from", "role"),
    "content_tag": ("value", "content"),
}
"""Tags, and the values that hecate's reader of turns knows; the first is LLaMA-Factory's default."""
_UNREAD = ("ranking", "script_url", "cloud_file_name", "subset", "folder", "num_samples")
_MEDIA = ("images", "videos", "audios")


def dataset_info_source(source: dict[str, Any], *, must_exist: bool) -> dict[str, Any]:
    """Return a source's keys with what dataset_info.json says of the data set that its path names; other sources as they are.

    What the source says itself, such as its name, counts for more.

    Args:
        must_exist: whether the file must be there; where data are not read, the source stays as it is without it.

    Raises:
        UserError: the file cannot be read, has no data set of this name, or one that cannot be trained on.
    """
    path = source.get("path")
    match = _PATH.fullmatch(path) if isinstance(path, str) else None
    if match is None or not (must_exist or os.path.exists(match["file"])):
        if must_exist and isinstance(path, str) and os.path.basename(path) == "dataset_info.json":
            known = ", ".join(list(_described(path))[:8])
            raise UserError(f"{shorten(path)} describes data sets, and none is named\nwrite {shorten(path)}:NAME; it has {known}")
        return source
    file, name = match["file"], match["name"]
    entries = _described(file)
    if name not in entries:
        raise UserError(
            f"{shorten(file)} has no data set {shorten(name)}\n{did_you_mean(name, entries) or 'it has ' + ', '.join(list(entries)[:8])}"
        )
    try:
        found = _source_of(entries[name], os.path.dirname(file))
    except ValueError as error:
        raise UserError(f"{shorten(file)}: the data set {shorten(name)} cannot be trained on: {error}") from error
    called = {"name": name} if re.fullmatch(r"[A-Za-z0-9._-]{1,64}", name) else {}
    return called | found | {key: value for key, value in source.items() if key != "path" and value is not None}


def _described(file: str) -> dict[str, Any]:
    try:
        entries = parse_json(read_plain(file))
    except (OSError, JsonError) as error:
        raise UserError(f"{shorten(file)} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not isinstance(entries, dict):
        raise UserError(f"{shorten(file)} must hold an object that describes a data set under each name")
    return entries


def _source_of(entry: Any, folder: str) -> dict[str, Any]:
    """Raises ValueError: what hecate cannot do, or does not know."""
    if not isinstance(entry, dict):
        raise ValueError("it is described by no object")
    columns, tags = entry.get("columns") or {}, entry.get("tags") or {}
    if unread := [key for key in _UNREAD if entry.get(key)] or ["split"] * (entry.get("split", "train") != "train"):
        raise ValueError(f"hecate does not read its key {unread[0]}; name files of prompts and good answers by their own path")
    if media := [key for key in _MEDIA if columns.get(key)]:
        raise ValueError(f"its records have {media[0]}, and hecate reads text only")
    if columns.get("kto_tag", "kto_tag") not in ("kto_tag", "label"):
        raise ValueError(
            f"its column {columns['kto_tag']} says which answers are bad ones (kto_tag); call it label, and these are left out"
        )
    path = entry.get("hf_hub_url") or entry.get("file_name")
    if not isinstance(path, str):
        raise ValueError("neither file_name nor hf_hub_url says where it is")
    where = {"path": path if entry.get("hf_hub_url") else os.path.join(folder, path)}
    kind = entry.get("formatting", "alpaca")
    if kind not in ("alpaca", "sharegpt", "openai"):
        raise ValueError(f"its formatting {kind} is not known; alpaca, sharegpt and openai are")
    if kind != "alpaca":
        return where | _chats(columns, tags)
    if columns and not columns.get("response"):  # a document in the column of the prompt, as for continued pre-training
        return where | {"format": "text", "fields": _names({"prompt": "text"}, columns)}
    return where | {"format": "alpaca", "fields": _names(_ALPACA | _OF_ALL, columns)}


def _chats(columns: dict[str, Any], tags: dict[str, Any]) -> dict[str, Any]:
    for tag, known in TAGS.items():
        if tags.get(tag, known[0]) not in known:
            raise ValueError(f"its {tag} is {tags[tag]}, and hecate reads {' or '.join(known)}; rename it in the file")
    kind, key = ("messages", "messages") if tags.get("role_tag") == "role" else ("sharegpt", "conversations")
    return {"format": kind, "fields": _names({"messages": key} | _OF_ALL, {"messages": "conversations"} | columns)}


def _names(known: dict[str, str], columns: dict[str, Any]) -> dict[str, str] | None:
    """What `fields` says of these columns; a column that is called as in hecate need not be said."""
    return {ours: str(columns[theirs]) for theirs, ours in known.items() if columns.get(theirs) and columns[theirs] != ours} or None
