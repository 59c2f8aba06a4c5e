"""Their data sets as items of data.train: lists with paths and types, names of dataset_info.json, names on the hub."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

from hecate.apps.convert.answer import KeyAnswer, Theirs, cannot, carry, default, left, off
from hecate.apps.convert.values import holds_out
from hecate.config.files.paths import name_of_source
from hecate.errors import UserError
from hecate.io.plain_files import read_plain
from hecate.io.strict_json import parse_json

Source = dict[str, Any]
_FIELDS = {"field_instruction": "instruction", "field_input": "input", "field_output": "output", "field_system": "system"}
"""axolotl's names"""
_COLUMNS = {"prompt": "instruction", "query": "input", "response": "output", "system": "system", "history": "history", "tools": "tools"}
"""LLaMA-Factory's"""
_READ = "path id type split name config data_files field field_messages message_property_mappings message_field_role message_field_content"
_KNOWN = {*_READ.split(), *_FIELDS, "ds_type", "roles", "trust_remote_code", "shards", "columns", "weight"}
_FORMATS = {"alpaca": "alpaca", "completion": "text", "pretrain": "text", "None": None}


class CannotSay(Exception):
    """A data set that hecate cannot read as theirs does; the text says what to do."""


def data_of(name: str, value: Any, theirs: Theirs) -> KeyAnswer:
    """datasets, dataset, dataset_name and the like, and eval_dataset."""
    key = "data.eval" if name.startswith("eval") else "data.train"
    try:
        gives = {key: _unique(_sources(name, value, theirs))}
        if name == "dataset_name" and holds_out(theirs):
            gives["data.eval"] = [_entry(_whole(value, theirs) | {"split": theirs.get("dataset_test_split") or "test"})]
        if tests := _unique(_sources("dataset_mixer test", value, theirs)) if name == "dataset_mixer" else []:
            gives["data.eval"] = tests
    except CannotSay as problem:
        return cannot(str(problem))
    return carry(gives | ({"hub": True} if any(on_hub(one["path"]) for sources in gives.values() for one in sources) else {}))


def on_hub(path: str) -> bool:
    """Whether a path can only be a name on the hub."""
    return "/" in path and path[0] not in "./~" and not os.path.exists(path.split("/")[0])


def max_samples(name: str, value: Any, theirs: Theirs) -> KeyAnswer:
    """LLaMA-Factory's limit of each data set: nothing to do where all are shorter."""
    if off(value):
        return default("all records")
    try:
        counts = [_records(one["path"]) for one in _sources("dataset", theirs.get("dataset"), theirs)]
    except (CannotSay, OSError, UserError):
        counts = [value + 1]
    if max(counts) <= value:
        return left(f"no data set has more: {', '.join(map(str, counts))}")
    return cannot("hecate reads whole files: give it ones with that many records, or --drop max_samples to train on all")


def _records(path: str) -> int:
    data = read_plain(path)
    return len(data.splitlines()) if path.endswith(".jsonl") else len(parse_json(data))


def _sources(name: str, value: Any, theirs: Theirs) -> list[Source]:
    if name in ("dataset", "eval_dataset") and isinstance(value, str):
        return [_of_info(one.strip(), Path(str(theirs.get("dataset_dir") or "data"))) for one in value.split(",")]
    if name.startswith("dataset_mixer") and isinstance(value, dict):  # names and weights, whose splits stand beside
        splits = [one for one in theirs.get("dataset_splits") or ["train"] if one.startswith("test") == name.endswith("test")]
        value = [{"path": path, "split": split, "weight": weight} for path, weight in value.items() for split in splits]
    if isinstance(value, dict):
        if extra := sorted(value.keys() - {"datasets", "seed"}):
            raise CannotSay(f"take {', '.join(extra)} out of their file; data.eval names held-out data")
        value = value.get("datasets")
    if isinstance(value, str):
        value = [_whole(value, theirs) | ({"split": "train"} if holds_out(theirs) else {})]
    return [_entry({"path": one} if isinstance(one, str) else one) for one in value or ()]


def _whole(path: str, theirs: Theirs) -> Source:
    split = theirs.get("dataset_train_split")
    return {"path": path, "config": theirs.get("dataset_config"), "split": None if split == "train" else split}


