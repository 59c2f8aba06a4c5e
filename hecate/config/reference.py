"""The reference of all configuration keys, made from the schema: a page for people, and a JSON schema for their editors."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass, replace
from pathlib import Path
from types import ModuleType, NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from hecate.config import expert_keys, schema
from hecate.config.ranges import MAX_INT
from hecate.config.schema import LEAVES, SECTIONS, Config, DataSource, Leaf
from hecate.config.sections import SETTINGS
from hecate.config.typed import REFERENCE, describe

_SOURCES = ("data.train", "data.eval")
"""keys whose lists may be a single path, too"""
_PRIMITIVES = {bool: "boolean", int: "integer", float: "number", str: "string"}


def meanings() -> dict[str, str]:
    """What every key means, by its dotted name, and every section that has a text; from the docstrings after the schema's fields."""
    found = dict(_meanings(Config, "", _classes(expert_keys) | _classes(schema)))
    for section, module in SETTINGS.items():
        found |= dict(_of_section(module.SETTINGS, section, _classes(module)))
    return found


def _classes(module: ModuleType) -> dict[str, ast.ClassDef]:
    assert module.__file__ is not None
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


def _of_section(cls: type, name: str, classes: dict[str, ast.ClassDef]) -> Iterator[tuple[str, str]]:
    if text := ast.get_docstring(classes[cls.__name__]):
        yield name, " ".join(text.split())
    yield from _meanings(cls, name + ".", classes)


def _meanings(cls: type, prefix: str, classes: dict[str, ast.ClassDef]) -> Iterator[tuple[str, str]]:
    hints = get_type_hints(cls)
    body = classes[cls.__name__].body
    for field, after in zip(body, [*body[1:], None], strict=True):
        if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
            continue
        name = prefix + field.target.id
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            yield name, " ".join(str(after.value.value).split())
        hint = hints[field.target.id]
        if isinstance(hint, type) and is_dataclass(hint):
            yield from _of_section(hint, name, classes)


def json_schema() -> dict[str, Any]:
    """A JSON schema (draft 2020-12) of a configuration file, which editors complete and check keys by.

    What several keys are together is beyond it: hecate checks that when it loads the file.
    """
    texts = meanings()
    root = _object()
    of_section = {"": root}
    for section in SECTIONS:
        outer, _, name = section.rpartition(".")
        of_section[section] = _object() | ({"description": texts[section]} if section in texts else {})
        of_section[outer]["properties"][name] = of_section[section]
    for key, leaf in LEAVES.items():
        section, _, name = key.rpartition(".")
        of_section[section]["properties"][name] = _of_leaf(key, leaf) | {"description": texts[key]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "hecate: configuration of a run", **root}


def _object() -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "properties": {}}


def _of_leaf(key: str, leaf: Leaf) -> dict[str, Any]:
    value = _of_type(leaf.type)
    if leaf.range is not None:
        for place in _numbers(value):
            place["exclusiveMinimum" if leaf.range.low_open else "minimum"] = leaf.range.low
            if leaf.range.high != float("inf"):
                place["exclusiveMaximum" if leaf.range.high_open else "maximum"] = leaf.range.high
    if key in _SOURCES:
        value = {"anyOf": [value, {"type": "string"}, _of_type(DataSource)]}
    if value.get("type") != "string":
        value = {"anyOf": [*value.get("anyOf", [value]), {"type": "string", "pattern": REFERENCE.pattern}]}
    if not leaf.required:
        value["default"] = list(leaf.default) if isinstance(leaf.default, tuple) else leaf.default
    return value


def _of_type(hint: Any) -> dict[str, Any]:
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return {"anyOf": [_of_type(arm) for arm in get_args(hint)]}
    if origin is Literal:
        return {"enum": list(get_args(hint))}
    if origin is tuple:
        item = get_args(hint)[0]
        items = _of_type(item)
        return {"type": "array", "items": {"anyOf": [items, {"type": "string"}]} if is_dataclass(item) else items}
    if is_dataclass(hint):
        assert isinstance(hint, type)
        properties = {name: _of_type(of_field) for name, of_field in get_type_hints(hint).items()}
        required = [item.name for item in fields(hint) if item.default is MISSING]
        return _object() | {"properties": properties, "required": required}
    return {"type": "null" if hint is NoneType else _PRIMITIVES[hint]}


def _numbers(value: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The parts of a schema that are about numbers."""
    if value.get("type") in ("integer", "number"):
        yield value
    for part in value.get("anyOf", []):
        yield from _numbers(part)
    if "items" in value:
        yield from _numbers(value["items"])


def page() -> str:
    """docs/use/configuration.md: a table for each section."""
    texts = meanings()
    lines = [
        "# Which keys does a configuration have?",
        "",
        "These. A file nests them (`lora: {r: 8}`), the command line writes them with dots (`lora.r=8`), and `${key}` repeats another",
        "key's value. The default stands first, then what else may be given unless the meaning says it. A run is resumed with the same",
        "values of all keys but the *free* ones, which do not change what is computed and are marked with a `*`. `hecate schema` prints a",
        "JSON schema, by which an editor completes and checks keys: put `# yaml-language-server: $schema=run.schema.json` at the top of a",
        "file. `hecate schema --page` makes this page from `hecate/config/schema.py` and `expert_keys.py`.",
    ]
    for section in ("", *SECTIONS):
        keys = [key for key in LEAVES if key.rpartition(".")[0] == section]
        lines += ["", f"## {section or 'The run'}", ""]
        if section in texts:
            lines += [_linked(texts[section]), ""]
        lines += ["| key | value | meaning |", "|---|---|---|"]
        lines += [f"| `{key}`{_free(key)} | {_value(LEAVES[key], texts[key])} | {_linked(texts[key])} |" for key in keys]
    return "\n".join(lines) + "\n"


def _linked(meaning: str) -> str:
    """A meaning as a cell of a table, whose pages of docs/ are links from docs/use/."""
    return re.sub(r"docs/(\w+)/(\w+\.md)", lambda page: f"[{page[2]}]({_path(page[1], page[2])})", meaning.replace("|", "\\|"))


def _path(folder: str, page: str) -> str:
    return page if folder == "use" else f"../{folder}/{page}"


def _free(key: str) -> str:
    return "" if LEAVES[key].computes else " *"


def _value(leaf: Leaf, meaning: str) -> str:
    """A key's default, and what else may be given, with its limits; without what its meaning explains by name."""
    default = _default(leaf)
    others = [one for one in _kinds(leaf.type) if one != default.strip("`")]
    others = [] if all(f"{one}: " in meaning for one in others) else others
    limits = leaf.range if leaf.range is None or leaf.range.high < MAX_INT else replace(leaf.range, high=float("inf"))
    return default + (f"; {', '.join(others)}" if others else "") + (f" {limits}" if limits is not None else "")


def _kinds(hint: Any) -> Iterator[str]:
    """What a value may be; null first, so that limits stand behind the number that they are about, and no second kind of switch."""
    for arm in sorted(get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,), key=lambda arm: arm is not NoneType):
        if get_origin(arm) is Literal:
            yield from get_args(arm)
        elif arm is not bool:
            yield "null" if arm is NoneType else describe(arm).removeprefix("an ").removeprefix("a ")


def _default(leaf: Leaf) -> str:
    if leaf.required:
        return "must be given"
    if leaf.default is None:
        return "null"
    if isinstance(leaf.default, tuple):
        return f"`[{', '.join(map(str, leaf.default))}]`"
    return f"`{str(leaf.default).lower() if isinstance(leaf.default, bool) else leaf.default}`"
