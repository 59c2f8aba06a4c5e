"""Read a LoRA in PEFT's format, whatever program has written it, as one rank, one scale and, for an MoE model's experts, PEFT's own names.

PEFT lets ranks and scales differ between modules (`rank_pattern`, `alpha_pattern`), and other programs write one pair for each expert
(`hecate.adapters.per_expert`). What is returned computes the same, and is the same bit for bit where nothing differs.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hecate.adapters.config import CONFIG
from hecate.adapters.folder import WEIGHTS, read_adapter_config, read_weights
from hecate.adapters.peft_moe import PREFIX, PeftMoeConfig, expert_names, is_peft_adapter, peft_config_from_json
from hecate.adapters.per_expert import experts_paths, is_per_expert, join_experts, pad_rank, scaled
from hecate.adapters.stacked_experts import is_stacked, unstack_experts
from hecate.errors import UserError
from hecate.io.plain_files import require_plain
from hecate.parallel.expert_kinds import lora_scale

_log = logging.getLogger(__name__)
_COSTLY, _REPEATS = re.compile(r"\)[*+{]|\\[1-9]|\(\?P="), re.compile(r"[*+{]")
_LONGEST_PATTERN, _MOST_REPEATS = 1000, 2
"""of a regular expression in an adapter's description"""


def load_lora(folder: Path) -> tuple[dict[str, Tensor], PeftMoeConfig]:
    """Read an adapter folder. Tensors are on the CPU; whether they are those that a model needs is not checked.

    Raises:
        UserError: a file cannot be read, a key is missing or wrong, the adapter is of another kind, or of an expert a tensor is missing.
    """
    value = read_adapter_config(folder)
    tensors = read_weights(folder)
    try:
        config = peft_config_from_json(_with_listed_modules(value, tensors))
        ranks, alphas = (_pattern(value, name) for name in ("rank_pattern", "alpha_pattern"))
    except UserError as error:
        raise UserError(f"{folder / CONFIG}: {error}") from error
    try:
        if is_stacked(tensors):
            if ranks or alphas:
                raise UserError("rank_pattern and alpha_pattern are not read beside experts in 3-D tensors")
            tensors, config = unstack_experts(tensors, config)
        if ranks or alphas:
            tensors, config = with_one_rank(tensors, config, ranks, alphas)
        if is_per_expert(tensors):
            tensors, config = join_experts(tensors, config)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error
    if config.target_parameters and of_unsloth(value):
        _log.warning(
            "%s: written by unsloth, whose versions before 17 September 2026 trained the experts' B in another order (expert-major).\n"
            "  The file does not say which version it was. If it was an older one, what is read is wrong: compare a few answers.",
            folder,
        )
    return tensors, config


def load_peft_adapter(folder: Path) -> tuple[dict[str, Tensor], PeftMoeConfig]:
    """Read a folder with an adapter of an MoE model's experts (`load_lora`).

    Whether any tensor is missing is checked against the model, in `hecate.adapters.peft_experts`.

    Raises:
        UserError: as `load_lora`; or the adapter is not one of an MoE model's experts.
    """
    tensors, config = load_lora(folder)
    parameters = config.target_parameters
    if not parameters or not all(name.rpartition(".")[2] in ("gate_up_proj", "down_proj") for name in parameters):
        raise UserError(
            f"{folder / CONFIG}: target_parameters are {list(parameters)}: this is not an adapter of an MoE model's experts\n"
            "  they must be an experts module's gate_up_proj, down_proj, or both"
        )
    return tensors, config


def is_lora_adapter(folder: Path) -> bool:
    """Return whether the folder holds a LoRA of linear layers in PEFT's format, and not one of an MoE model's experts."""
    return is_peft_adapter(folder) and not read_adapter_config(folder).get("target_parameters") and not _adapts_experts(folder)


def _adapts_experts(folder: Path) -> bool:
    names = _names(folder)
    return is_per_expert(names) or is_stacked(names)


def of_unsloth(value: Mapping[str, Any]) -> bool:
    """Return whether an adapter_config.json says that unsloth has written it."""
    mapping = value.get("auto_mapping")
    marked = isinstance(mapping, dict) and bool(mapping.get("unsloth_fixed"))
    return marked or str(value.get("base_model_name_or_path")).startswith("unsloth/")


