"""Load a configuration from a YAML file and command-line overrides, or raise one error with every problem."""

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass, replace
from typing import Any, get_args

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hecate.config import other_names, yaml_text
from hecate.config.effective import leaves_of
from hecate.config.expert_keys import DEFAULT_EXPERTS, DEFAULT_TOP_K, MoeConfig
from hecate.config.files.dataset_info import dataset_info_source
from hecate.config.files.hub import with_local_paths
from hecate.config.files.paths import name_of_source
from hecate.config.files.presets import run_presets
from hecate.config.problems import UNKNOWN, ConfigError, Problem, did_you_mean, shorten
from hecate.config.rules.implied import with_implied
from hecate.config.rules.keys import check_values
from hecate.config.rules.of_apps import section_rules
from hecate.config.scalars import NULLS
from hecate.config.schema import LEAF_TYPES, REQUIRED, SECTIONS, Config, DataSource
from hecate.config.sections import missing_app
from hecate.config.typed import INVALID, REFERENCE, Report, none_of, read_sources, read_value, unique_pairs
from hecate.config.yaml_text import BadYaml, Mapping, Node, Scalar, parse
from hecate.errors import UserError
from hecate.io.plain_files import open_plain
from hecate.io.strict_yaml import parse_yaml
from hecate.parallel.values.policy_names import FORMER_NAMES, current_name, renamed

_log = logging.getLogger(__name__)

COMMAND_LINE = "command line"
MAX_BYTES = 256 * 1024
_LONGEST_TEXT = 16 * 1024
"""characters of a value with references written out"""
_LENGTHS = ("max_steps", "num_train_epochs")
_SOURCES = ("data.train", "data.eval")
_RECORDS: dict[str, Any] = {key: record for key, hint in LEAF_TYPES.items() for record in get_args(hint) if is_dataclass(record)}
"""keys that are lists of mappings"""
_POLICY = "fssdp.policy"
_UNREAD: dict[str, Any] = {"data.train": ({"path": "data.jsonl"},), "output_dir": "runs/planned"}
"""what stands for required keys that nothing reads"""


def load_config(
    path: str | os.PathLike[str], overrides: Sequence[str] = (), *, claim_output: bool = True, inputs: bool = True, trains: bool = True
) -> Config:
    """Load the configuration of a run from the YAML file at `path`, or from the preset of that name (`hecate.config.files.presets`).

    `${key}` repeats another key's value. Everything is checked, also that the named files exist and that output_dir is free.

    Args:
        overrides: "section.key=value", with the value in YAML. An override replaces the file's value; max_steps and
            num_train_epochs replace each other's.
        claim_output: False on a rank that is not the first, whose output_dir is already in use by its own run.
        inputs: False where nothing is read but sizes: then neither the model's weights nor the data must be there, and data.train and
            output_dir need not be given.
        trains: False where what only a training reads, data.train and lora.init_from, need not be there.

    Raises:
        ConfigError: a UserError with all problems.
    """
    file = _find_file(os.fspath(path))
    report = Report(file)
    given = {key: (node, file) for key, node in _flatten(_root(file), "", file, report)}
    overriding = _read_overrides(overrides, report)
    for key, other in (_LENGTHS, _LENGTHS[::-1]):
        if key in overriding and other not in overriding and not _is_null(overriding[key][0]):
            given.pop(other, None)  # the run gets another length, in whichever unit
    given.update(overriding)

    values = with_implied(_read_values(given, report, inputs=inputs, trains=trains), report.add)
    brought = section_rules()
    for rules in brought:
        values = rules.derived(values, report)
    if not inputs:
        values = {**_UNREAD, **values}
    if values.get("hub") is True:
        values = with_local_paths(values, report.add, may_fetch=claim_output, trains=trains, inputs=inputs)
        for rules in brought:
            values = rules.localised(values)
    for key in (key for key in REQUIRED if key not in values):
        report.add(key, "must be given", f"add it to the file, or {key}=... to the command line")
    tree = _as_omegaconf(values)
    check_values(_resolve(tree, values, report), report.add, claim_output=claim_output, inputs=inputs, trains=trains)
    if report.problems:
        raise ConfigError(report.problems)
    policy = given[_POLICY][0] if _POLICY in given else None
    # Every rank loads the configuration; the one that claims the output, and a dry run, speak for all.
    if isinstance(policy, Scalar) and policy.text in FORMER_NAMES and (claim_output or not inputs):
        _log.warning(f"hecate: {renamed(_POLICY, policy.text)}")

    config = OmegaConf.to_object(tree)
    assert isinstance(config, Config)
    data = replace(config.data, train=_named(config.data.train), eval=_named(config.data.eval))
    lora = replace(config.lora, alpha=float(config.lora.stored_alpha)) if config.lora.gradient_rule != "row_norm" else config.lora
    return replace(config, data=data, lora=lora, moe=_with_defaults(config))


