"""Their data sets as items of data.train: lists with paths and types, names of dataset_info.json, names on the hub."""

from __future__ import annotations

import os
from collections import Counter
from glob import glob
from pathlib import Path
from typing import Any

from hecate.apps.convert.answer import KeyAnswer, Theirs, cannot, carry, default, left, off, to_check
from hecate.apps.convert.values import CHANGE_IT, holds_out, surroundings
from hecate.config.files.dataset_info import TAGS
from hecate.config.files.paths import name_of_source
from hecate.config.problems import shorten
from hecate.data.chat.turns import SPEAKERS
from hecate.errors import UserError
from hecate.io.plain_files import read_plain
from hecate.io.strict_json import parse_json

Source = dict[str, Any]
_FIELDS = {"field_instruction": "instruction", "field_input": "input", "field_output": "output", "field_system": "system"}
"""axolotl's names"""
_COLUMNS = {"prompt": "instruction", "query": "input", "response": "output", "system": "system", "history": "history", "tools": "tools"}
"""LLaMA-Factory's"""
_READ = (
    "path id roles roles_to_train train_on_eos field_tools chat_template chat_template_jinja type split name "
    "config data_files field field_messages message_property_mappings message_field_role message_field_content"
)
_KNOWN = {*_READ.split(), *_FIELDS, "ds_type", "trust_remote_code", "preprocess_shards", "columns", "weight"}
_ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
    "shards": ((1,), "hecate reads whole files: name one with those records"),
    "shards_idx": ((), "hecate reads whole files: name one with those records"),
    "revision": (("main",), "name a folder with that revision"),
    "drop_system_message": ((), "take the system turns out of the records"),
    "message_field_training": (("train", "training", "weight", "loss"), "call it train in the records"),
    "message_field_training_detail": (
        ("train_detail", "training_detail"),
        "a turn is learned as a whole, or not: write train in the records",
    ),
    "field_thinking": (("reasoning_content",), "call it reasoning_content in the records"),
    "template_thinking_key": (("reasoning_content",), "give data.chat_template=FILE, a template that reads reasoning_content"),
    "split_thinking": ((), "write the thoughts into reasoning_content of the records"),
    "conversation": ((), "take it out, and name a chat_template"),
    "eot_tokens": ((), "the chat template says what ends a turn; take it out"),
    "temperature": ((), "hecate does not distil; take it out"),
    "logprobs_field": ((), "hecate does not distil; take it out"),
}
"""axolotl's keys of an entry, their values that change nothing beside those that are off, and what to do with others"""
_SHARE = 0.05
_FORMATS = {"alpaca": "alpaca", "completion": "text", "pretrain": "text", "None": None}


class CannotSay(Exception):
    """A data set that hecate cannot read as theirs does; the text says what to do."""


def data_of(name: str, value: Any, theirs: Theirs) -> KeyAnswer:
    """datasets, dataset, dataset_name and the like, and eval_dataset."""
    key = "data.eval" if name.startswith("eval") else "data.train"
    try:
        gives: dict[str, Any] = {key: _unique(_sources(name, value, theirs))}
        checked, note = False, _unchanged(value, gives[key])
        if name == "dataset_name" and holds_out(theirs):
            split = theirs.get("dataset_test_split") or "test"
            if split == (theirs.get("dataset_train_split") or "train") or not (on_hub(value) or _files_here(value, split)):
                gives["data.eval_share"] = _SHARE
                checked, note = (
                    True,
                    f"there are no files of a split {split}, and {_SHARE:.0%} of the samples are held out in its place: {CHANGE_IT}",
                )
            else:
                gives["data.eval"] = _entries(_whole(value, theirs) | {"split": split})
        if tests := _unique(_sources("dataset_mixer test", value, theirs)) if name == "dataset_mixer" else []:
            gives["data.eval"] = tests
        gives |= _template(value, theirs)
    except CannotSay as problem:
        return cannot(str(problem))
    sources = [*gives.get("data.train", ()), *gives.get("data.eval", ())]
    gives |= {"hub": True} if any(on_hub(one["path"]) for one in sources) else {}
    return to_check(gives, note) if checked else carry(gives, note)


