"""Adapters of an MoE model's experts with one pair for each expert and projection: what vLLM, SGLang and llama.cpp's converter read.

    ...layers.3.mlp.experts.7.gate_proj.lora_A.weight [r, D]   .lora_B.weight [F, r]     up_proj alike; down_proj [r, F] and [D, r]
    ...layers.3.block_sparse_moe.experts.7.w1.lora_A.weight                              Mixtral in vLLM: w1 gate, w3 up, w2 down

PEFT's own form has one pair for gate and up together (`hecate.adapters.peft.description`). Split, both have copies of its A. Joined, two
different A are stacked, and the rank is doubled.

Shapes: E experts, r rank, D hidden, F ffn, I inputs, O outputs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hecate.adapters.peft.description import PREFIX, LoraDescription, expert_names, experts_paths
from hecate.adapters.peft.targets import without_experts
from hecate.adapters.places import expert_a, expert_b, join_a, join_b
from hecate.errors import UserError

_PARTS = ("gate_proj", "up_proj", "down_proj")
_MIXTRAL = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_NAME = re.compile(rf"{re.escape(PREFIX)}\.(.+\.experts)\.(\d+)\.({'|'.join((*_PARTS, *_MIXTRAL))})\.lora_([AB])\.weight")
_OLD_BLOCK, _BLOCK = ".block_sparse_moe.", ".mlp."
"""what Mixtral's files and vLLM call the block of router and experts, and what transformers 5 and PEFT call it"""


@dataclass(frozen=True)
class Spelling:
    """How servers call the experts' weights of a type of model."""

    block: str
    """the part of a dotted name that stands in the place of `.mlp.`"""
    parts: Mapping[str, str]
    """gate_proj, up_proj, down_proj -> their names"""


PLAIN = Spelling(_BLOCK, {part: part for part in _PARTS})
SPELLINGS = {"mixtral": Spelling(_OLD_BLOCK, {part: name for name, part in _MIXTRAL.items()})}
"""by transformers' model type; PLAIN for all others"""


def is_per_expert(names: Iterable[str]) -> bool:
    """Return whether an adapter's tensors have this form."""
    return any(_NAME.fullmatch(name) for name in names)


def _linears(names: Iterable[str]) -> list[str]:
    """The dotted names of the modules with a pair that are not all experts of a layer."""
    ours = [name for name in names if name.endswith(".lora_A.weight") and not experts_paths([name])]
    return [name.removeprefix(f"{PREFIX}.").removesuffix(".lora_A.weight") for name in ours]


def split_experts(tensors: Mapping[str, Tensor], config: LoraDescription, spelling: Spelling) -> tuple[dict[str, Tensor], LoraDescription]:
    """Return an adapter of PEFT's own form in this one. Its scale is folded into B, so that alpha is r: not all servers read other scales.

    A projection without a pair gets one of zeros, because servers want all three. Routers must not be among the tensors.
    """
    split: dict[str, Tensor] = {}
    paths = experts_paths(tensors)
    of_experts = {name for path in paths for pair in expert_names(path, config.projections).values() for name in pair}
    for path in paths:
        names = expert_names(path, config.projections)
        pairs = {projection: (tensors[name_a], tensors[name_b]) for projection, (name_a, name_b) in names.items()}
        prefix = f"{PREFIX}.{path.replace(_BLOCK, spelling.block)}"
        experts = next(iter(pairs.values()))[0].shape[0] // config.r
        for expert in range(experts):
            for part, (a_rI, b_Or) in _parts_of(pairs, expert, experts).items():
                module = f"{prefix}.{expert}.{spelling.parts[part]}"
                split[f"{module}.lora_A.weight"] = a_rI.contiguous()
                split[f"{module}.lora_B.weight"] = scaled(b_Or, config.scale).contiguous()
    for name, tensor in tensors.items():
        if name not in of_experts:
            split[name] = scaled(tensor, config.scale) if name.endswith(".lora_B.weight") else tensor
    targets = config.target_modules
    linears = _linears(tensors) if isinstance(targets, str) else targets  # servers know no regular expressions
    modules = (*linears, *(spelling.parts[part] for part in _PARTS))
    described = replace(config, alpha=config.r, use_rslora=False, target_modules=tuple(dict.fromkeys(modules)), target_parameters=())
    return split, described


