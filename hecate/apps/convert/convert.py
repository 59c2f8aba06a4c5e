"""Make a recipe of another trainer's configuration, and a table of what becomes of each key."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

from hecate.apps.convert import meanings
from hecate.apps.convert.answer import KeyAnswer, Theirs, cannot, carry, default, left, off
from hecate.apps.convert.datasets import on_hub
from hecate.apps.convert.values import holds_out, number, some_steps
from hecate.config import load_config
from hecate.config.load import MAX_BYTES
from hecate.config.problems import ConfigError, shorten
from hecate.config.schema import LEAVES
from hecate.errors import UserError
from hecate.io.durable import replace_output
from hecate.io.plain_files import read_plain
from hecate.io.strict_yaml import parse_yaml

_OURS = ("model", "data", "lora", "moe", "fssdp")
"""sections of hecate's configurations that no other trainer has as mappings"""
_MARKS = {
    "axolotl": ("base_model", "datasets sequence_len sample_packing adapter lora_target_linear val_set_size num_epochs", 2),
    "LLaMA-Factory": ("model_name_or_path", "finetuning_type stage cutoff_len template lora_target dataset dataset_dir lora_rank", 2),
    "TRL": ("model_name_or_path", "dataset_name use_peft dataset_mixture dataset_mixer max_length per_device_train_batch_size", 1),
}
"""trainer -> a key of all its files, keys of which they have some, and how many"""


def _each(table: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for names, value in table.items() for name in names.split()}


_CONVERT: dict[str, tuple[Callable[[str, Any, Theirs], KeyAnswer], str]] = _each(meanings.CONVERTED)
_SAME: dict[str, str] = {name: key for key, names in meanings.SAME.items() for name in names.split()}
_LEFT, _NOT_SUPPORTED = _each(meanings.LEFT), _each(meanings.NOT_SUPPORTED)


@dataclass(frozen=True)
class Converted:
    trainer: str
    answers: Mapping[str, KeyAnswer]
    """by their keys; one that is not in the file stands in brackets"""
    recipe: Mapping[str, Any]
    """by hecate's dotted keys"""

    @property
    def refused(self) -> list[str]:
        return [key for key, answer in self.answers.items() if answer.kind == "refused"]

    def table(self) -> str:
        """A line for each key, by what becomes of it."""
        lines = []
        for kind in get_args(get_type_hints(KeyAnswer)["kind"]):
            rows = {key: answer.text for key, answer in self.answers.items() if answer.kind == kind}
            width = max(map(len, rows), default=0)
            lines += [f"{kind} ({len(rows)}):", *(f"  {key:<{width}}  {text}" for key, text in rows.items())] if rows else []
        bracketed = any(key.startswith("[") for key in self.answers)
        return "\n".join([*lines, *([f"[key]: not in the file; what {self.trainer} takes then"] if bracketed else [])])


def trainer_of(values: Mapping[Any, Any]) -> str | None:
    """Whose configuration it is, by its keys; None: it has sections of hecate's, or too little of any."""
    if any(section in _OURS and isinstance(value, dict) for section, value in values.items()):
        return None
    found = (name for name, (key, marks, least) in _MARKS.items() if key in values and len(set(marks.split()) & set(values)) >= least)
    return next(found, None)


def convert(file: Path, values: Mapping[str, Any], drop: Collection[str] = ()) -> Converted:
    """Say of each key what becomes of it, and make a recipe of what is carried over.

    Args:
        drop: keys that are left out although they are refused.

    Raises:
        UserError: the file is of no trainer that is known here, or `drop` names a key that is not refused.
    """
    trainer = trainer_of(values)
    if trainer is None:
        keys = "base_model (axolotl), model_name_or_path with finetuning_type (LLaMA-Factory) or with dataset_name (TRL)"
        raise UserError(f"{file}: is neither axolotl's, LLaMA-Factory's nor TRL's by its keys\n  such files have {keys}")
    taken = meanings.defaults(trainer)
    if trainer == "LLaMA-Factory":
        taken |= {"lora_alpha": 2 * number(values.get("lora_rank") or 8), "packing": values.get("stage") == "pt"}
    taken = {key: value for key, value in taken.items() if key not in values and off(values.get(meanings.IN_PLACE.get(key, "")))}
    theirs = Theirs(trainer, {**values, **taken})
    answers = {key if key in values else f"[{key}]": _answer(key, value, theirs) for key, value in theirs.values.items()}
    if "output_dir" not in values:
        answers["[output_dir]"] = carry({"output_dir": f"runs/{file.stem}"})
    if trainer != "axolotl":  # which leaves samples out that are too long, as hecate does
        answers["[samples that are too long]"] = carry({"data.on_bad_sample": "truncate"})
    refusable = {key.strip("[]") for key, answer in answers.items() if answer.kind == "refused"}
    if wrong := sorted(set(drop) - refusable):
        raise UserError(f"--drop {wrong[0]}: no key of that name is refused\n  those that are: {', '.join(sorted(refusable)) or 'none'}")
    answers = {key: left("dropped, as --drop says") if key.strip("[]") in drop else answer for key, answer in answers.items()}
    recipe: dict[str, Any] = {"hub": True} if on_hub(str(theirs.get("base_model", "model_name_or_path"))) else {}
    for answer in answers.values():
        trackers = {*recipe.get("report_to", ()), *answer.gives.get("report_to", ())}
        recipe |= {**answer.gives, **({"report_to": sorted(trackers)} if trackers else {})}
    asks = {"metric_for_best_model", "load_best_model_at_end", "early_stopping_patience"} & recipe.keys()
    if asks and holds_out(theirs) and "eval_steps" not in recipe:
        answers["[eval_steps]"] = some_steps("eval_steps")
        recipe |= answers["[eval_steps]"].gives
    return Converted(trainer, answers, recipe)


