"""Read a sweep: a YAML file that says which runs there are. See docs/use/sweeps.md for its keys.

Values stay text, as they would stand on the command line: what type a value has, and whether it is allowed, `load_config` says.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from math import prod
from typing import Any

from hecate.apps.sweep.names import LONGEST, run_names
from hecate.config.load import read_mapping
from hecate.config.problems import ConfigError, shorten
from hecate.config.rules.keys import SLUG
from hecate.config.schema import SECTIONS
from hecate.config.typed import INVALID, Report, read_value, unique_pairs
from hecate.config.yaml_text import BadYaml, Mapping, Node, Scalar, parse
from hecate.config.yaml_text import Sequence as List
from hecate.errors import UserError
from hecate.launch.many_runs.sweep import STATE_FOLDER, Sweep, SweepRun, SweepValue

KEYS: dict[str, Any] = {"run": str, "output_dir": str, "jobs": int, "seeds": tuple[int, ...], "set": None, "grid": None, "list": None}
"""the keys of the file; None: a mapping or a list with keys of a configuration"""
MOST_RUNS = 1000
_OWN = {"output_dir": "the sweep gives each run a folder of its own", "resume": "the sweep decides which runs are resumed"}
_SPECIAL = set(",[]{}#:&*!|>'\"%@`\\")


def load_run_sweep(file: str, overrides: Sequence[str] = ()) -> Sweep:
    """Read a sweep file and expand it.

    Args:
        overrides: KEY=VALUE for all runs, which replaces the file's `set`. `output_dir` and `jobs` replace those of the sweep.

    Raises:
        ConfigError: the file cannot be read, or a key of the sweep itself is wrong. Keys and values of the runs are not checked.
        UserError: an override has no =, or gives a key that the sweep varies.
    """
    report = Report(file)
    root = read_mapping(
        file, missing="give the path of a sweep's YAML file (docs/use/sweeps.md)", empty="it must give run, output_dir, and grid or list"
    )
    nodes = _known(root, report)
    given = [_override(text) for text in overrides]
    own = {value.key: value.text for value in given if value.key in ("output_dir", "jobs")}
    run = _typed(nodes, "run", report)
    output_dir = _folder(own["output_dir"]) if "output_dir" in own else _typed(nodes, "output_dir", report)
    jobs = int(own["jobs"]) if own.get("jobs", "").isdecimal() else _typed(nodes, "jobs", report, 1)
    if (isinstance(jobs, int) and jobs < 1) or ("jobs" in own and not own["jobs"].isdecimal()):
        report.add("jobs", "must be an integer >= 1", "")
    seeds = _typed(nodes, "seeds", report, ())
    if seeds is not INVALID and len(set(seeds)) != len(seeds):
        report.add("seeds", "names a seed twice", "give each once")
    fixed = _values(nodes["set"], "set", report) if "set" in nodes else []
    combinations = _combinations(nodes, report)
    if report.problems:
        raise ConfigError(report.problems)

    fixed = _leaves(fixed)
    over = _leaves(value for value in given if value.key not in own)
    varied = {value.key for _, values in combinations for value in _leaves(values)} | ({"seed"} if seeds else set())
    _refuse_varied(file, fixed, varied)
    _refuse_varied("command line", over, varied)
    replaced = {value.key for value in over}
    everywhere = (*(value for value in fixed if value.key not in replaced), *over)
    return Sweep(file, str(run), str(output_dir), int(jobs), tuple(_runs(combinations, seeds, everywhere, str(output_dir))))


def plain_text(node: Node, *, inside: bool = False) -> str:
    """Return a node as text of one line that YAML reads as the same node.

    Args:
        inside: the text will stand in a list or a mapping.
    """
    if isinstance(node, Scalar):
        if not node.plain or (inside and _SPECIAL & set(node.text)):
            return json.dumps(node.text, ensure_ascii=False)
        return node.text or "null"
    if isinstance(node, List):
        return f"[{', '.join(plain_text(item, inside=True) for item in node.items)}]"
    return "{" + ", ".join(f"{plain_text(name, inside=True)}: {plain_text(value, inside=True)}" for name, value in node.pairs) + "}"


def _known(root: Mapping, report: Report) -> dict[str, Node]:
    nodes = {}
    for name, node in unique_pairs(root, "", report.file, report):
        report.places[name] = (report.file, node.line)
        if name in KEYS:
            nodes[name] = node
        else:
            report.add(
                name, "unknown key of a sweep", f"the keys are: {', '.join(KEYS)}; a configuration's keys stand in set, grid or list"
            )
    for name in ("run", "output_dir"):
        if name not in nodes:
            report.add(name, "must be given", "")
    if ("grid" in nodes) == ("list" in nodes):
        report.add("grid", "must be given, or list, and not both", "grid: {KEY: [VALUE, ...]} or list: [{name: ..., KEY: VALUE}, ...]")
    return nodes


def _typed(nodes: dict[str, Node], key: str, report: Report, default: Any = INVALID) -> Any:
    return read_value(nodes[key], KEYS[key], key, report.file, report) if key in nodes else default


def _override(text: str) -> SweepValue:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"command line: {shorten(text)}: must have the form key=value\n  it holds for all runs of the sweep")
    if key == "resume":
        raise UserError(f"command line: resume: {_OWN['resume']}\n  leave it out: the same command goes on with what is not finished")
    return SweepValue(key, value, None)


def _folder(text: str) -> str:
    """The text that an override of output_dir gives. Raises UserError: it gives none."""
    try:
        node = parse(text)
    except BadYaml:
        node = None
    if not isinstance(node, Scalar) or node.flaw or not node.text or (node.plain and node.text in ("null", "~")):
        raise UserError(
            f"command line: output_dir: {shorten(text)}: must be the path of a folder\n  put it in quotes: output_dir='\"my runs: all\"'"
        )
    return node.text


def _values(node: Node, where: str, report: Report) -> list[SweepValue]:
    """The values of a mapping of a configuration's keys."""
    if not isinstance(node, Mapping) or node.flaw:
        report.add(where, "must be a mapping of a configuration's keys to values", "for example {lora.r: 8, max_steps: 100}")
        return []
    found = []
    for key, value in unique_pairs(node, where, report.file, report):
        at = f"{where}.{key}"
        report.places[at] = (report.file, value.line)
        if key in _OWN:
            report.add(at, f"cannot be given: {_OWN[key]}", "leave it out")
        elif flaw := _flaw(value):
            report.add(at, f"{shorten(flaw)} is not supported", "write the value out, or use ${key} to repeat one")
        else:
            found.append(SweepValue(key, plain_text(value), value.line))
    return found


