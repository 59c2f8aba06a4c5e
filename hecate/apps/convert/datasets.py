"""Their data sets as items of data.train: lists with paths and types, names of dataset_info.json, names on the hub."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from hecate.apps.convert.answer import Answer, Theirs, carry, off, refused
from hecate.apps.convert.values import holds_out
from hecate.config.files.paths import name_of_source

Source = dict[str, Any]
_FIELDS = {
    "field_instruction": "instruction prompt",
    "field_input": "input query",
    "field_output": "output response",
    "field_system": "system",
    "history": "history",
    "field_tools": "tools",
}
"""axolotl's names of a field; hecate's, and LLaMA-Factory's where it is another"""
_NO_MATTER = {"path", "type", "split", "name", "data_files", "ds_type", "field_messages", "message_property_mappings", "field", "roles"} | {
    "message_field_role", "message_field_content", "trust_remote_code", "shards", "id", "config", "columns", "weight"
}  # fmt: skip


class CannotSay(Exception):
    """A data set that hecate cannot read as theirs does; the text says what to do."""


def data_of(name: str, value: Any, theirs: Theirs) -> Answer:
    """datasets, dataset, dataset_name and the like, and eval_dataset."""
    key = "data.eval" if name.startswith("eval") else "data.train"
    try:
        if name in ("dataset", "eval_dataset") and isinstance(value, str):
            sources = _of_info([one.strip() for one in value.split(",")], theirs)
        else:
            sources = [_of_entry(one, theirs) for one in _entries(value, theirs)]
        test = {"data.eval": [_of_entry(_test(one), theirs) for one in _entries(value, theirs)]} if _has_test(name, theirs) else {}
    except CannotSay as problem:
        return refused(str(problem))
    gives = {key: _unique(sources), **test}
    found = {**gives, "hub": True} if any(on_hub(one["path"]) for one in [*sources, *test.get("data.eval", [])]) else gives
    return carry(found)


def on_hub(path: str) -> bool:
    """Whether a path can only be a name on the hub."""
    return len(path.split("/")) >= 2 and path[0] not in "./~" and not os.path.exists(path.split("/")[0])


def _entries(value: Any, theirs: Theirs) -> list[Source]:
    if isinstance(value, dict) and "datasets" in value:  # of a mixture
        value = value["datasets"]
    elif isinstance(value, dict):  # names and weights, of which the splits stand beside
        splits = [one for one in theirs.get("dataset_splits") or ["train"] if not one.startswith("test")]
        value = [{"path": path, "split": split, "weight": weight} for path, weight in value.items() for split in splits]
    if isinstance(value, str):
        entry = {"path": value, "config": theirs.get("dataset_config"), "split": theirs.get("dataset_train_split")}
        # With a test split beside it, the whole data set would be trained on.
        value = [entry | ({"split": entry["split"] or "train"} if _has_test("dataset_name", theirs) else {})]
    return [{"path": one} if isinstance(one, str) else one for one in value or ()]


def _has_test(name: str, theirs: Theirs) -> bool:
    return name == "dataset_name" and holds_out(theirs)


def _test(entry: Source) -> Source:
    return {**entry, "split": "test"}


def _of_entry(entry: Source, theirs: Theirs) -> Source:
    """An entry of axolotl's or TRL's lists."""
    path, type_ = entry.get("path") or entry.get("id"), entry.get("type")
    if not isinstance(path, str):
        raise CannotSay("each data set needs a path")
    if entry.get("data_files"):
        files = entry["data_files"]
        path = f"{path}/{files}" if isinstance(files, str) and on_hub(path) else files if isinstance(files, str) else path
    elif on_hub(path):
        path = _of_split(path, entry.get("split"), entry.get("name") or entry.get("config"))
    unknown = entry.keys() - _NO_MATTER - _FIELDS.keys() - {"chat_template"}
    if unknown := {one for one in unknown if not off(entry[one])}:
        raise CannotSay(f"{path}: hecate's data have no {', '.join(sorted(unknown))}: take it out of their file")
    made: Source = {"path": path} | ({} if entry.get("weight") in (None, 1) else {"weight": entry["weight"]})
    return made | _format(type_, entry)


def _of_split(path: str, split: Any, config: Any) -> str:
    """The files of a split on the hub, as `push_to_hub` of the library datasets names them; the whole data set without one."""
    config = None if config == "default" else config
    if split is None and config is None:
        return path
    if "[" in str(split):
        raise CannotSay(f"{path}: hecate reads whole files, not {split}: name one with those records, or take split out of their file")
    return f"{path}/{config or 'data'}/{split or 'train'}-*"


