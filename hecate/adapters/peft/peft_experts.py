"""Gather the trained pairs of an MoE model's experts into PEFT's adapter format, and load such an adapter into a model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from hecate.adapters.card import how_trained
from hecate.adapters.folder import described_template
from hecate.adapters.mixlora.export import pairs_on_first, refuse_different, with_drawn_digest
from hecate.adapters.mixlora.tensors import require_tensors
from hecate.adapters.peft.lora_folder import load_peft_adapter
from hecate.adapters.peft.peft_moe import (
    PeftMoeConfig,
    expert_a,
    expert_b,
    expert_names,
    join_a,
    join_b,
    linear_names,
    save_peft_adapter,
    saved_name,
)
from hecate.adapters.peft.peft_targets import adapted_linears
from hecate.config import Config, adapter_in, named_model
from hecate.engine.step_plans import EngineConfig
from hecate.errors import UserError
from hecate.kernels.common.ffn import PROJECTIONS
from hecate.model.base import BaseChoice, BaseModel, build_base
from hecate.model.files.load import pick_dtype, resolve_model
from hecate.model.files.load_moe import OwnExperts
from hecate.model.files.memory_check import require_room
from hecate.model.gated_ffn import decoder_layers
from hecate.model.insert import InsertionPlan, insert_experts
from hecate.model.linears import find_linears
from hecate.model.moe_model import MoeModel
from hecate.parallel.cluster.topology import local_topology
from hecate.parallel.planners import POLICIES
from hecate.parallel.values.expert_kinds import LoraShape, kind_written_as
from hecate.parallel.values.units import Unit
from hecate.ranks.ranks import Ranks


def peft_config(config: Config, base: BaseModel) -> PeftMoeConfig:
    """Return the description of the adapter that a run trains. It is made before training."""
    ends = {_end(base, layer.block.experts_path): None for layer in base.own_experts}
    projections = config.moe.kind.projections(config.lora.target_modules)
    routers = {_end(base, layer.block.router_path): None for layer in base.own_experts if config.moe.trains_routers}
    return PeftMoeConfig(
        base_model_name_or_path=named_model(config.model.name_or_path),
        r=config.lora.rank,
        alpha=config.lora.stored_alpha,
        use_rslora=config.lora.use_rslora,
        target_modules=tuple(name for name in config.lora.target_modules if name not in PROJECTIONS),
        target_parameters=tuple(f"{end}.{name}" for end in ends for name in projections),
        modules_to_save=tuple(routers),
        dropout=config.lora.dropout,
        extra={
            "router_aux_loss_coef": config.moe.router_aux_loss_coef,
            "model_dtype": config.model.dtype,
            "training": how_trained(config),
            **described_template(base.chat_template),
        },
    )


def export_peft_adapter(folder: Path, description: PeftMoeConfig, base: BaseModel, moe: MoeModel, ranks: Ranks) -> None:
    """Gather all pairs on rank 0, one layer at a time, and write the adapter there. Every rank must call it."""
    tensors: dict[str, Tensor] = {}
    blocks = {Unit(layer.block.layer): layer.block for layer in base.own_experts}
    for unit, pairs in pairs_on_first(moe, blocks, ranks):
        for projection, (name_a, name_b) in expert_names(blocks[unit].experts_path, tuple(pairs)).items():
            tensors[name_a] = join_a(pairs[projection].a_SrI.detach()).cpu()
            tensors[name_b] = join_b(pairs[projection].b_SOr.detach()).cpu()
    if not ranks.is_first:
        return
    for layer in base.own_experts:
        if (router := moe.routers.get(Unit(layer.block.layer))) is not None:
            tensors[saved_name(layer.block.router_path)] = router.detach()
    for key, lora in moe.attention.items():
        name_a, name_b = linear_names(_linear_path(base, key))
        tensors[name_a], tensors[name_b] = lora.lora_A.detach(), lora.lora_B.detach()
    save_peft_adapter(folder, tensors, with_drawn_digest(description, moe))


def load_peft_into(moe: MoeModel, base: BaseModel, tensors: dict[str, Tensor], where: Path) -> None:
    """Set routers, attention adapters and this rank's owned pairs from an adapter's tensors.

    Raises:
        UserError: a tensor is missing, superfluous or of another shape than the model needs, or is fixed in the model and another there.
    """
    require_tensors(tensors, _shapes(moe, base), where)
    try:
        _set_values(moe, base, tensors)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _set_values(moe: MoeModel, base: BaseModel, tensors: dict[str, Tensor]) -> None:
    blocks = {Unit(layer.block.layer): layer.block for layer in base.own_experts}
    with torch.no_grad():
        for (unit, expert), chunk in moe.engine.shards.named_parameters().items():
            source, block = moe.engine.shards.families[unit].pair_source, blocks[unit]
            pairs = {
                projection: (expert_a(tensors[name_a], expert, block.num_experts), expert_b(tensors[name_b], expert, block.num_experts))
                for projection, (name_a, name_b) in expert_names(block.experts_path, source.projections).items()
            }
            chunk.copy_(source.chunk_of(expert, pairs))
        for unit, router in moe.routers.items():
            router.copy_(tensors[saved_name(blocks[unit].router_path)])
        for key, lora in moe.attention.items():
            name_a, name_b = linear_names(_linear_path(base, key))
            lora.set_pair(tensors[name_a], tensors[name_b])


def begin_with_peft(config: Config, base: BaseModel, moe: MoeModel) -> None:
    """Set all trained pairs and routers to the values of the adapter that `lora.init_from` names. Every rank must call it.

    Raises:
        UserError: the adapter cannot be read, or differs from the configured model, LoRA rank, scale or target modules.
    """
    assert config.lora.init_from is not None
    folder = adapter_in(config.lora.init_from)
    tensors, description = load_peft_adapter(folder)
    configured = peft_config(config, base)
    refuse_different(folder, ("lora.r", description.r, configured.r), ("lora.alpha, scaled", description.scale, configured.scale))
    load_peft_into(moe, base, tensors, folder)


def with_peft_adapter(folder: Path, ranks: Ranks, choice: BaseChoice) -> tuple[BaseModel, MoeModel]:
    """Return the base model with an adapter applied, for evaluation.

    Raises:
        UserError: the adapter or the model cannot be read, one does not fit the other, or memory is too small for the model.
    """
    tensors, description = load_peft_adapter(folder)
    name = choice.name_for(folder, description.base_model_name_or_path)
    source = resolve_model(name)
    if source.gguf_file is None and choice.num_hidden_layers is None:
        require_room(source.folder, pick_dtype(choice.dtype, ranks.device), ranks.device)
    base = build_base(name, choice.dtype, choice.num_hidden_layers, ranks.device, kind_written_as("peft"), choice.attention)
    linears = adapted_linears(description.target_modules, [one.path for one in find_linears(base.model)], folder)
    plan = replace(peft_plan(description, tuple(linears), base.own_experts, folder), kernels=choice.kernels)
    topology = local_topology(ranks.world_size, cuda=ranks.device.type == "cuda")
    moe = insert_experts(base.model, base.own_experts, plan, EngineConfig(POLICIES["full"], topology), ranks.groups)
    load_peft_into(moe, base, tensors, folder)
    return base, moe


def peft_plan(description: PeftMoeConfig, linears: tuple[str, ...], layers: tuple[OwnExperts, ...], where: Path) -> InsertionPlan:
    """Return the plan of the pairs and routers that a model needs for the adapter to be loaded into it.

    Args:
        linears: the dotted names of those that are adapted.

    Raises:
        UserError: the adapter has trained modules other than routers.
    """
    routers = description.modules_to_save
    for name in routers:
        if not all(layer.block.router_path.endswith(f".{name}") for layer in layers):
            raise UserError(f"{where}: modules_to_save has {name}, which is not a router of the base model; only routers are supported")
    halves = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
    projections = tuple(half for name in description.projections for half in halves[name])
    lora = LoraShape(description.r, description.scale, 0.0)
    return InsertionPlan(
        kind=kind_written_as("peft"),
        lora=lora,
        target_modules=(*linears, *projections),
        train_router=bool(routers),
        seed=0,
    )


def _shapes(moe: MoeModel, base: BaseModel) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every tensor of this model's adapter."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in base.own_experts:
        block, source = layer.block, moe.engine.shards.families[layer.unit].pair_source
        sizes = {"gate_up_proj": (block.hidden, 2 * block.ffn), "down_proj": (block.ffn, block.hidden)}
        for projection, (name_a, name_b) in expert_names(block.experts_path, source.projections).items():
            inputs, outputs = sizes[projection]
            rows = block.num_experts * source.lora.rank
            shapes[name_a], shapes[name_b] = (rows, inputs), (outputs, rows)
        if (router := moe.routers.get(Unit(block.layer))) is not None:
            shapes[saved_name(block.router_path)] = tuple(router.shape)
    for key, lora in moe.attention.items():
        name_a, name_b = linear_names(_linear_path(base, key))
        shapes[name_a], shapes[name_b] = tuple(lora.lora_A.shape), tuple(lora.lora_B.shape)
    return shapes


def _linear_path(base: BaseModel, key: tuple[int, str]) -> str:
    layer, module = key
    return f"{decoder_layers(base.model)[0]}.{layer}.{module}"


def _end(base: BaseModel, path: str) -> str:
    """Return the part of a dotted name that follows its decoder layer, such as mlp.experts."""
    return path.removeprefix(f"{decoder_layers(base.model)[0]}.").partition(".")[2]