def convert_file(file: Path, drop: Collection[str] = ()) -> Converted:
    """`convert` of what is in a file.

    Raises:
        UserError: as `convert`; or it cannot be read, or holds no mapping.
    """
    try:
        values = parse_yaml(read_plain(file, MAX_BYTES).decode("utf-8-sig"))
    except (OSError, UnicodeDecodeError, UserError) as error:
        raise UserError(f"{file}: cannot be read: {str(error).splitlines()[0][:200]}\n  give the YAML file of another trainer") from error
    if not isinstance(values, dict):
        raise UserError(f"{file}: must be a mapping of keys to values\n  give the YAML file of another trainer")
    return convert(file, {str(key): value for key, value in values.items()}, drop)


def write(converted: Converted, file: Path, out: Path) -> None:
    """Write the recipe, and beside it a chat template that it has as a text.

    Raises:
        UserError: a key is refused, the file cannot be written, or the keys do not go together in hecate.
    """
    if converted.refused:
        names = " ".join(f"--drop {key.strip('[]')}" for key in converted.refused)
        raise UserError(f"{file}: {len(converted.refused)} keys are refused, and nothing is written\n  to leave them out: {names}")
    if out.exists():
        raise UserError(f"{out}: exists, and is not written over\n  name a new file")
    tree: dict[str, Any] = {}
    template = out.with_suffix(".jinja")
    try:
        for key, value in converted.recipe.items():
            if key == "data.chat_template" and "{" in value:
                replace_output(template, [value.encode()])
                value = str(template)
            section, _, name = key.rpartition(".")
            (tree.setdefault(section, {}) if section else tree)[name] = value
        notes = [f"# {answer.text}\n" for answer in converted.answers.values() if answer.kind == "to be checked"]
        head = "".join([f"# Made of {converted.trainer}'s {file.name} by hecate convert.\n", *notes])
        text = head + yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
        replace_output(out, [text.encode()])
        load_config(out, claim_output=False, inputs=False)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror or error}") from error
    except ConfigError as error:
        if others := [problem for problem in error.problems if problem.key != "model.name_or_path"]:  # the model may not be here yet
            out.unlink()
            raise ConfigError(others) from error


def instead(file: str) -> str:
    """What to say of a file that is given as a configuration of hecate's, but is another trainer's: the table. "": it is none."""
    try:
        made = convert_file(Path(file))
    except UserError:
        return ""
    return f"is a configuration of {made.trainer}; hecate convert {file} -o RECIPE.yaml makes a recipe of it:\n{made.table()}"


def _answer(key: str, value: Any, theirs: Theirs) -> KeyAnswer:
    name = key.replace("-", "_")
    if name in _CONVERT:
        try:
            return _CONVERT[name][0](name, value, theirs)
        except (AttributeError, TypeError, ValueError, KeyError):  # it is of a form that the trainer has not, either, or not yet
            return cannot("its value has a form that is not known here: write it as the trainer's examples do")
    if name in _SAME or name in LEAVES:
        ours = _SAME.get(name, name)
        of_each = "of each rank, as of each process there; nproc says how many this machine has" if ours == "micro_batch_size" else ""
        return default("nothing is given") if value is None else carry({ours: value}, of_each)
    if value is None and name in {**_LEFT, **_NOT_SUPPORTED}:
        return default("nothing is given")
    if name in _LEFT:
        return left(_LEFT[name])
    if off(value):
        return default("it is off, as in hecate")
    what = f"not supported: {_NOT_SUPPORTED[name]}" if name in _NOT_SUPPORTED else f"{shorten(key)} is not known here; see what it does"
    return cannot(what)