def with_one_rank(
    tensors: Mapping[str, Tensor], config: PeftMoeConfig, ranks: Mapping[str, int], alphas: Mapping[str, int]
) -> tuple[dict[str, Tensor], PeftMoeConfig]:
    """Return an adapter whose modules differ in rank and scale as one with the largest rank: pairs are padded with zeros, and where scales
    differ they are folded into B.

    Args:
        ranks, alphas: PEFT's patterns: the end of a dotted name, as a regular expression, and what its module has in place of the default.

    Raises:
        UserError: a tensor has another rank than its pattern says.
    """
    modules = list(_modules(tensors, config))
    found = {one: (_of(ranks, one.key, config.r), _of(alphas, one.key, config.alpha)) for one in modules}
    if len(chosen := set(found.values()) or {(config.r, config.alpha)}) == 1:
        ((rank, alpha),) = chosen
        return dict(tensors), replace(config, r=rank, alpha=alpha)
    scales = {one: lora_scale(alpha, rank, rslora=config.use_rslora) for one, (rank, alpha) in found.items()}
    largest = max(rank for rank, _ in found.values())
    scale = next(iter(scales.values()))
    alike = len(set(scales.values())) == 1 and float(scale * largest).is_integer()
    result = dict(tensors)
    for one, (rank, _) in found.items():
        a, b = tensors[one.name_a], tensors[one.name_b]
        experts, rest = divmod(a.shape[0], rank)
        if rest or b.shape[1] != a.shape[0] or (not one.flat and experts != 1):
            raise UserError(f"{one.name_a} has the shape {list(a.shape)} and its B {list(b.shape)}, but its rank is {rank} by rank_pattern")
        if one.flat:
            a = pad_rank(a.view(experts, rank, -1), largest, a=True).flatten(0, 1)
            b = torch.nn.functional.pad(b.view(len(b), rank, experts), (0, 0, 0, largest - rank)).flatten(1)
        else:
            a, b = pad_rank(a, largest, a=True), pad_rank(b, largest, a=False)
        result[one.name_a], result[one.name_b] = a.contiguous(), (b if alike else scaled(b, scales[one])).contiguous()
    if any(rank != largest for rank, _ in found.values()):
        _log.warning(
            "ranks differ between modules (rank_pattern): all are padded with zeros to %d, and zeros stay if it is trained on", largest
        )
    return result, replace(config, r=largest, alpha=int(scale * largest) if alike else largest, use_rslora=False)


@dataclass(frozen=True)
class _Module:
    """A module with a pair."""

    name_a: str
    name_b: str
    key: str
    """what PEFT matches patterns with"""
    flat: bool
    """the pair is that of all experts of a layer"""


def _modules(tensors: Mapping[str, Tensor], config: PeftMoeConfig) -> list[_Module]:
    modules, seen = [], set()
    for path in experts_paths(tensors):
        for projection, (name_a, name_b) in expert_names(path, config.projections).items():
            modules.append(_Module(name_a, name_b, f"{path}.{projection}", flat=True))
            seen.add(name_a)
    for name in tensors:
        if name.endswith(".lora_A.weight") and name not in seen:
            path = name.removesuffix(".lora_A.weight")
            modules.append(_Module(name, f"{path}.lora_B.weight", path.removeprefix(f"{PREFIX}."), flat=False))
    for one in modules:
        for name in (one.name_a, one.name_b):
            if name not in tensors:
                raise UserError(f"has no tensor {name}")
    return modules


def _of(pattern: Mapping[str, int], key: str, default: int) -> int:
    return next((value for end, value in pattern.items() if re.match(rf"(.*\.)?({end})$", key)), default)


def _pattern(value: Mapping[str, Any], name: str) -> dict[str, int]:
    pattern = value.get(name) or {}
    if not isinstance(pattern, dict) or not all(type(one) is int and one > 0 for one in pattern.values()):
        raise UserError(f"{name} must be an object of names and whole numbers from 1, not {str(pattern)[:100]}")
    for end in pattern:
        # Some expressions take years on some names: those that repeat what is itself repeated or a choice, or that repeat often.
        if len(end) > _LONGEST_PATTERN or _COSTLY.search(end) or len(_REPEATS.findall(end)) > _MOST_REPEATS:
            raise UserError(f"{name}: {end[:100]!r} repeats a group, or too much\n  give the names' ends themselves")
        try:
            re.compile(end)
        except re.error as error:
            raise UserError(f"{name}: {end[:100]!r} is no regular expression: {error}") from error
    return pattern


def _with_listed_modules(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The configuration; where target_modules is a regular expression, with the last names of the modules that have a pair in its place."""
    if not isinstance(value, dict) or not isinstance(value.get("target_modules"), str):
        return value
    ends = {name.removesuffix(".lora_A.weight").rpartition(".")[2] for name in tensors if name.endswith(".lora_A.weight")}
    return {**value, "target_modules": sorted(ends - {"experts", "base_layer"})}


def _names(folder: Path) -> list[str]:
    """The names of an adapter's tensors, without reading these; none if there is no sound file, about which the reader will complain."""
    try:
        require_plain(folder / WEIGHTS)
        with safe_open(folder / WEIGHTS, "pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError):
        pass
    with suppress(UserError):  # an older adapter_model.bin
        return list(read_weights(folder))
    return []