def _parts_of(pairs: Mapping[str, tuple[Tensor, Tensor]], expert: int, experts: int) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of an expert's gate, up and down; zeros where the adapter has none."""
    found = {name: (expert_a(a, expert, experts), expert_b(b, expert, experts)) for name, (a, b) in pairs.items()}
    if "gate_up_proj" in found:
        a_rD, b = found["gate_up_proj"]
        gate_Fr, up_Fr = b.chunk(2)
    else:
        a_rF, b_Dr = found["down_proj"]
        a_rD, gate_Fr = a_rF.new_zeros(len(a_rF), len(b_Dr)), a_rF.new_zeros(a_rF.T.shape)
        up_Fr = gate_Fr
    down = found.get("down_proj") or (a_rD.new_zeros(len(a_rD), len(gate_Fr)), a_rD.new_zeros(a_rD.T.shape))
    return {"gate_proj": (a_rD, gate_Fr), "up_proj": (a_rD, up_Fr), "down_proj": down}


def join_experts(tensors: Mapping[str, Tensor], config: LoraDescription) -> tuple[dict[str, Tensor], LoraDescription]:
    """Return an adapter of this form in PEFT's own, which computes the same. All pairs must have the rank and the scale of `config`.

    Raises:
        UserError: a tensor of an expert is missing, or an expert's pair has another shape than its neighbours'.
    """
    found: dict[str, dict[tuple[int, str, str], Tensor]] = {}
    joined: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if match := _NAME.fullmatch(name):
            # Mixtral's files have an older name of its block; Granite's block has that name in the model, too.
            path = match[1].replace(_OLD_BLOCK, _BLOCK) if match[3] in _MIXTRAL else match[1]
            found.setdefault(path, {})[int(match[2]), _MIXTRAL.get(match[3], match[3]), match[4]] = tensor
        else:
            joined[name] = tensor
    parts = {part for of_layer in found.values() for _, part, _ in of_layer}
    stacks = {path: _stacked(path, of_layer, parts) for path, of_layer in found.items()}
    halves = {"gate_proj", "up_proj"} & parts
    if halves and any(not torch.equal(stack["gate_proj"][0], stack["up_proj"][0]) for stack in stacks.values()):
        joined, stacks, config = _with_both_a(joined, stacks, config)
    projections = ("gate_up_proj",) * bool(halves) + ("down_proj",) * ("down_proj" in parts)
    for path, stack in stacks.items():
        of_projection = {"down_proj": stack.get("down_proj")}
        if halves:
            of_projection["gate_up_proj"] = stack["gate_proj"][0], torch.cat([stack["gate_proj"][1], stack["up_proj"][1]], dim=1)
        for projection, (name_a, name_b) in expert_names(path, projections).items():
            pair = of_projection[projection]
            assert pair is not None
            joined[name_a], joined[name_b] = join_a(pair[0]).contiguous(), join_b(pair[1]).contiguous()
    own = {f"{path}.{expert}.{part}" for path, of_layer in found.items() for expert, _, _ in of_layer for part in (*_PARTS, *_MIXTRAL)}
    modules = without_experts(config.target_modules, {*own, *found}, _linears(joined))
    ends = dict.fromkeys(re.sub(r"^.*?layers\.\d+\.", "", path) for path in found)
    parameters = tuple(f"{end}.{projection}" for end in ends for projection in projections)
    return joined, replace(config, target_modules=modules, target_parameters=parameters)


Stack = dict[str, tuple[Tensor, Tensor]]
"""of one layer's experts, A [E, r, I] and B [E, O, r] by part"""


