"""Write the effective configuration as YAML, and compare it with a saved one."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import yaml

from hecate.config.scalars import not_text
from hecate.config.schema import LEAVES, MEGATRON_EP, Config


def to_yaml(config: Config) -> str:
    """Return every key with its value, defaults included, as YAML that `load_config` reads back to an equal Config."""
    return yaml.dump(asdict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1_000_000)


@dataclass(frozen=True)
class Change:
    """A key whose value differs between a saved configuration and this one."""

    key: str
    then: Any
    now: Any


_LONGEST = 200
"""characters of a value in an error: a checkpoint may have been forged"""
NAMES_OF_BASE = ("model.name_or_path", "model.tokenizer")
"""the keys that name the files of the base model"""


def changed_computation(then: Mapping[str, Any], config: Config, *, same_base: bool = False) -> list[Change]:
    """Return the keys whose values make `config` compute something else than a saved configuration, sorted by name.

    A key that the saved configuration lacks, because an earlier version wrote it, counts as its default. Data paths are not
    compared: the data stream compares the samples themselves, and with them how they are tokenized.

    Args:
        then: the saved configuration as nested mappings, as `to_yaml` writes them.
        same_base: the base model is known to be the same, so that its files may have other names.
    """
    before, now = leaves_of(then), leaves_of(asdict(config))
    names = [name for name, leaf in LEAVES.items() if leaf.computes and not (same_base and name in NAMES_OF_BASE)] + ["fssdp.policy"]
    values = {name: (_comparable(before.get(name, LEAVES[name].default)), _comparable(now[name])) for name in names}
    policies = values["fssdp.policy"]
    if MEGATRON_EP not in policies:  # all other policies compute the same and differ only in where
        del values["fssdp.policy"]
    return [Change(name, *pair) for name, pair in sorted(values.items()) if pair[0] != pair[1]]


def other_configuration(where: str, changes: Sequence[Change]) -> str:
    """The text that refuses to resume a run from `where`, whose configuration differs by `changes`."""
    return f"{where}: belongs to a run with another configuration; resume continues the same training.\n" + "\n".join(
        f"  {change.key}: {repr(change.then)[:_LONGEST]} then, {repr(change.now)[:_LONGEST]} now" for change in changes[:6]
    )


def leaves_of(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested mappings by their dotted keys, those of keys that there are."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if prefix + name in LEAVES:
            flat[prefix + name] = value
        elif isinstance(value, Mapping):
            flat |= leaves_of(value, f"{prefix}{name}.")
    return flat


def _comparable(value: Any) -> Any:
    return [_comparable(one) for one in value] if isinstance(value, tuple | list) else value


_LINE_BREAKS = "\n\r\x85\u2028\u2029"
"""the characters that YAML 1.1 reads as line breaks"""


class _Dumper(yaml.SafeDumper):
    """A dumper that quotes every text that `scalars` or a YAML 1.1 reader would not read as text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # Single quotes would fold a line break into a blank; double quotes escape it.
    breaks = any(line_break in text for line_break in _LINE_BREAKS)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if not_text(text) or breaks else None)


_Dumper.add_representer(str, _represent_text)