def _read_values(given: dict[str, tuple[Node, str]], report: Report, *, inputs: bool, trains: bool) -> dict[str, Any]:
    """The typed values of keys, or INVALID where one has a problem, which is reported."""
    values: dict[str, Any] = {}
    for key, (node, source) in given.items():
        if key in _SOURCES:
            exist = inputs and (trains or key != "data.train")
            values[key] = _described(read_sources(node, key, source, report), key, report, exist=exist)
        else:
            values[key] = read_value(_current(key, node), LEAF_TYPES[key], key, source, report)
    return values


def _described(sources: Any, key: str, report: Report, *, exist: bool) -> Any:
    """The sources with what LLaMA-Factory's dataset_info.json says of those that name it; INVALID: one has a problem."""
    found = []
    for at, source in enumerate(sources if isinstance(sources, tuple) else ()):
        try:
            found.append(dataset_info_source(source, must_exist=exist))
        except UserError as error:
            what, _, hint = str(error).partition("\n")
            report.add(f"{key}[{at}].path", what, hint)
            return INVALID
    return tuple(found) if isinstance(sources, tuple) else sources


def saved_config(text: str) -> Config:
    """Return the configuration in a checkpoint, as `to_yaml` has written it. Whether the files that it names are there is not checked.

    Keys that this version does not have are left out, and keys that an earlier version did not have get their defaults.

    Raises:
        UserError: it is damaged, or a value refers to something else. None is saved so, and one in a forged checkpoint might put a variable
            of the environment into what is exported.
    """
    try:
        values = leaves_of(parse_yaml(text))
        if referring := [key for key, value in values.items() if "${" in str(value)]:
            raise UserError(f"the configuration in it cannot be read: {shorten(referring[0])} refers to something else, as none is saved")
        if _POLICY in values:
            values[_POLICY] = current_name(values[_POLICY])
        config = OmegaConf.to_object(_as_omegaconf(values))
    except (ValueError, OverflowError, OmegaConfBaseException, AttributeError, TypeError, KeyError) as error:
        raise UserError(f"the configuration in it cannot be read: {str(error).partition(chr(10))[0][:200]}") from error
    assert isinstance(config, Config)
    return config


def _current(key: str, node: Node) -> Node:
    """The node with the name that a policy has now in place of a former one, and an empty list for transformers' `report_to: none`."""
    if key == "report_to":
        items = node.items if isinstance(node, yaml_text.Sequence) else [node]
        none = len(items) == 1 and isinstance(items[0], Scalar) and items[0].text == "none"
        return yaml_text.Sequence([], node.line) if none else node
    return replace(node, text=current_name(node.text)) if key == _POLICY and isinstance(node, Scalar) else node


def _with_defaults(config: Config) -> MoeConfig:
    """Return the section `moe` with `replay` filled in, and num_experts and top_k, unless the base model will provide them."""
    moe = config.moe
    if moe.replay is None and config.fssdp.plan == "replay":
        moe = replace(moe, replay="force")
    if moe.kind.of_moe_base:
        return moe
    experts, top_k = DEFAULT_EXPERTS, DEFAULT_TOP_K
    if config.model.front_end == "megatron":
        from hecate.config.gpt_shape import gpt_shape  # imports numpy, which most runs' launchers do not need

        shape = gpt_shape(config.model.name_or_path)
        experts, top_k = shape.experts, shape.top_k
    num_experts = experts if moe.num_experts is None and moe.allocation is None else moe.num_experts
    counts = num_experts if moe.allocation is None else moe.allocation
    most = max(counts) if isinstance(counts, tuple) else counts
    return replace(
        moe,
        num_experts=num_experts,
        top_k=(most if moe.router.takes_all else top_k) if moe.top_k is None else moe.top_k,
    )


def _find_file(path_or_name: str) -> str:
    """The path of a preset if this is the name of one and of no file; of a run's folder, that of its configuration."""
    of_run = os.path.join(path_or_name, "config.yaml")
    if os.path.isdir(path_or_name) and os.path.isfile(of_run):
        return of_run
    is_path = os.sep in path_or_name or path_or_name.endswith((".yaml", ".yml")) or os.path.exists(path_or_name)
    return path_or_name if is_path else os.fspath(run_presets().get(path_or_name, path_or_name))


