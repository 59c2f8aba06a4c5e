"""The effective configuration as text, and the digest of what it computes."""

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import yaml

from hecate.config.scalars import not_text
from hecate.config.schema import Config

_NOT_COMPUTATION = (
    "output_dir",
    "resume",
    "nproc",
    "topology",
    "kernels",
    "model.tensor_parallel",
    "logging_steps",
    "eval_steps",
    "save_steps",
    "save_total_limit",
    "trace",
    "eval",
    "data.eval",
    "fssdp.redundancy",
    "fssdp.shard_size",
    "ray",
)


def to_yaml(config: Config) -> str:
    """Every key with its value, defaults included, as YAML that `load_config` reads back to an equal Config."""
    return yaml.dump(asdict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1_000_000)


def config_hash(config: Config) -> str:
    """SHA-256 (64 hex digits) of the values that define the training computation.

    Left out: where the run writes and runs (output_dir, resume, nproc, topology, ray), with what (kernels), how often it logs, evaluates
    and saves, whether it records a trace, what it evaluates, whether experts are kept twice, and how many ranks share a copy of them.
    """
    text = json.dumps(computation(asdict(config)), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def computation(values: Mapping[str, Any]) -> dict[str, Any]:
    """Of a configuration's values, sections within sections as in its YAML, those that `config_hash` counts."""
    left = copy.deepcopy(dict(values))
    for key in _NOT_COMPUTATION:
        section, _, name = key.rpartition(".")
        (left.get(section, {}) if section else left).pop(name, None)
    return left


_LINE_BREAKS = "\n\r\x85\u2028\u2029"
"""what YAML 1.1 takes for one"""


class _Dumper(yaml.SafeDumper):
    """Quotes what `scalars` would not take for text, and what any YAML 1.1 reader would not."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # Single quotes would fold a line break into a blank; double quotes escape it.
    breaks = any(line_break in text for line_break in _LINE_BREAKS)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if not_text(text) or breaks else None)


_Dumper.add_representer(str, _represent_text)
