"""Convert YAML nodes to values of the types that the schema gives their keys. Problems are collected in a `Report`, none is raised."""

import re
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Final, Literal, Union, get_args, get_origin, get_type_hints

from hecate.config import other_names, scalars
from hecate.config.problems import UNKNOWN, Problem, Refused, did_you_mean, shorten
from hecate.config.schema import LEAF_TYPES, SECTIONS, DataSource
from hecate.config.sections import missing_app
from hecate.config.yaml_text import Mapping, Node, Scalar, Sequence

REFERENCE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_.]*)\}")
INVALID: Final = object()
"""A marker in place of a value that has a problem."""

_SCALARS: dict[type, tuple[str, Callable[[str, bool], Any]]] = {
    int: ("an integer", scalars.read_int),
    float: ("a number", scalars.read_float),
    bool: ("true or false", scalars.read_bool),
    str: ("text", scalars.read_text),
}
_MAX_HINTED = 50  # difflib is slow, and a file with more problems than this is no config with typos


@dataclass
class Report:
    """The problems found so far, and the source and line at which each key was given."""

    file: str
    problems: list[Problem] = field(default_factory=list)
    places: dict[str, tuple[str, int | None]] = field(default_factory=dict)
    """Each key, items of lists included, to its source and line."""
    renamed: dict[str, str] = field(default_factory=dict)
    """A key whose value was made of another's, to the other, which is the one that the user knows."""

    def add(self, key: str, what: str, hint: str = "") -> None:
        """Add a problem, located where `key`, or the nearest value that encloses it, was given."""
        key = self.renamed.get(key, key)
        at = key
        while at and at not in self.places:
            at = at[: max(at.rfind("."), at.rfind("["), 0)]
        source, line = self.places.get(at, (self.file, None))
        self.problems.append(Problem(source, key, what, hint, line))

    def add_unknown(self, key: str, known: list[str]) -> None:
        """Add the problem that `key` is not a key, with a hint at the nearest of the `known` ones."""
        hint = missing_app(key) or other_names.key_hint(key) or (did_you_mean(key, known) if len(self.problems) < _MAX_HINTED else "")
        if key in LEAF_TYPES or key in SECTIONS:
            hint = f"in a file, nest it: {key.replace('.', ': {')}: ...{'}' * key.count('.')}"
        self.add(key, UNKNOWN, hint or ("the keys are: " + ", ".join(known) if len(known) < 10 else ""))


def read_value(node: Node, hint: Any, key: str, source: str, report: Report) -> Any:
    """Return the value of `node` as type `hint` (a field's annotation), or INVALID after adding its problems under `key`.

    Text with ${key} is checked to refer to a scalar key and returned unchanged; OmegaConf resolves it later.
    """
    report.places[key] = (source, node.line if source == report.file else None)
    if node.flaw:
        report.add(key, f"{shorten(node.flaw)} is not supported", "write the value out, or use ${key} to repeat one")
        return INVALID
    if isinstance(node, Scalar):
        try:
            return _read_scalar(node, hint)
        except Refused as refused:
            report.add(key, refused.what, other_names.value_hint(key, node.text) or refused.hint)
            return INVALID
    for arm in _arms(hint):
        if isinstance(node, Sequence) and get_origin(arm) is tuple:
            item = get_args(arm)[0]
            values = tuple(read_value(n, item, f"{key}[{i}]", source, report) for i, n in enumerate(node.items))
            return INVALID if any(value is INVALID for value in values) else values
        if isinstance(node, Mapping) and is_dataclass(arm):
            return _read_record(node, arm, key, source, report)
    got = "a list" if isinstance(node, Sequence) else "a mapping"
    report.add(key, f"must be {describe(hint)}, got {got}", "quote it if it is text" if str in _arms(hint) else "")
    return INVALID


def read_sources(node: Node, key: str, source: str, report: Report) -> Any:
    """Return data.train or data.eval, which is a path or a list of paths and mappings, as a tuple of dicts of DataSource's fields."""
    if not isinstance(node, Sequence) and not (isinstance(node, Scalar) and node.plain and node.text in scalars.NULLS):
        node = Sequence([node], node.line)
    if isinstance(node, Sequence):
        items: list[Node] = [_path_record(item) if isinstance(item, Scalar) else item for item in node.items]
        node = Sequence(items, node.line, node.flaw)
    return read_value(node, LEAF_TYPES[key], key, source, report)


