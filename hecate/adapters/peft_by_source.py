"""Adapters of several sources, trained at once as the experts of FFNs: each is written as a folder of its own, in PEFT's LoRA format.

    adapters/SOURCE/adapter_model.safetensors    base_model.model.model.layers.3.mlp.gate_proj.lora_A.weight [r, D]   .lora_B.weight [F, r]

Any program that reads PEFT's LoRA reads such a folder. Here one folder, or those of several sources, go into the model as experts again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from hecate.adapters.config import CONFIG
from hecate.adapters.export import pairs_on_first, with_drawn_digest
from hecate.adapters.folder import read_adapter, read_adapter_config
from hecate.adapters.peft_moe import PeftMoeConfig, linear_names, peft_config_from_json, save_peft_adapter
from hecate.config import Config, RouterConfig
from hecate.engine.step_plans import EngineConfig
from hecate.errors import UserError
from hecate.model.base import BaseChoice, BaseModel, build_base
from hecate.model.gated_ffn import GatedFfn
from hecate.model.insert import InsertionPlan, insert_experts
from hecate.model.moe_model import MoeModel
from hecate.parallel.expert_kinds import PROJECTIONS, LoraShape, kind_written_as
from hecate.parallel.planners import POLICIES
from hecate.parallel.topology import local_topology
from hecate.ranks.ranks import Ranks


def lora_config(config: Config, base: BaseModel) -> PeftMoeConfig:
    """Return the description that the adapters of a run have in common. It is made before training."""
    names = base.ffns[0].projection_names
    return PeftMoeConfig(
        base_model_name_or_path=config.model.name_or_path,
        r=config.lora.r,
        alpha=config.lora.stored_alpha,
        use_rslora=config.lora.use_rslora,
        target_modules=tuple(names[name] for name in config.moe.kind.projections(config.lora.target_modules)),
        target_parameters=(),
        dropout=config.lora.dropout,
        extra={"model_dtype": config.model.dtype},
    )


def export_by_source(
    folder: Path, sources: Sequence[str], description: PeftMoeConfig, ffns: Sequence[GatedFfn], moe: MoeModel, ranks: Ranks
) -> None:
    """Gather all experts on rank 0, one layer at a time, and write a folder for each source there. Every rank must call it.

    Args:
        sources: the names, in the order of the experts.
        ffns: those of the base model, as they were found.

    Raises:
        UserError: a folder exists, a tensor is not finite, or the disk fails.
    """
    tensors: list[dict[str, Tensor]] = [{} for _ in sources]
    found = {ffn.unit: ffn for ffn in ffns}
    for unit, pairs in pairs_on_first(moe, found, ranks):
        for projection, lora in pairs.items():
            name_a, name_b = _names(found[unit], projection)
            for expert, of_source in enumerate(tensors):
                of_source[name_a] = lora.a_SrI[expert].detach().cpu().contiguous()
                of_source[name_b] = lora.b_SOr[expert].detach().cpu().contiguous()
    if ranks.is_first:
        folder.mkdir(parents=True)
        description = with_drawn_digest(description, moe)
        for source, of_source in zip(sources, tensors, strict=True):
            save_peft_adapter(folder / source, of_source, description)


def is_lora_adapter(folder: Path) -> bool:
    """Return whether the folder holds a LoRA of linear layers in PEFT's format, and not one of an MoE model's experts."""
    value = read_adapter_config(folder)
    return isinstance(value, dict) and value.get("peft_type") == "LORA" and not value.get("target_parameters")


def sources_in(folder: Path) -> list[str]:
    """Return the names of the sources whose adapters the folder holds, sorted; none, if it is no such folder."""
    if (folder / CONFIG).exists() or not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if (path / CONFIG).is_file())


def with_lora_adapters(folders: Sequence[Path], ranks: Ranks, choice: BaseChoice) -> tuple[BaseModel, MoeModel]:
    """Return the base model with these adapters as its experts, in their order, for evaluation. A single one takes all tokens.

    Raises:
        UserError: an adapter or the model cannot be read, one does not fit the other, or the adapters differ in rank, scale or modules.
    """
    read = [read_adapter(folder, peft_config_from_json) for folder in folders]
    description = read[0][1]
    for folder, (_, other) in zip(folders, read, strict=True):
        for key in ("base_model_name_or_path", "r", "scale", "target_modules"):
            if getattr(other, key) != getattr(description, key):
                raise UserError(
                    f"{folder}: {key} is {getattr(other, key)}, but {getattr(description, key)} in {folders[0]}\n"
                    "  adapters are used together only if they are alike; use them one by one"
                )
    name = choice.name or description.base_model_name_or_path
    kind = kind_written_as("mixlora")
    base = build_base(name, choice.dtype, choice.num_hidden_layers, ranks.device, kind, choice.attention)
    own = {theirs: ours for ours, theirs in base.ffns[0].projection_names.items()}
    if unknown := [module for module in description.target_modules if module not in own]:
        raise UserError(
            f"{folders[0]}: adapts {', '.join(unknown)}, which is no part of an FFN of the base model; only {', '.join(own)} can be read"
        )
    modules = tuple(name for name in PROJECTIONS if base.ffns[0].projection_names[name] in description.target_modules)
    plan = InsertionPlan(
        kind=kind,
        experts_per_layer=(len(folders),) * len(base.ffns),
        router=RouterConfig(input="given"),
        lora=LoraShape(description.r, description.scale, 0.0),
        target_modules=modules,
        seed=0,
        kernels=choice.kernels,
    )
    topology = local_topology(ranks.world_size, cuda=ranks.device.type == "cuda")
    moe = insert_experts(base.model, base.found, plan, EngineConfig(POLICIES["full"], topology), ranks.groups)
    for folder, (tensors, _) in zip(folders, read, strict=True):
        _refuse_misfit(folder, tensors, base, modules, description.r)
    with torch.no_grad():
        ffns = {ffn.unit: ffn for ffn in base.ffns}
        for (unit, expert), chunk in moe.engine.shards.named_parameters().items():
            tensors, named = read[expert][0], {projection: _names(ffns[unit], projection) for projection in modules}
            pairs = {projection: (tensors[name_a], tensors[name_b]) for projection, (name_a, name_b) in named.items()}
            chunk.copy_(moe.engine.shards.families[unit].pair_source.chunk_of(expert, pairs))
    return base, moe


def _names(ffn: GatedFfn, projection: str) -> tuple[str, str]:
    return linear_names(f"{ffn.path}.{ffn.projection_names[projection]}")


def _refuse_misfit(folder: Path, tensors: dict[str, Tensor], base: BaseModel, modules: Sequence[str], rank: int) -> None:
    wanted: dict[str, tuple[int, int]] = {}
    for ffn in base.ffns:
        for projection in modules:
            hidden, inner = ffn.shape.hidden, ffn.shape.ffn
            inputs, outputs = (inner, hidden) if projection == "down_proj" else (hidden, inner)
            name_a, name_b = _names(ffn, projection)
            wanted[name_a], wanted[name_b] = (rank, inputs), (outputs, rank)
    for name, shape in wanted.items():
        if name not in tensors:
            raise UserError(f"{folder}: has no tensor {name}, which the base model needs")
        if tuple(tensors[name].shape) != shape:
            raise UserError(f"{folder}: {name} has shape {tuple(tensors[name].shape)}, but the base model needs {shape}")
    if unknown := sorted(set(tensors) - set(wanted)):
        raise UserError(f"{folder}: the tensor {unknown[0]} ({len(unknown)} such) belongs to no weight of the base model")
