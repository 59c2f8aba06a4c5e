"""Gather the trained experts over a model's linears into an adapter (`hecate.adapters.linear_format`), and load one into a model."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from hecate.adapters.card import how_trained
from hecate.adapters.folder import described_template
from hecate.adapters.linear_format import LinearAdapterConfig, load_linear_adapter, pair_names, router_name, save_linear_adapter, user_width
from hecate.adapters.mixlora.export import different_routers, pairs_on_first, refuse_different, with_drawn_digest
from hecate.adapters.mixlora.tensors import require_tensors
from hecate.config import Config, adapter_in, named_model
from hecate.engine.step_plans import EngineConfig
from hecate.errors import UserError
from hecate.experts.linear import MoeLinear
from hecate.model.base import BaseChoice, BaseModel, build_base
from hecate.model.gated_ffn import decoder_layers
from hecate.model.insert import InsertionPlan, insert_experts
from hecate.model.linears import target_linears
from hecate.model.moe_model import MoeModel
from hecate.parallel.cluster.topology import local_topology
from hecate.parallel.planners import POLICIES
from hecate.parallel.values.expert_kinds import ONLY_PROJECTION, LoraShape, kind_written_as
from hecate.parallel.values.units import Unit
from hecate.ranks.ranks import Ranks


def linear_adapter_config(config: Config, base: BaseModel) -> LinearAdapterConfig:
    """Return the description of the adapter that a run trains. It is made before training.

    Raises:
        UserError: a target module is no linear of the model, or the numbers of experts are not for as many layers as it has.
    """
    target_linears(base.linears, config.lora.target_modules, type(base.model).__name__)
    experts_per_layer = config.moe.experts_per_layer(len(decoder_layers(base.model)[1]))
    return LinearAdapterConfig(
        base_model_name_or_path=named_model(config.model.name_or_path),
        r=config.lora.rank,
        alpha=config.lora.stored_alpha,
        use_rslora=config.lora.use_rslora,
        target_modules=config.lora.target_modules,
        experts_per_layer=experts_per_layer,
        top_k=min(config.moe.experts_per_token, *(count for count in experts_per_layer if count)),
        dropout=config.lora.dropout,
        router_aux_loss_coef=config.moe.router_aux_loss_coef,
        router=config.moe.router,
        extra={
            "training": how_trained(config),
            **({"ranks": list(config.lora.r)} if isinstance(config.lora.r, tuple) else {}),
            **described_template(base.chat_template),
        },
    )


def export_linear_adapter(folder: Path, description: LinearAdapterConfig, moe: MoeModel, ranks: Ranks) -> None:
    """Gather all pairs on rank 0, one linear at a time, and write the adapter there. Every rank must call it."""
    description = with_drawn_digest(description, moe)
    tensors: dict[str, Tensor] = {}
    for unit, of_unit in pairs_on_first(moe, sorted(moe.layers), ranks):
        pairs, path = of_unit[ONLY_PROJECTION], path_of(moe.model, unit)
        for expert, (a, b) in enumerate(zip(pairs.a_SrI.detach(), pairs.b_SOr.detach(), strict=True)):
            name_a, name_b = pair_names(path, expert)
            tensors[name_a], tensors[name_b] = a.cpu().clone(), b.cpu().clone()
    if not ranks.is_first:
        return
    tensors |= {name: tensor.detach().cpu().clone() for name, tensor in _replicated(moe).items()}
    save_linear_adapter(folder, tensors, description)


def load_linear_adapter_into(moe: MoeModel, tensors: dict[str, Tensor], where: Path) -> None:
    """Set routers, plain pairs and this rank's owned experts from an adapter's tensors.

    Raises:
        UserError: a tensor is missing, superfluous or of another shape than the model needs, or A is drawn, and is another.
    """
    replicated = _replicated(moe)
    wanted = {name: tuple(tensor.shape) for name, tensor in replicated.items()}
    for unit, layer in moe.layers.items():
        assert isinstance(layer, MoeLinear)
        family = moe.engine.shards.families[unit]
        rank, linear = family.pair_source.lora.rank, layer.linear
        for expert in range(family.num_experts):
            name_a, name_b = pair_names(path_of(moe.model, unit), expert)
            wanted |= {name_a: (rank, linear.in_features), name_b: (linear.out_features, rank)}
    # Earlier versions wrote a router for a single pair, too.
    unread = {router_name(path_of(moe.model, unit)) for unit, layer in moe.layers.items() if not layer.trained_router}
    require_tensors({name: tensor for name, tensor in tensors.items() if name not in unread}, wanted, where)
    with torch.no_grad():
        for name, tensor in _router_tensors(moe).items():
            tensor.copy_(tensors[name])
        for (layer_number, module), lora in moe.attention.items():
            name_a, name_b = pair_names(path_of(moe.model, Unit(layer_number, module)), None)
            lora.set_pair(tensors[name_a], tensors[name_b])
        for (unit, expert), chunk in moe.engine.shards.named_parameters().items():
            name_a, name_b = pair_names(path_of(moe.model, unit), expert)
            pairs = {ONLY_PROJECTION: (tensors[name_a], tensors[name_b])}
            chunk.copy_(moe.engine.shards.families[unit].pair_source.chunk_of(expert, pairs))


def begin_with_linear_adapter(config: Config, base: BaseModel, moe: MoeModel) -> None:
    """Set all that trains to the values of the adapter that `lora.init_from` names. Every rank must call it.

    Raises:
        UserError: the adapter cannot be read, or differs from the configured ranks, scale, target modules, experts or router.
    """
    assert config.lora.init_from is not None
    folder = adapter_in(config.lora.init_from)
    tensors, theirs = load_linear_adapter(folder)
    ours = linear_adapter_config(config, base)
    refuse_different(
        folder,
        ("lora.r", theirs.ranks, ours.ranks),
        ("lora.alpha, scaled", theirs.scale, ours.scale),
        ("lora.target_modules", sorted(theirs.target_modules), sorted(ours.target_modules)),
        ("moe.num_experts", list(theirs.experts_per_layer), list(ours.experts_per_layer)),
        ("moe.top_k", theirs.top_k, ours.top_k),
        ("moe.router", *different_routers(theirs.router, ours.router)),
        ("data.features, whose width is", user_width(tensors), moe.user_width),
    )
    load_linear_adapter_into(moe, tensors, folder)


def with_linear_adapter(folder: Path, ranks: Ranks, choice: BaseChoice) -> tuple[BaseModel, MoeModel]:
    """Return the base model with an adapter applied, for evaluation.

    Raises:
        UserError: the adapter or the model cannot be read, or one does not fit the other.
    """
    tensors, description = load_linear_adapter(folder)
    kind = kind_written_as("linears")
    name = choice.name_for(folder, description.base_model_name_or_path)
    base = build_base(name, choice.dtype, choice.num_hidden_layers, ranks.device, kind, choice.attention)
    layers, made_for = len(decoder_layers(base.model)[1]), len(description.experts_per_layer)
    if layers != made_for:
        raise UserError(f"{folder}: made for {made_for} layers, but the base model has {layers}")
    plan = InsertionPlan(
        kind=kind,
        experts_per_layer=description.experts_per_layer,
        top_k=max(description.experts_per_layer) if description.router.takes_all else description.top_k,
        router=description.router,
        user_width=user_width(tensors),
        lora=LoraShape(description.r, description.scale, 0.0),
        target_modules=description.target_modules,
        seed=0,
        kernels=choice.kernels,
    )
    planner = EngineConfig(POLICIES["full"], local_topology(ranks.world_size, cuda=ranks.device.type == "cuda"))
    moe = insert_experts(base.model, base.found, plan, planner, ranks.groups)
    load_linear_adapter_into(moe, tensors, folder)
    return base, moe


def _replicated(moe: MoeModel) -> dict[str, Tensor]:
    """What every rank has of the adapter, by the tensors' names: what routers have, and plain pairs."""
    named = _router_tensors(moe)
    for (layer, module), lora in moe.attention.items():
        name_a, name_b = pair_names(path_of(moe.model, Unit(layer, module)), None)
        named |= {name_a: lora.lora_A, name_b: lora.lora_B}
    return named


def _router_tensors(moe: MoeModel) -> dict[str, Tensor]:
    """The routers' parameters, and what they keep beside them."""
    named: dict[str, Tensor] = {}
    for unit, router in moe.router_modules.items():
        kept = {**router.trained, **dict(router.named_buffers())}
        named |= {router_name(path_of(moe.model, unit), name): tensor for name, tensor in kept.items()}
    return named


def path_of(model: nn.Module, unit: Unit) -> str:
    """The dotted name of a linear in the base model."""
    return f"{decoder_layers(model)[0]}.{unit.layer}.{unit.place}"
