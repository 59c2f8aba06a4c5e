"""Adapters of an MoE model's experts with one 3-D tensor for all experts of a projection, as Megatron-Bridge and SGLang have them.

    ...layers.3.mlp.experts.gate_up_proj.lora_A.weight [E, r, D]   .lora_B.weight [2F, r, E] or [E, 2F, r]
    ...layers.3.mlp.experts.down_proj.lora_A.weight    [E, r, F]   .lora_B.weight [D, r, E] or [E, D, r]

gate_proj and up_proj may stand in the place of gate_up_proj. They are read only, as one pair for each expert
(`hecate.adapters.peft.per_expert`).

Shapes: E experts, r rank, D hidden, F ffn, I inputs, O outputs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import Tensor

from hecate.adapters.peft.description import PREFIX, LoraDescription
from hecate.adapters.peft.targets import without_experts
from hecate.errors import UserError

_HALVES = {"gate_up_proj": ("gate_proj", "up_proj")}
_NAME = re.compile(rf"({re.escape(PREFIX)}\..+\.experts)\.(gate_up_proj|gate_proj|up_proj|down_proj)\.lora_([AB])\.weight")


def is_stacked(names: Iterable[str]) -> bool:
    """Return whether an adapter's tensors have this form."""
    return any(_NAME.fullmatch(name) for name in names)


def unstack_experts(tensors: Mapping[str, Tensor], config: LoraDescription) -> tuple[dict[str, Tensor], LoraDescription]:
    """Return an adapter of this form with one pair for each expert. Whether experts are the first or the last axis of B, its shape says.

    Raises:
        UserError: a tensor is missing, or shapes do not fit each other, or they fit both orders of B.
    """
    result = {name: tensor for name, tensor in tensors.items() if not _NAME.fullmatch(name)}
    for path, part in sorted({(match[1], match[2]) for name in tensors if (match := _NAME.fullmatch(name))}):
        name_a, name_b = (f"{path}.{part}.lora_{matrix}.weight" for matrix in "AB")
        for name in (name_a, name_b):
            if name not in tensors:
                raise UserError(f"has no tensor {name}")
        a_ErI, b_EOr = tensors[name_a], _expert_first(name_b, tensors[name_a], tensors[name_b])
        halves = _HALVES.get(part, (part,))
        for expert, (a_rI, b_Or) in enumerate(zip(a_ErI, b_EOr, strict=True)):
            for half, b in zip(halves, b_Or.chunk(len(halves)), strict=True):
                result[f"{path}.{expert}.{half}.lora_A.weight"] = a_rI.contiguous()
                result[f"{path}.{expert}.{half}.lora_B.weight"] = b.contiguous()
    joined = {f"{match[1]}.{match[2]}" for name in tensors if (match := _NAME.fullmatch(name)) and match[2] in _HALVES}
    return result, replace(config, target_modules=without_experts(config.target_modules, joined, ()))


def _expert_first(name_b: str, a_ErI: Tensor, b: Tensor) -> Tensor:
    shapes = f"{name_b} has the shape {list(b.shape)}, and its A {list(a_ErI.shape)}"
    if a_ErI.ndim != 3 or b.ndim != 3:
        raise UserError(f"{shapes}: of all experts of a layer both must have three axes, A [experts, rank, inputs]")
    experts, rank = a_ErI.shape[:2]
    first, last = (b.shape[0], b.shape[2]) == (experts, rank), (b.shape[2], b.shape[1]) == (experts, rank)
    if first == last:
        reason = "fits both orders" if first else "fits neither"
        raise UserError(f"{shapes}: it {reason} of B, [outputs, rank, experts] and [experts, outputs, rank]")
    return b if first else b.permute(2, 0, 1)