def _leaves(values: Iterable[SweepValue]) -> list[SweepValue]:
    """The values with one for each key in the place of one for a section. What cannot be read stays, for `load_config` to refuse."""
    found = []
    for value in values:
        try:
            node = parse(value.text) if value.key in SECTIONS else None
        except BadYaml:
            node = None
        pairs = node.pairs if isinstance(node, Mapping) and not node.flaw else []
        names = [name.text for name, _ in pairs if isinstance(name, Scalar) and not name.flaw]
        if not pairs or len(set(names)) < len(pairs):
            found.append(value)
        else:
            inner = (SweepValue(f"{value.key}.{name}", plain_text(one), value.line) for name, (_, one) in zip(names, pairs, strict=True))
            found += _leaves(inner)
    return found


def _flaw(node: Node) -> str:
    inner: list[Node] = (
        [] if isinstance(node, Scalar) else node.items if isinstance(node, List) else [n for pair in node.pairs for n in pair]
    )
    return node.flaw or next((flaw for one in inner if (flaw := _flaw(one))), "")


Combination = tuple[str | None, list[SweepValue]]
"""a name, if the file gives one, and values"""


def _combinations(nodes: dict[str, Node], report: Report) -> list[Combination]:
    if "grid" in nodes and "list" not in nodes:
        return [(None, values) for values in _of_grid(nodes["grid"], report)]
    return list(_of_list(nodes["list"], report)) if "list" in nodes and "grid" not in nodes else []


