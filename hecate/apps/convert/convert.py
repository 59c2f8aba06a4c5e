"""Read a configuration of another trainer, and make a recipe of it and a table of what becomes of each key."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hecate.apps.convert import meanings
from hecate.apps.convert.answer import Answer, Theirs, carry, left, off, refused
from hecate.apps.convert.datasets import on_hub
from hecate.config.problems import shorten
from hecate.config.schema import LEAVES, SECTIONS
from hecate.errors import UserError
from hecate.io.durable import replace_output
from hecate.io.strict_yaml import MOST_BYTES, parse_yaml

_OF_AXOLOTL = {"base_model", "sequence_len", "sample_packing", "adapter", "lora_target_linear", "val_set_size", "micro_batch_size"}
_OF_FACTORY = {"finetuning_type", "stage", "cutoff_len", "template", "lora_target", "dataset_dir", "lora_rank", "quantization_bit"}
_OF_TRL = {"dataset_name", "use_peft", "dataset_mixture", "dataset_mixer", "max_length", "max_seq_length", "per_device_train_batch_size"}
_ORDER = ("carried over", "the default already", "left out", "refused")


@dataclass(frozen=True)
class Converted:
    trainer: str
    answers: Mapping[str, Answer]
    """by their keys; one that is not in the file has brackets around it"""
    recipe: Mapping[str, Any]
    """by hecate's dotted keys"""

    @property
    def refused(self) -> list[str]:
        return [key for key, answer in self.answers.items() if answer.kind == "refused"]

    def table(self) -> str:
        """A line for each key, by what becomes of it. In brackets are keys that are not in the file: the trainer's own default."""
        lines = []
        for kind in _ORDER:
            rows = {key: answer.text for key, answer in self.answers.items() if answer.kind == kind}
            width = min(34, max(map(len, rows), default=0))
            lines += [f"{kind} ({len(rows)}):", *(f"  {key:<{width}}  {text}" for key, text in rows.items())] if rows else []
        return "\n".join(lines)


def trainer_of(values: Mapping[Any, Any]) -> str | None:
    """Whose configuration it is, by its keys; None: it has sections of hecate's, or too little of any."""
    keys = set(values)
    if any(isinstance(values[section], dict) for section in keys & {"model", "data", "lora", "moe"} & set(SECTIONS)):
        return None
    if "base_model" in keys and len(keys & _OF_AXOLOTL) >= 2:
        return "axolotl"
    if "model_name_or_path" in keys and len(keys & _OF_FACTORY) >= 2:
        return "LLaMA-Factory"
    return "TRL" if "model_name_or_path" in keys and keys & _OF_TRL else None


def read(file: Path) -> Mapping[str, Any]:
    """The values in a file.

    Raises:
        UserError: it cannot be read, or holds no mapping.
    """
    try:
        raw = file.read_bytes()[: MOST_BYTES + 1]
        values = parse_yaml(raw.decode("utf-8-sig")) if len(raw) <= MOST_BYTES else None
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror or error}\n  give the YAML file of another trainer") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: is not UTF-8\n  save it as UTF-8") from error
    except UserError as error:
        raise UserError(f"{file}: is not YAML: {str(error).splitlines()[0][:200]}") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UserError(f"{file}: must be a mapping of keys to values, of at most 1 MiB\n  give the YAML file of another trainer")
    return values


def convert(file: Path, values: Mapping[str, Any], drop: Collection[str] = ()) -> Converted:
    """Say of each key what becomes of it, and make a recipe of what is carried over.

    Args:
        drop: keys that are left out although they are refused.

    Raises:
        UserError: the file is of no trainer that is known here, or `drop` names a key that is not refused.
    """
    trainer = trainer_of(values)
    if trainer is None:
        raise UserError(
            f"{file}: is neither axolotl's, LLaMA-Factory's nor TRL's by its keys\n"
            "  a file has base_model (axolotl), or model_name_or_path with finetuning_type (LLaMA-Factory) or dataset_name (TRL)"
        )
    theirs = _with_defaults(trainer, file, values)
    answers = {key if key in values else f"[{key}]": _answer(key, value, theirs) for key, value in theirs.values.items()}
    if "output_dir" not in values:
        answers["[output_dir]"] = carry({"output_dir": f"runs/{file.stem}"}, "a run needs one")
    if trainer in meanings.LONG:
        answers["[samples that are too long]"] = carry({"data.on_bad_sample": meanings.LONG[trainer]})
    name = str(theirs.get("base_model", "model_name_or_path"))
    hub = {"hub": True} if on_hub(name) and not Path(name).exists() else {}
    unneeded = sorted(key for key in drop if key not in answers and f"[{key}]" not in answers)
    kept = sorted(key for key in drop if key not in unneeded and answers.get(key, answers.get(f"[{key}]", left(""))).kind != "refused")
    if unneeded or kept:
        why = "is not in the file" if unneeded else "is not refused"
        raise UserError(f"--drop {(unneeded or kept)[0]}: {why}\n  name only keys that the table says are refused")
    dropped = {key: left("dropped, as you say") if key.strip("[]") in drop else answer for key, answer in answers.items()}
    recipe: dict[str, Any] = {}
    for answer in dropped.values():
        for key, value in answer.gives.items():
            recipe[key] = (
                [*recipe[key], *(one for one in value if one not in recipe[key])] if key == "report_to" and key in recipe else value
            )
    return Converted(trainer, dropped, recipe | hub)