def _unchanged(value: Any, sources: list[Source]) -> str:
    """Which keys of axolotl's entries say what hecate does anyway."""
    entries = [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []
    written = {name for source in sources for name in source}
    same = dict.fromkeys(
        name for one in entries for name, given in one.items() if not off(given) and name not in {"path", "type", "weight", *written}
    )
    return f"{', '.join(same)}: nothing else is needed for what they say" if same else ""


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
    return [made for one in value or () for made in _entries({"path": one} if isinstance(one, str) else one)]


def _template(value: Any, theirs: Theirs) -> dict[str, Any]:
    """The chat template that entries of axolotl's name for themselves, which must be the same for all data."""
    entries = [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []
    whole = theirs.get("chat_template_jinja", "chat_template")
    named = [
        one.get("chat_template_jinja") or one.get("chat_template") for one in entries if str(one.get("type")).startswith("chat_template")
    ]
    own = "the tokenizer's own"
    whole, *named = [one if off(one) else own if str(one) == "tokenizer_default" else one for one in (whole, *named)]
    wanted = list(dict.fromkeys([*([] if off(whole) else [whole]), *((whole or own) if off(name) else name for name in named)]))
    if len(wanted) > 1:
        raise CannotSay(
            f"chat_template: all data have one, and these have {', '.join(str(one)[:40] for one in wanted)}: train on one of them"
        )
    if not wanted or wanted[0] in (whole, own):
        return {}
    return dict(surroundings("chat_template", wanted[0], theirs).gives)


def _whole(path: str, theirs: Theirs) -> Source:
    split = theirs.get("dataset_train_split")
    return {"path": path, "config": theirs.get("dataset_config"), "split": None if split == "train" else split}


def _entries(entry: Source) -> list[Source]:
    """An entry of axolotl's or TRL's lists, as an item for each of its files."""
    files = entry.get("data_files")
    if isinstance(files, list) and all(isinstance(one, str) for one in files):
        return [_entry({**entry, "data_files": one}) for one in files]
    return [_entry(entry)]


def _check_entry(path: str, entry: Source) -> None:
    """Raises CannotSay: a key of the entry asks for what hecate's data do not have."""
    given = {key: value for key, value in entry.items() if not off(value)}
    if "[" in (split := str(given.get("split"))):
        raise CannotSay(f"{path}: hecate reads whole files, not {split}: name one with those records, or take split out of their file")
    for key, (same, what_to_do) in _ONLY.items():
        if key in given and given[key] not in same:
            raise CannotSay(f"{path}: {key} {shorten(str(given[key]))}: {what_to_do}")
    eot = entry.get("train_on_eot")
    if eot is not None and eot != (entry.get("train_on_eos") or "turn"):
        raise CannotSay(f"{path}: train_on_eot {eot}: hecate has one mark of a turn's end: write train_on_eos, or take it out")
    if isinstance(entry.get("type"), dict):
        raise CannotSay(f"{path}: type with a prompt of its own: write the prompts into the records, as prompt and completion")
    if not isinstance(entry.get("data_files"), str | None):
        raise CannotSay(f"{path}: data_files: write the files' names as a list, or entries of their own")
    if unread := sorted(given.keys() - _KNOWN - _ONLY.keys() - {"train_on_eot"}):
        raise CannotSay(f"{path}: hecate's data have no such {', '.join(unread)}: see docs/use/data.md, and change their file")


def _check_names(path: str, entry: Source) -> None:
    """Raises CannotSay: a chat's roles or keys have names that hecate does not read."""
    for role, names in (entry.get("roles") or {}).items():
        known = {"developer", "system"} if role == "system" else {name for name, of in SPEAKERS.items() if of == role}
        if others := sorted(map(str, {*([names] if isinstance(names, str) else names)} - known)):
            raise CannotSay(f"{path}: roles {others[0]}: call it {role} in the records; of that hecate knows {', '.join(sorted(known))}")
    mapping = entry.get("message_property_mappings") or {}
    if others := sorted(key for key, name in mapping.items() if key not in ("role", "content") and name != key):
        raise CannotSay(f"{path}: message_property_mappings {others[0]}: call it {others[0]} in the records, not {mapping[others[0]]}")


def _entry(entry: Source) -> Source:
    path, files, kind = str(entry.get("path") or entry.get("id")), entry.get("data_files"), entry.get("type")
    _check_entry(path, entry)
    if files:
        path = f"{path}/{files}" if on_hub(path) else os.path.join(path, files) if os.path.isdir(path) else files
    elif on_hub(path):
        path = _of_split(path, entry.get("split"), entry.get("name") or entry.get("config"))
    if not on_hub(path):
        path = _here(path, str(entry.get("split") or "train"))
    made: Source = {"path": path} | ({} if entry.get("weight") in (None, 1) else {"weight": entry["weight"]})
    kind = str(kind).partition(".")[0].partition(":")[0]
    if kind in ("chat_template", "sharegpt"):
        old = kind == "sharegpt"
        _check_names(path, entry)
        made |= _learned(entry)
        mapping = entry.get("message_property_mappings") or {}
        role = mapping.get("role") or entry.get("message_field_role") or ("from" if old else "role")
        content = mapping.get("content") or entry.get("message_field_content") or ("value" if old else "content")
        chat = _chat(role, content, entry.get("field_messages") or ("conversations" if old else "messages"))
        called = {
            ours: entry[key] for key, ours in {"field_tools": "tools", "field_system": "system"}.items() if entry.get(key, ours) != ours
        }
        fields = chat.get("fields", {}) | {ours: name for ours, name in called.items() if name}
        return made | chat | ({"fields": fields} if fields else {})
    if kind not in _FORMATS:
        raise CannotSay(f"type {kind}: hecate has messages, prompt_completion, alpaca, sharegpt and text (docs/use/data.md)")
    fields = {ours: entry[key] for key, ours in _FIELDS.items() if entry.get(key)} | (
        {"text": entry["field"]} if entry.get("field") else {}
    )
    return made | ({"format": _FORMATS[kind]} if _FORMATS[kind] else {}) | ({"fields": fields} if fields else {})


def _learned(entry: Source) -> Source:
    """Which turns of an entry are learned, and where the mark behind them is, where axolotl's file says other than its defaults."""
    made: Source = {}
    roles, eos = entry.get("roles_to_train"), entry.get("train_on_eos")
    if roles is not None and (names := [SPEAKERS.get(role, role) for role in roles]) != ["assistant"]:
        made["roles_to_train"] = names
    return made | ({} if eos in (None, "turn") else {"train_on_eos": eos})


def _files_here(path: str, split: str) -> str:
    """The files of a split in a folder of this machine, as the library datasets knows them by their names. "": there are none."""
    inside = (f"{path}/{split}", f"{path}/{split}*", f"{path}/data/{split}*")
    return next((one for one in inside if (os.path.isdir(one) if one.endswith(f"/{split}") else glob(one))), "")


def _here(path: str, split: str) -> str:
    """Raises CannotSay: the split is not that of a file, or of a folder."""
    found = _files_here(path, split) if os.path.isdir(path) else ""
    if not found and split != "train":
        raise CannotSay(f"{path}: has no split {split} of its own: name the file with those records, or take split out of their file")
    return found or path


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
    if other := {"ranking", "num_samples", "rejected", "kto_tag", "images", "videos", "audios", "folder", "chosen"} & {
        key for of in (entry, columns) for key, one in of.items() if not off(one)
    }:
        raise CannotSay(
            f"{name} has {', '.join(sorted(other))}: hecate learns text, from whole files, and not by preferences; leave it out"
        )
    hub = entry.get("hf_hub_url")
    if not (file := entry.get("file_name")) and not hub:
        raise CannotSay(f"{name} is neither a file nor on the Hugging Face Hub: name a file")
    made: Source = {
        "path": _here(str(folder / file), str(entry.get("split") or "train"))
        if file
        else _of_split(hub, entry.get("split"), entry.get("subset")),
        "name": name,
    }
    for tag, known in TAGS.items():
        if tags.get(tag, known[0]) not in known and tag not in ("role_tag", "content_tag"):
            raise CannotSay(f"{name}: its {tag} is {tags[tag]}, and hecate reads {' or '.join(known)}: rename it in the file")
    if entry.get("formatting") in ("sharegpt", "openai"):
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