def _stacked(path: str, of_layer: Mapping[tuple[int, str, str], Tensor], parts: set[str]) -> Stack:
    experts = 1 + max(expert for expert, _, _ in of_layer)  # of an adapter that may be forged: the first that is missing ends each loop
    wanted = set(_PARTS) & (parts | ({"gate_proj", "up_proj"} if parts & {"gate_proj", "up_proj"} else set()))
    stack = {}
    for part in sorted(wanted):
        matrices = []
        for matrix in ("A", "B"):
            missing = next((expert for expert in range(experts) if (expert, part, matrix) not in of_layer), None)
            if missing is not None:
                raise UserError(f"has no tensor {PREFIX}.{path}.{missing}.{part}.lora_{matrix}.weight, but some of expert {experts - 1}")
            tensors = [of_layer[expert, part, matrix] for expert in range(experts)]
            for expert, tensor in enumerate(tensors):
                if tensor.shape != tensors[0].shape:
                    shapes = f"{list(tensor.shape)}, but that of expert 0 {list(tensors[0].shape)}"
                    raise UserError(f"{PREFIX}.{path}.{expert}.{part}.lora_{matrix}.weight has the shape {shapes}")
            matrices.append(torch.stack(tensors))
        stack[part] = matrices[0], matrices[1]
    return stack


def _with_both_a(
    linears: Mapping[str, Tensor], stacks: Mapping[str, Stack], config: LoraDescription
) -> tuple[dict[str, Tensor], dict[str, Stack], LoraDescription]:
    """The same adapter with twice the rank: gate and up have one A, their own two stacked, and what else there is is padded with zeros."""
    rank = config.r
    padded = {name: pad_rank(tensor, 2 * rank, a=".lora_A." in name) if ".lora_" in name else tensor for name, tensor in linears.items()}
    doubled: dict[str, Stack] = {}
    for path, stack in stacks.items():
        a_ErI = torch.cat([stack["gate_proj"][0], stack["up_proj"][0]], dim=1)
        gate_EOr, up_EOr = stack["gate_proj"][1], stack["up_proj"][1]
        nothing_EOr = torch.zeros_like(gate_EOr)
        doubled[path] = {
            "gate_proj": (a_ErI, torch.cat([gate_EOr, nothing_EOr], dim=2)),
            "up_proj": (a_ErI, torch.cat([nothing_EOr, up_EOr], dim=2)),
        }
        if "down_proj" in stack:
            a, b = stack["down_proj"]
            doubled[path]["down_proj"] = pad_rank(a, 2 * rank, a=True), pad_rank(b, 2 * rank, a=False)
    if config.use_rslora:  # alpha / sqrt(2 r) would need an alpha that is no whole number
        doubled = {path: {part: (a, scaled(b, config.scale)) for part, (a, b) in stack.items()} for path, stack in doubled.items()}
        padded = {name: scaled(tensor, config.scale) if name.endswith(".lora_B.weight") else tensor for name, tensor in padded.items()}
        return padded, doubled, replace(config, r=2 * rank, alpha=2 * rank, use_rslora=False)
    return padded, doubled, replace(config, r=2 * rank, alpha=2 * config.alpha)


def scaled(matrix: Tensor, scale: float) -> Tensor:
    """Return scale · matrix, rounded no more than float32 is: in the matrix's own type only if the scale is a power of two."""
    if abs(math.frexp(scale)[0]) == 0.5:
        return scale * matrix
    return scale * matrix.to(torch.promote_types(matrix.dtype, torch.float32))


def pad_rank(matrix: Tensor, rank: int, *, a: bool) -> Tensor:
    """Return A [..., r, I], or B [..., O, r], with rows or columns of zeros up to `rank`: what B A is does not change."""
    missing = rank - matrix.shape[-2 if a else -1]
    return torch.nn.functional.pad(matrix, (0, 0, 0, missing) if a else (0, missing))