def _of_grid(node: Node, report: Report) -> list[list[SweepValue]]:
    if not isinstance(node, Mapping) or node.flaw or not node.pairs:
        report.add("grid", "must be a mapping of keys to lists of values", "for example {learning_rate: [1e-4, 1e-3], lora.r: [4, 8]}")
        return []
    axes = []
    for key, values in unique_pairs(node, "grid", report.file, report):
        at = f"grid.{key}"
        report.places[at] = (report.file, values.line)
        if key in _OWN:
            report.add(at, f"cannot be given: {_OWN[key]}", "leave it out")
        elif not isinstance(values, List) or not values.items:
            report.add(
                at, "must be a list of values", f"write [{plain_text(values, inside=True)}, ...]" if isinstance(values, Scalar) else ""
            )
        elif flaw := _flaw(values):
            report.add(at, f"{shorten(flaw)} is not supported", "write the values out")
        else:
            axes.append([SweepValue(key, plain_text(item), item.line) for item in values.items])
            texts = [value.text for value in axes[-1]]
            if again := next((text for text in texts if texts.count(text) > 1), None):
                report.add(at, f"has {shorten(again)} twice", "give each value once")
    if prod(map(len, axes)) > MOST_RUNS:
        report.add("grid", f"has {prod(map(len, axes))} combinations, more than {MOST_RUNS}", "give fewer values, or a list")
        return []
    return [list(values) for values in product(*axes)]


def _of_list(node: Node, report: Report) -> Iterator[Combination]:
    if not isinstance(node, List) or node.flaw or not node.items:
        report.add("list", "must be a list of runs", "for example [{name: small, lora.r: 4}, {name: large, lora.r: 16}]")
        return
    names: set[str] = set()
    unnamed: list[set[tuple[str, str]]] = []
    for number, item in enumerate(node.items):
        at = f"list[{number}]"
        report.places[at] = (report.file, item.line)
        name, rest = None, item
        if isinstance(item, Mapping):
            pairs = [(key, value) for key, value in item.pairs if isinstance(key, Scalar) and key.text == "name"]
            rest = Mapping([pair for pair in item.pairs if pair not in pairs], item.line, item.flaw)
            if pairs:
                name = _list_name(pairs[0][1], at, names, report)
        values = _values(rest, at, report)
        if name is None and not values:
            report.add(at, "has neither a name nor values", "for example {name: plain}")
        texts = {(value.key, value.text) for value in values}
        if name is None and texts in unnamed:
            report.add(at, "has the values of an earlier run", "remove it")
        elif name is None:
            unnamed.append(texts)
        yield name, values


def _list_name(node: Node, at: str, names: set[str], report: Report) -> str:
    name = read_value(node, str, f"{at}.name", report.file, report)
    if name is INVALID:
        return ""
    if not SLUG.fullmatch(name) or name.startswith(".") or name.lower() == STATE_FOLDER:
        hint = f"no . at the beginning, and not {STATE_FOLDER}, which is the sweep's own folder"
        report.add(f"{at}.name", f"must be 1 to {LONGEST} of A-Z a-z 0-9 . _ -, got {shorten(name)}", hint)
    if name.lower() in names:
        report.add(f"{at}.name", f"{shorten(name)} is the name of an earlier run", "give each a name of its own")
    names.add(name.lower())
    return str(name)


def _refuse_varied(source: str, values: Sequence[SweepValue], varied: set[str]) -> None:
    for value in values:
        if value.key in varied:
            raise UserError(f"{source}: {value.key}: is one of the keys that the sweep varies\n  leave it out, or remove it from the sweep")


def _runs(combinations: Sequence[Combination], seeds: Sequence[int], fixed: tuple[SweepValue, ...], output_dir: str) -> Iterator[SweepRun]:
    with_seeds = [(name, values, seed) for name, values in combinations for seed in (seeds or (None,))]
    apart = []
    for name, values, seed in with_seeds:
        texts = {"": name} if name is not None else {value.key: value.text for value in values}
        apart.append(texts | ({} if seed is None else {"seed": str(seed)}))
    for (title, values, seed), run_name in zip(with_seeds, run_names(apart), strict=True):
        yield SweepRun(run_name, title, tuple(values), seed, fixed, f"{output_dir.rstrip('/')}/{run_name}")