def _entry(entry: Source) -> Source:
    """An entry of axolotl's or TRL's lists."""
    path, files, kind = str(entry.get("path") or entry.get("id")), entry.get("data_files"), entry.get("type")
    unread = sorted(key for key in entry.keys() - _KNOWN if not off(entry[key]))
    unread += ["type"] if isinstance(kind, dict) else [] if isinstance(files, str | None) else ["data_files"]
    if unread:
        raise CannotSay(f"{path}: hecate's data have no such {', '.join(unread)}: see docs/use/data.md, and change their file")
    if files:
        path = f"{path}/{files}" if on_hub(path) else str(files)
    elif on_hub(path):
        path = _of_split(path, entry.get("split"), entry.get("name") or entry.get("config"))
    made: Source = {"path": path} | ({} if entry.get("weight") in (None, 1) else {"weight": entry["weight"]})
    kind = str(kind).partition(".")[0].partition(":")[0]
    if kind in ("chat_template", "sharegpt"):
        old = kind == "sharegpt"
        mapping = entry.get("message_property_mappings") or {}
        role = mapping.get("role") or entry.get("message_field_role") or ("from" if old else "role")
        content = mapping.get("content") or entry.get("message_field_content") or ("value" if old else "content")
        return made | _chat(role, content, entry.get("field_messages") or ("conversations" if old else "messages"))
    if kind not in _FORMATS:
        raise CannotSay(f"type {kind}: hecate has messages, prompt_completion, alpaca, sharegpt and text (docs/use/data.md)")
    fields = {ours: entry[key] for key, ours in _FIELDS.items() if entry.get(key)} | (
        {"text": entry["field"]} if entry.get("field") else {}
    )
    return made | ({"format": _FORMATS[kind]} if _FORMATS[kind] else {}) | ({"fields": fields} if fields else {})


def _of_split(path: str, split: Any, config: Any) -> str:
    """The files of a split on the hub, as `push_to_hub` of the library datasets names them; the whole data set without one."""
    if split is None and config in (None, "default"):
        return path
    if "[" in str(split):
        raise CannotSay(f"{path}: hecate reads whole files, not {split}: name one with those records, or take split out of their file")
    return f"{path}/{'data' if config in (None, 'default') else config}/{split or 'train'}-*"


def _chat(role: str, content: str, field: str) -> Source:
    kinds = {("role", "content"): ("messages", "messages"), ("from", "value"): ("sharegpt", "conversations")}
    if (role, content) not in kinds:
        raise CannotSay(f"messages with {role} and {content}: hecate reads role and content, or from and value")
    kind, key = kinds[role, content]
    return {"format": kind} | ({"fields": {key: field}} if field != key else {})


def _of_info(name: str, folder: Path) -> Source:
    """A data set by its name in dataset_info.json, as LLaMA-Factory has them."""
    info = folder / "dataset_info.json"
    try:
        entry = parse_json(read_plain(info))[name]
    except (OSError, UserError):
        raise CannotSay(f"{info} is not here: give the command where it is, or set dataset_dir") from None
    except KeyError:
        raise CannotSay(f"{name} is not in {info}") from None
    columns, tags = dict(entry.get("columns") or {}), entry.get("tags") or {}
    if other := {"ranking", "num_samples", "rejected", "kto_tag", "images", "videos", "audios"} & {*entry, *columns}:
        raise CannotSay(
            f"{name} has {', '.join(sorted(other))}: hecate learns text, from whole files, and not by preferences; leave it out"
        )
    hub = entry.get("hf_hub_url")
    if not (file := entry.get("file_name")) and not hub:
        raise CannotSay(f"{name} is neither a file nor on the Hugging Face Hub: name a file")
    made: Source = {"path": str(folder / file) if file else _of_split(hub, entry.get("split"), entry.get("subset")), "name": name}
    if entry.get("formatting") == "sharegpt":
        made |= _chat(tags.get("role_tag", "from"), tags.get("content_tag", "value"), columns.pop("messages", "conversations"))
    else:
        made["format"] = "text" if set(columns) == {"prompt"} else "alpaca"
    names = {"prompt": "text"} if made["format"] == "text" else _COLUMNS
    fields = made.get("fields", {}) | {names[key]: column for key, column in columns.items() if names.get(key, column) != column}
    return made | ({"fields": fields} if fields else {})


def _unique(sources: list[Source]) -> list[Source]:
    """The sources, of which those that would have the same name get one with a number."""
    seen: Counter[str] = Counter()
    made = []
    for source in sources:
        name = source.get("name") or name_of_source(source["path"])
        seen[name] += 1
        made.append(source if seen[name] == 1 else {**source, "name": f"{name}-{seen[name]}"})
    return made