def _root(file: str) -> Mapping:
    """Raises ConfigError: as `read_mapping`; or it is a configuration of another trainer, of which it is said what becomes of each key."""
    presets = f"give the path of a YAML file, or one of the presets {', '.join(run_presets())}"
    root = read_mapping(file, missing=presets, empty=f"it must give at least {', '.join(REQUIRED)}")
    unknown = any(isinstance(name, Scalar) and name.text not in (*LEAF_TYPES, *SECTIONS) for name, _ in root.pairs)
    if unknown and (theirs := other_names.whole_file(file)):
        raise ConfigError([Problem(file, "", theirs)])
    return root


def read_mapping(file: str, *, missing: str, empty: str) -> Mapping:
    """Read a YAML file that must hold a mapping.

    Args:
        missing: what to do if there is no such file, for the error text.
        empty: what the file must have, for the error text.

    Raises:
        ConfigError: it cannot be read, or holds something else.
    """

    def refuse(what: str, hint: str = "", line: int | None = None) -> ConfigError:
        return ConfigError([Problem(file, "", what, hint, line)])

    try:
        with open_plain(file) as stream:
            raw = stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        if file.startswith("-"):
            raise refuse("no such file", "write key=value, without signs, after the file's path") from None
        if file.partition("=")[0] in (*LEAF_TYPES, *SECTIONS):
            raise refuse("stands where the configuration must be", "give the configuration or run first, then key=value") from None
        raise refuse("no such file", missing) from None
    except IsADirectoryError:
        raise refuse("is a folder that has no config.yaml", "give the path of a YAML file, or the folder of a run") from None
    except (OSError, ValueError) as error:
        raise refuse(f"cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if len(raw) > MAX_BYTES:
        raise refuse(f"is larger than {MAX_BYTES // 1024} KiB", "give the config file; is this one of data?")
    if b"\0" in raw:
        raise refuse("is a binary file, or UTF-16", "give a YAML file in UTF-8")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise refuse(f"is not UTF-8: byte 0x{raw[error.start]:02x}", "save it as UTF-8", line) from None
    try:
        root = parse(text)
    except BadYaml as bad:
        raise refuse(bad.what, bad.hint, bad.line) from None
    if root is None or (isinstance(root, Scalar) and root.plain and not root.text):
        raise refuse("is empty", empty)
    if not isinstance(root, Mapping) or root.flaw:
        raise refuse("must be a mapping of keys to values", "write lines of the form key: value", root.line)
    return root


def _read_overrides(overrides: Sequence[str], report: Report) -> dict[str, tuple[Node, str]]:
    """Map each overridden key to the node of its value and its source. Overrides with problems are reported and left out."""

    def refuse(key: str, what: str, hint: str = "") -> None:
        report.problems.append(Problem(COMMAND_LINE, key, what, hint))

    given: dict[str, tuple[Node, str]] = {}
    unclosed = 0  # brackets of a value of which the shell has made several words
    for override in overrides:
        if unclosed > 0:
            unclosed += _open_brackets(override)
            continue
        key, equals, text = override.partition("=")
        if not equals or not key:
            bare = override.lstrip("-").replace("-", "_")
            otherwise = "--help lists the options" if override.startswith("-") else "lists are written key=[a,b]"
            hint = f"write {bare}=..." if bare in LEAF_TYPES else other_names.key_hint(bare) or otherwise
            refuse(shorten(override), "must have the form key=value", hint)
            continue
        if key not in LEAF_TYPES and key not in SECTIONS:
            bare = key.lstrip("-+~").replace("-", "_")
            hint = f"write {bare}=... without signs before it" if bare in LEAF_TYPES else other_names.key_hint(bare)
            hint = missing_app(key) or hint or did_you_mean(key, LEAF_TYPES) or ("--help lists the options" if key.startswith("-") else "")
            refuse(key, UNKNOWN, hint)
            continue
        try:
            node = parse(text)
        except BadYaml as bad:
            if (unclosed := _open_brackets(text)) > 0 and override is not overrides[-1]:
                refuse(
                    key,
                    f"ends within its brackets: {shorten(text)}",
                    f"the shell splits words at blanks; put it in quotes: {key}='...'",
                )
                continue
            refuse(key, bad.what, f"put the value in quotes: {key}='\"...\"'")
            continue
        if node is None or not text.strip():
            empty = none_of(LEAF_TYPES[key]) if key in LEAF_TYPES and key not in REQUIRED else ""
            refuse(key, "has no value", f"write {key}={empty} for none" if empty else f"write {key}=VALUE, or leave it out")
        elif isinstance(node, Scalar) and node.plain and node.text != text.strip():
            what = f"YAML reads only {shorten(node.text) or 'nothing'} of {shorten(text)}"
            refuse(key, what, f"put the value in quotes: {key}='\"...\"'")
        else:
            root = Mapping([(Scalar(key, True, 1), node)], 1)
            for leaf, value in _flatten(root, "", COMMAND_LINE, report):
                if leaf in given:
                    refuse(leaf, "given twice on the command line", "keep one of the two")
                given[leaf] = (value, COMMAND_LINE)
    return given


def _open_brackets(text: str) -> int:
    return sum(text.count(bracket) for bracket in "[{") - sum(text.count(bracket) for bracket in "]}")


def _flatten(node: Mapping, prefix: str, source: str, report: Report) -> Iterator[tuple[str, Node]]:
    """Yield (key, node) for every known key below a section. Unknown keys are reported."""
    for name, value in unique_pairs(node, prefix, source, report):
        key = f"{prefix}.{name}" if prefix else name
        line = value.line if source == report.file else None
        report.places[key] = (source, line)
        dotted_in_file = "." in name and source == report.file
        if key in SECTIONS and isinstance(value, Mapping) and not value.flaw:
            yield from _flatten(value, key, source, report)
        elif key in SECTIONS:
            known = ", ".join(leaf.removeprefix(key + ".") for leaf in LEAF_TYPES if leaf.startswith(key + "."))
            report.add(key, "is a section and must hold keys, without anchors or tags", f"its keys are {known}")
        elif key in LEAF_TYPES and not dotted_in_file:
            yield key, value
        else:
            report.add_unknown(key, list(LEAF_TYPES))


def _is_null(node: Node) -> bool:
    return isinstance(node, Scalar) and node.plain and node.text in NULLS


def _as_omegaconf(values: dict[str, Any]) -> DictConfig:
    """Return the valid values as OmegaConf's structured config, with references unresolved."""
    tree: dict[str, Any] = {}
    of_section = {"": tree}
    for section in SECTIONS:
        outer, _, name = section.rpartition(".")
        of_section[section] = of_section[outer][name] = {}
    for key, value in values.items():
        if value is INVALID:
            continue
        if key in _RECORDS:
            value = [OmegaConf.merge(OmegaConf.structured(_RECORDS[key]), record) for record in value]
        section, _, name = key.rpartition(".")
        of_section[section][name] = value
    merged = OmegaConf.merge(OmegaConf.structured(Config), tree)
    assert isinstance(merged, DictConfig)
    return merged


def _resolve(tree: DictConfig, values: dict[str, Any], report: Report) -> dict[str, Any]:
    """Return every key's value with references resolved. Keys with a problem, or that refer to one, are left out."""
    bad = {key for key in REQUIRED if key not in values} | {key for key, value in values.items() if value is INVALID}
    targets = {key: REFERENCE.findall(str(value)) for key, value in values.items() if key not in bad}
    for key in _too_long(values, targets):
        report.add(key, f"what it refers to makes a text of more than {_LONGEST_TEXT} characters", "give the value itself")
        bad.add(key)
    while more := {key for key, names in targets.items() if key not in bad and bad.intersection(names)}:
        bad |= more
    resolved: dict[str, Any] = {}
    for key in LEAF_TYPES:
        if key in bad:
            continue
        try:
            resolved[key] = _plain(OmegaConf.select(tree, key, throw_on_missing=True))
        except OmegaConfBaseException as error:
            report.add(key, str(error).partition("\n")[0], "give the value itself")
    for key, names in targets.items():
        for name in names:
            if key in resolved and resolved.get(name) is None and resolved[key] is not None:
                report.add(key, f"${{{name}}} is null, which is not text", "give the value itself")
    for key in _SOURCES:
        if key in resolved:
            resolved[key] = _named(resolved[key])
    return resolved


def _too_long(values: dict[str, Any], targets: dict[str, list[str]]) -> list[str]:
    """The keys whose values would be too long with their references written out: a few lines can make a text of any length.

    References in a circle are left to OmegaConf, which refuses them.
    """
    referring = {key: names for key, names in targets.items() if names}
    own = {key: len(str(value)) for key, value in values.items()}
    lengths = dict(own)
    for _ in referring:  # a chain has no more links
        lengths |= {key: min(_LONGEST_TEXT + 1, own[key] + sum(lengths.get(name, 0) for name in names)) for key, names in referring.items()}
    return [key for key in referring if lengths[key] > _LONGEST_TEXT]


def _plain(value: Any) -> Any:
    if not OmegaConf.is_config(value):
        return value
    plain = OmegaConf.to_object(value)
    return tuple(plain) if isinstance(plain, list) else plain


def _named(sources: tuple[DataSource, ...]) -> tuple[DataSource, ...]:
    return tuple(source if source.name else replace(source, name=name_of_source(source.path)) for source in sources)