def _format(type_: Any, entry: Source) -> Source:
    """format and fields of a source, from a type of axolotl's."""
    kind = str(type_ or "").partition(".")[0].partition(":")[0]
    fields = {_FIELDS[key].split()[0]: entry[key] for key in _FIELDS if not off(entry.get(key))}
    if isinstance(type_, dict):
        fields |= {_FIELDS[key].split()[0]: type_[key] for key in _FIELDS if not off(type_.get(key))}
        if extra := sorted(key for key in type_ if key not in _FIELDS and not off(type_[key])):
            raise CannotSay(f"a type with {', '.join(extra)}: write the records as messages or prompt and completion")
        return {"format": "alpaca", "fields": fields}
    if kind in ("chat_template", "sharegpt"):
        return _chat(entry, sharegpt=kind == "sharegpt")
    formats = {"alpaca": "alpaca", "alpaca_chat": "alpaca", "completion": "text", "pretrain": "text", "": None}
    if kind not in formats:
        raise CannotSay(f"type {kind}: hecate has messages, prompt_completion, alpaca, sharegpt and text (docs/use/data.md)")
    if kind in ("completion", "pretrain") and not off(entry.get("field")):
        fields["text"] = entry["field"]
    return ({"format": formats[kind]} if formats[kind] else {}) | ({"fields": fields} if fields else {})


def _chat(entry: Source, *, sharegpt: bool) -> Source:
    mapping = entry.get("message_property_mappings") or {}
    role = mapping.get("role") or entry.get("message_field_role") or ("from" if sharegpt else "role")
    content = mapping.get("content") or entry.get("message_field_content") or ("value" if sharegpt else "content")
    kinds = {("role", "content"): ("messages", "messages"), ("from", "value"): ("sharegpt", "conversations")}
    if (role, content) not in kinds:
        raise CannotSay(f"messages with {role} and {content}: hecate reads role and content, or from and value")
    kind, key = kinds[role, content]
    field = entry.get("field_messages") or ("conversations" if sharegpt else "messages")
    return {"format": kind} | ({"fields": {key: field}} if field != key else {})


def _of_info(names: list[str], theirs: Theirs) -> list[Source]:
    """Data sets by their names in dataset_info.json, as LLaMA-Factory has them."""
    folder = Path(str(theirs.get("dataset_dir") or "data"))
    try:
        info = json.loads((folder / "dataset_info.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise CannotSay(f"{folder / 'dataset_info.json'} is not here: give the command where it is, or set dataset_dir") from None
    return [_of_info_entry(name, info, folder) for name in names]


def _of_info_entry(name: str, info: dict[str, Source], folder: Path) -> Source:
    if name not in info:
        raise CannotSay(f"{name} is not in {folder / 'dataset_info.json'}")
    entry = info[name]
    columns, tags = dict(entry.get("columns") or {}), entry.get("tags") or {}
    kinds = {"ranking", "chosen", "rejected", "kto_tag", "images", "videos", "audios"} & {*entry, *columns}
    if kinds:
        raise CannotSay(f"{name} has {', '.join(sorted(kinds))}: hecate learns text, and not by preferences; leave it out")
    if entry.get("num_samples"):
        raise CannotSay(f"{name}: hecate reads whole files, not num_samples; name a file with that many records")
    if not (file := entry.get("file_name")) and not entry.get("hf_hub_url"):
        raise CannotSay(f"{name} is neither a file nor on the Hugging Face Hub: name a file")
    path = str(folder / file) if file else _of_split(entry["hf_hub_url"], entry.get("split"), entry.get("subset"))
    made: Source = {"path": path, "name": name}
    if entry.get("formatting") == "sharegpt":
        roles = {"message_field_role": tags.get("role_tag", "from"), "message_field_content": tags.get("content_tag", "value")}
        chat = _chat({**roles, "field_messages": columns.pop("messages", "conversations")}, sharegpt=True)
        kept = {key: columns[key] for key in ("system", "tools") if key in columns}
        fields = chat.pop("fields", {}) | {key: column for key, column in kept.items() if key != column}
        return made | chat | ({"fields": fields} if fields else {})
    if set(columns) == {"prompt"}:
        return made | {"format": "text"} | ({"fields": {"text": columns["prompt"]}} if columns["prompt"] != "text" else {})
    ours = {names.split()[-1]: names.split()[0] for names in _FIELDS.values()}
    fields = {ours[key]: column for key, column in columns.items() if ours.get(key, column) != column}
    return made | {"format": "alpaca"} | ({"fields": fields} if fields else {})


def max_samples(name: str, value: Any, theirs: Theirs) -> Answer:
    """LLaMA-Factory's limit of each data set: nothing to do where all are shorter."""
    if off(value):
        return Answer("the default already", "all records")
    many = "hecate reads whole files: give it ones with that many records, or --drop max_samples to train on all"
    try:
        counts = [_records(one["path"]) for one in _of_info([one.strip() for one in str(theirs.get("dataset")).split(",")], theirs)]
    except CannotSay:
        return refused(many)
    short = all(count is not None and count <= value for count in counts)
    return Answer("left out", f"no data set has more: {', '.join(map(str, counts))}") if short else refused(many)


def _records(path: str) -> int | None:
    """How many records a file has; None: it is not here, or of another form."""
    try:
        with open(path, encoding="utf-8") as file:
            return len(json.load(file)) if path.endswith(".json") else sum(1 for _ in file) if path.endswith(".jsonl") else None
    except (OSError, ValueError):
        return None


def _unique(sources: list[Source]) -> list[Source]:
    """The sources, of which those that would have the same name get one with a number."""
    seen: Counter[str] = Counter()
    made = []
    for source in sources:
        name = source.get("name") or name_of_source(source["path"])
        seen[name] += 1
        made.append(source if seen[name] == 1 else {**source, "name": f"{name}-{seen[name]}"})
    return made
