"""Read a LoRA in PEFT's format, whatever program has written it, as one rank, one scale and, for an MoE model's experts, PEFT's own names.

PEFT lets ranks and scales differ between modules (`rank_pattern`, `alpha_pattern`), and other programs write one pair for each expert
(`hecate.adapters.peft.per_expert`). What is returned computes the same, and is the same bit for bit where nothing differs.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hecate.adapters.folder import CONFIG, WEIGHTS, peft_type_of, read_adapter_config, read_weights
from hecate.adapters.peft.description import PEFT_TYPE, PREFIX, LoraDescription, expert_names, experts_paths, lora_from_json
from hecate.adapters.peft.per_expert import is_per_expert, join_experts, pad_rank, scaled
from hecate.adapters.peft.stacked_experts import is_stacked, unstack_experts
from hecate.adapters.peft.targets import require_sound
from hecate.adapters.peft.unsloth import grouped_projections, rank_major
from hecate.errors import UserError
from hecate.io.plain_files import require_plain
from hecate.parallel.values.expert_kinds import lora_scale

_log = logging.getLogger(__name__)


def load_lora(folder: Path) -> tuple[dict[str, Tensor], LoraDescription]:
    """Read an adapter folder. Tensors are on the CPU; whether they are those that a model needs is not checked.

    Raises:
        UserError: a file cannot be read, a key is missing or wrong, the adapter is of another kind, or of an expert a tensor is missing.
    """
    value = read_adapter_config(folder)
    tensors = read_weights(folder)
    try:
        config = lora_from_json(_with_listed_modules(value, tensors))
        ranks, alphas = (_pattern(value, name) for name in ("rank_pattern", "alpha_pattern"))
        grouped = grouped_projections(value, config.projections, folder) if config.target_parameters else set()
    except UserError as error:
        raise UserError(f"{folder / CONFIG}: {error}") from error
    try:
        if is_stacked(tensors):
            if ranks or alphas:
                raise UserError("rank_pattern and alpha_pattern are not read beside experts in 3-D tensors")
            tensors, config = unstack_experts(tensors, config)
        pairs = _pairs(tensors, config, ranks, alphas)
        tensors = _checked(tensors, pairs, grouped)
        if ranks or alphas:
            own = _with_rank_of_experts(config, pairs)
            tensors, config = _with_one_rank(tensors, config, pairs) if own is None else (tensors, own)
        if is_per_expert(tensors):
            tensors, config = join_experts(tensors, config)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error
    return tensors, config


def is_lora(folder: Path, *, of_experts: bool) -> bool:
    """Return whether the folder holds a LoRA in PEFT's format: one of an MoE model's experts, or one of linear layers alone.

    Raises:
        UserError: its adapter_config.json cannot be read.
    """
    if peft_type_of(folder) != PEFT_TYPE:
        return False
    names = _names(folder)
    return of_experts == (bool(read_adapter_config(folder).get("target_parameters")) or is_per_expert(names) or is_stacked(names))


@dataclass(frozen=True)
class _Pair:
    """A and B of a module, or of all experts of a layer for one projection."""

    name_a: str
    name_b: str
    rank: int
    alpha: int
    projection: str | None = None
    """of experts; None: the pair is that of one module"""


def _pairs(tensors: Mapping[str, Tensor], config: LoraDescription, ranks: Mapping[str, int], alphas: Mapping[str, int]) -> list[_Pair]:
    """All pairs, each with the rank and the alpha that the description says.

    Args:
        ranks, alphas: PEFT's patterns: the end of a dotted name, as a regular expression, and what its module has in place of the default.

    Raises:
        UserError: one of A and B is missing.
    """
    named: dict[str, tuple[str, str, str | None]] = {}
    for path in experts_paths(tensors):
        for projection, (name_a, name_b) in expert_names(path, config.projections).items():
            named[name_a] = name_b, f"{path}.{projection}", projection
    for name in tensors:
        if name.endswith(".lora_A.weight") and name not in named:
            path = name.removesuffix(".lora_A.weight")
            named[name] = f"{path}.lora_B.weight", path.removeprefix(f"{PREFIX}."), None
    for name_a, (name_b, _, _) in named.items():
        for name in (name_a, name_b):
            if name not in tensors:
                raise UserError(f"has no tensor {name}")
    return [
        _Pair(name_a, name_b, _of(ranks, key, config.r), _of(alphas, key, config.alpha), projection)
        for name_a, (name_b, key, projection) in named.items()
    ]


def _checked(tensors: Mapping[str, Tensor], pairs: Iterable[_Pair], grouped: Collection[str]) -> dict[str, Tensor]:
    """The tensors, those of experts in PEFT's order.

    Args:
        grouped: the projections whose B is grouped by experts.

    Raises:
        UserError: a pair is not of the rank that the description says.
    """
    result = dict(tensors)
    for one in pairs:
        a, b = tensors[one.name_a], tensors[one.name_b]
        shapes = f"{one.name_a} has the shape {list(a.shape)} and its B {list(b.shape)}"
        if a.ndim != 2 or b.ndim != 2:
            raise UserError(f"{shapes}: both must be matrices")
        experts, rest = divmod(a.shape[0], one.rank)
        if rest or not experts or b.shape[1] != a.shape[0] or (one.projection is None and experts != 1):
            raise UserError(f"{shapes}, but its rank is {one.rank}\n  r and rank_pattern of {CONFIG} must say what the tensors have")
        if one.projection in grouped:
            result[one.name_b] = rank_major(b, experts)
    return result


def with_one_rank(tensors: Mapping[str, Tensor], config: LoraDescription) -> tuple[dict[str, Tensor], LoraDescription]:
    """Return an adapter whose experts may have a rank of their own as one that has one rank, and computes the same."""
    return _with_one_rank(tensors, config, _pairs(tensors, config, dict.fromkeys(config.target_parameters, config.rank_of_experts), {}))


def _with_rank_of_experts(config: LoraDescription, pairs: Sequence[_Pair]) -> LoraDescription | None:
    """The description, if all experts have one rank, all linears another, and all the same alpha; None: ranks differ otherwise."""
    experts, linears = ({(one.rank, one.alpha) for one in pairs if (one.projection is None) == plain} for plain in (False, True))
    if len(experts) != 1 or len(linears) != 1:
        return None
    ((rank, alpha), (others, alpha_of_others)) = *experts, *linears
    if alpha != alpha_of_others or rank == others:
        return None
    return replace(config, r=others, alpha=alpha, expert_r=rank)


def _with_one_rank(
    tensors: Mapping[str, Tensor], config: LoraDescription, pairs: Sequence[_Pair]
) -> tuple[dict[str, Tensor], LoraDescription]:
    """An adapter whose modules differ in rank and scale as one with the largest rank: pairs are padded with zeros, and where scales differ
    they are folded into B.
    """
    if len(chosen := {(one.rank, one.alpha) for one in pairs} or {(config.r, config.alpha)}) == 1:
        ((rank, alpha),) = chosen
        return dict(tensors), replace(config, r=rank, alpha=alpha, expert_r=None)
    scales = {one: lora_scale(one.alpha, one.rank, rslora=config.use_rslora) for one in pairs}
    largest = max(one.rank for one in pairs)
    scale = next(iter(scales.values()))
    alike = len(set(scales.values())) == 1 and float(scale * largest).is_integer()
    result = dict(tensors)
    for one in pairs:
        a, b = tensors[one.name_a], tensors[one.name_b]
        if one.projection is not None:
            experts = a.shape[0] // one.rank
            a = pad_rank(a.view(experts, one.rank, -1), largest, a=True).flatten(0, 1)
            b = torch.nn.functional.pad(b.view(len(b), one.rank, experts), (0, 0, 0, largest - one.rank)).flatten(1)
        else:
            a, b = pad_rank(a, largest, a=True), pad_rank(b, largest, a=False)
        result[one.name_a], result[one.name_b] = a.contiguous(), (b if alike else scaled(b, scales[one])).contiguous()
    if any(one.rank != largest for one in pairs):
        _log.warning(
            "ranks differ between modules (rank_pattern): all are padded with zeros to %d, and zeros stay if it is trained on", largest
        )
    return result, replace(config, r=largest, alpha=int(scale * largest) if alike else largest, use_rslora=False, expert_r=None)


def _of(pattern: Mapping[str, int], key: str, default: int) -> int:
    return next((value for end, value in pattern.items() if re.match(rf"(.*\.)?({end})$", key)), default)


def _pattern(value: Mapping[str, Any], name: str) -> dict[str, int]:
    pattern = value.get(name) or {}
    if not isinstance(pattern, dict) or not all(type(one) is int and one > 0 for one in pattern.values()):
        raise UserError(f"{name} must be an object of names and whole numbers from 1, not {str(pattern)[:100]}")
    for end in pattern:
        require_sound(end, name)
    return pattern


def _with_listed_modules(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The configuration; where target_modules is "all-linear", with the last names of the modules that have a pair in its place.

    PEFT itself writes a list. Which modules are linears, only the model says.
    """
    if not isinstance(value, dict) or str(value.get("target_modules")).lower() != "all-linear":
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