def describe(hint: Any) -> str:
    """Return a type in words for an error text."""
    if get_origin(hint) is Literal:
        first, *more = get_args(hint)
        return f"one of {', '.join([first, *more])}" if more else f"{first} (the only value)"
    if get_origin(hint) is tuple:
        return "a list"
    if is_dataclass(hint):
        return "a path or a mapping" if hint is DataSource else "a mapping"
    if hint in _SCALARS:
        return _SCALARS[hint][0]
    return " or ".join("null" if arm is NoneType else describe(arm) for arm in _arms(hint))


def none_of(hint: Any) -> str:
    """Return what stands for nothing at all in a value of this type, as YAML; "": nothing does."""
    arms = _arms(hint)
    return "null" if NoneType in arms else "[]" if all(get_origin(arm) is tuple for arm in arms) else ""


def _read_scalar(node: Scalar, hint: Any) -> Any:
    arms = _arms(hint)
    if NoneType in arms and node.plain and node.text in scalars.NULLS:
        return None
    if "${" in node.text:
        _check_references(node.text, whole=str not in arms)
        return node.text
    literal = next((arm for arm in arms if get_origin(arm) is Literal), None)
    if literal is not None:
        text = scalars.read_text(node.text, node.plain)
        if text not in get_args(literal):
            raise Refused(f"must be {describe(hint)}, got {shorten(text)}", did_you_mean(text.lower(), get_args(literal)))
        return text
    scalar = next((arm for arm in arms if arm in _SCALARS), None)
    if scalar is None:
        is_null = node.plain and node.text in scalars.NULLS
        mend = "write [] for an empty one" if is_null else f"write [{shorten(node.text)}]"
        raise Refused(f"must be {describe(hint)}, got {scalars.shown(node.text, node.plain)}", mend)
    try:
        return _SCALARS[scalar][1](node.text, node.plain)
    except Refused as refused:
        if len(arms) > 1:
            wanted = f"must be {describe(hint)}"
            raise Refused(refused.what.replace(f"must be {describe(scalar)}", wanted, 1), refused.hint) from None
        raise


def _read_record(node: Mapping, cls: Any, key: str, source: str, report: Report) -> Any:
    hints = get_type_hints(cls)
    record: dict[str, Any] = {}
    valid = True
    for name, value in unique_pairs(node, key, source, report):
        if name not in hints:
            report.places[f"{key}.{name}"] = (source, value.line if source == report.file else None)
            report.add_unknown(f"{key}.{name}", [f"{key}.{known}" for known in hints])
            valid = False
        else:
            record[name] = read_value(value, hints[name], f"{key}.{name}", source, report)
            valid = valid and record[name] is not INVALID
    for item in fields(cls):
        if item.default is MISSING and item.name not in record:
            report.add(f"{key}.{item.name}", "must be given")
            valid = False
    return record if valid else INVALID


def unique_pairs(node: Mapping, key: str, source: str, report: Report) -> list[tuple[str, Node]]:
    """Return the mapping's keys as text, with their values. Keys given twice or that are not names are reported and left out."""
    first: dict[str, int] = {}
    pairs = []
    for name, value in node.pairs:
        text = name.text if isinstance(name, Scalar) else "(a list or mapping)"
        full = f"{key}.{text}" if key else text
        line = name.line if source == report.file else None
        if not isinstance(name, Scalar) or name.flaw or not text or text == "<<":
            hint = "keys are plain names; merge keys, tags and aliases are not supported"
            report.problems.append(Problem(source, full, "is not the name of a key", hint, line))
        elif text in first:
            what = "given twice" if line is None else f"given twice, first in line {first[text]}"
            report.problems.append(Problem(source, full, what, "keep one of the two", line))
        else:
            first[text] = name.line
            pairs.append((text, value))
    return pairs


def _path_record(item: Scalar) -> Node:
    return Mapping([(Scalar("path", True, item.line), item)], item.line)


def _arms(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _check_references(text: str, whole: bool) -> None:
    names = REFERENCE.findall(text)
    if "${oc.env:" in text or "${env:" in text:
        what = "environment variables are not supported: a secret would end up in the saved config"
        raise Refused(what, "write the value itself")
    if len(names) != text.count("${") or "\\$" in text:
        hint = "only ${key} with a key of this config is supported: no resolver, no nesting, no escape"
        raise Refused(f"cannot read {shorten(text)}", hint)
    for name in names:
        if name not in LEAF_TYPES:
            raise Refused(f"${{{shorten(name)}}} refers to no key", did_you_mean(name, LEAF_TYPES))
        if all(get_origin(arm) is tuple for arm in _arms(LEAF_TYPES[name])):
            raise Refused(f"${{{name}}} refers to a list", "only single values can be repeated")
    if whole and not REFERENCE.fullmatch(text):
        raise Refused(f"must be one ${{key}} alone or a plain value, got {shorten(text)}")