def write(converted: Converted, file: Path, out: Path) -> None:
    """Write the recipe, and beside it the chat template that it has as a text.

    Raises:
        UserError: a key is refused, or the file cannot be written.
    """
    if converted.refused:
        names = " ".join(f"--drop {key.strip('[]')}" for key in converted.refused)
        raise UserError(f"{file}: {len(converted.refused)} keys are refused, and nothing is written; with {names} they are left out")
    if out.exists():
        raise UserError(f"{out}: exists; nothing is written over it\n  name a new file")
    recipe, template = dict(converted.recipe), converted.recipe.get("data.chat_template", "")
    try:
        if "{" in template:
            recipe["data.chat_template"] = str(out.with_suffix(".jinja"))
            replace_output(out.with_suffix(".jinja"), [template.encode()])
        head = f"# Made of {converted.trainer}'s {file.name} by hecate convert.\n"
        replace_output(out, [(head + yaml.safe_dump(_nested(recipe), sort_keys=False, allow_unicode=True)).encode()])
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror or error}") from error


def instead(file: str) -> str:
    """What to say of a file that is given as a configuration of hecate's, but is another trainer's: the table. "": it is none."""
    try:
        values = read(Path(file))
    except UserError:
        return ""
    trainer = trainer_of(values)
    if trainer is None:
        return ""
    return f"is a configuration of {trainer}; hecate convert {file} -o RECIPE.yaml makes a recipe of it:\n{convert(Path(file), values).table()}"


def _with_defaults(trainer: str, file: Path, values: Mapping[str, Any]) -> Theirs:
    defaults = dict(meanings.DEFAULTS[trainer])
    one_meaning = {
        "max_length": ("max_seq_length",),
        "lora_target_modules": ("lora_target_parameters",),
        "disable_gradient_checkpointing": ("gradient_checkpointing",),
        "num_epochs": ("num_train_epochs", "max_steps"),
        "num_train_epochs": ("max_steps",),
        "lora_rank": ("lora_r",),
    }
    for key, others in one_meaning.items():
        if any(not off(values.get(other)) and values[other] != -1 for other in others):
            defaults.pop(key, None)
    if trainer == "LLaMA-Factory":
        defaults["lora_alpha"] = 2 * (values.get("lora_rank") or 8)
        defaults["packing"] = values.get("stage") == "pt"
    if trainer == "axolotl" and not {"warmup_steps", "warmup_ratio"} & set(values):
        defaults["warmup_ratio"] = 0.03
    return Theirs(trainer, file, {**values, **{key: value for key, value in defaults.items() if key not in values}}, frozenset(values))


def _answer(key: str, value: Any, theirs: Theirs) -> Answer:
    name = key.replace("-", "_")
    if name in meanings.CONVERT:
        return meanings.CONVERT[name](name, value, theirs)
    if name in meanings.KEYS or name in LEAVES:
        ours = meanings.KEYS.get(name, name)
        if value is None or (off(value) and ours == "data.cache"):
            return Answer("the default already", "nothing is given")
        return carry({ours: value})
    if name in meanings.REASONS:
        return left(meanings.REASONS[name])
    if off(value):
        return Answer("the default already", "it is off, as in hecate")
    if name in meanings.DECIDED:
        return (
            left(meanings.DECIDED[name]) if name.endswith("only_loss") or name == "greater_is_better" else refused(meanings.DECIDED[name])
        )
    if name in meanings.UNSUPPORTED:
        return refused(f"not supported: {meanings.UNSUPPORTED[name]}")
    return refused(f"hecate knows no key {shorten(key)} of {theirs.trainer}'s: say in an issue what it does")


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, last = key.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return tree
