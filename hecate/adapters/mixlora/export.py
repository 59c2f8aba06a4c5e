"""Gather a trained adapter from all ranks into the `mixlora` folder format, and load such an adapter into a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from hecate.adapters import AdapterConfig, attention_tensor_name, expert_tensor_name, load_adapter, router_tensor_name, save_adapter
from hecate.adapters.card import how_trained
from hecate.adapters.folder import described_template
from hecate.adapters.linear_format import LinearAdapterConfig
from hecate.adapters.mixlora.names import router_buffer_name
from hecate.adapters.mixlora.tensors import require_tensors
from hecate.adapters.peft.peft_moe import PeftMoeConfig
from hecate.config import Config, RouterConfig, adapter_in, named_model
from hecate.errors import UserError
from hecate.experts.routers.router import Router
from hecate.kernels.common.low_rank import LowRankPairs
from hecate.model.base import BaseModel
from hecate.model.gated_ffn import decoder_layers
from hecate.model.moe_model import MoeModel
from hecate.parallel.comm.aborts import arrived
from hecate.parallel.comm.collectives import sparse_all_gather
from hecate.parallel.transfer.transfer_plan import plan_chunks
from hecate.parallel.values.expert_kinds import FfnSizes
from hecate.parallel.values.placement import Placement, owners_only
from hecate.parallel.values.units import Unit
from hecate.ranks.ranks import Ranks

_HF_ACTIVATION = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}


def adapter_config(config: Config, base: BaseModel) -> AdapterConfig:
    """Return the adapter's description. It is made before training, so that what the format cannot hold is refused early.

    Raises:
        UserError: a target module is not one of the format's seven.
    """
    num_layers = len(decoder_layers(base.model)[1])
    experts = config.moe.num_experts
    return AdapterConfig(
        base_model_name_or_path=named_model(config.model.name_or_path),
        r=config.lora.rank,
        alpha=config.lora.stored_alpha,
        dropout=float(config.lora.dropout),
        target_modules=config.lora.target_modules,
        num_layers=num_layers,
        num_experts=experts if isinstance(experts, int) else config.moe.experts_per_layer(num_layers),
        top_k=min(config.moe.experts_per_token, *(count for count in config.moe.experts_per_layer(num_layers) if count)),
        act_fn=_HF_ACTIVATION[base.ffns[0].shape.activation],
        use_rslora=config.lora.use_rslora,
        extra={
            "router": asdict(config.moe.router),
            "router_aux_loss_coef": config.moe.router_aux_loss_coef,
            "model_dtype": config.model.dtype,
            "training": how_trained(config),
            **described_template(base.chat_template),
        },
    )


def export_adapter(folder: Path, description: AdapterConfig, moe: MoeModel, ranks: Ranks) -> None:
    """Gather all experts on rank 0, one layer at a time, and write the adapter there. Every rank must call it."""
    description = with_drawn_digest(description, moe)
    tensors: dict[str, Tensor] = {}
    for unit, pairs in pairs_on_first(moe, sorted(moe.layers), ranks):
        for projection, lora in pairs.items():
            for expert in range(len(lora.a_SrI)):
                tensors[expert_tensor_name(unit.layer, projection, expert, "A")] = lora.a_SrI[expert].detach().cpu()
                tensors[expert_tensor_name(unit.layer, projection, expert, "B")] = lora.b_SOr[expert].detach().cpu()
        tensors[router_tensor_name(unit.layer)] = moe.routers[unit].detach()
        vectors = router_vectors(moe.router_modules[unit])
        tensors |= {router_buffer_name(unit.layer, name): vector.detach() for name, vector in vectors.items()}
        if vectors:
            description = replace(description, extra={**description.extra, "router_buffers": list(vectors)})
    if ranks.is_first:
        for (layer, module), lora_linear in moe.attention.items():
            name = module.rpartition(".")[2]
            tensors[attention_tensor_name(layer, name, "A")] = lora_linear.lora_A.detach()
            tensors[attention_tensor_name(layer, name, "B")] = lora_linear.lora_B.detach()
        save_adapter(folder, tensors, description)


Description = TypeVar("Description", AdapterConfig, PeftMoeConfig, LinearAdapterConfig)


def with_drawn_digest(description: Description, moe: MoeModel) -> Description:
    """An adapter's description with the digest of what its pairs' A and B were made of; as it is, if nothing was drawn for them."""
    drawn = moe.drawn_digest
    return replace(description, extra={**description.extra, "drawn": drawn}) if drawn else description


def load_into(moe: MoeModel, tensors: dict[str, Tensor]) -> None:
    """Set routers, attention adapters and this rank's owned experts from the tensors of an adapter that `load_adapter` has checked."""
    with torch.no_grad():
        for unit, router in moe.routers.items():
            router.copy_(tensors[router_tensor_name(unit.layer)])
        for unit, router_module in moe.router_modules.items():
            for name, vector in router_vectors(router_module).items():
                vector.copy_(tensors[router_buffer_name(unit.layer, name)])
        for (unit, expert), chunk in moe.engine.shards.named_parameters().items():
            pairs = moe.engine.shards.families[unit].pair_source
            names = {name: [expert_tensor_name(unit.layer, name, expert, matrix) for matrix in ("A", "B")] for name in pairs.projections}
            chunk.copy_(pairs.chunk_of(expert, {name: (tensors[name_a], tensors[name_b]) for name, (name_a, name_b) in names.items()}))
        for (layer, module), lora in moe.attention.items():
            name = module.rpartition(".")[2]
            lora.set_pair(tensors[attention_tensor_name(layer, name, "A")], tensors[attention_tensor_name(layer, name, "B")])


def begin_with_mixlora(config: Config, base: BaseModel, moe: MoeModel) -> None:
    """Set all that trains to the values of the adapter that `lora.init_from` names. Every rank must call it.

    Raises:
        UserError: the adapter cannot be read, or differs from the configured model, rank, scale, target modules, experts or router.
    """
    assert config.lora.init_from is not None
    folder = adapter_in(config.lora.init_from)
    tensors, theirs = load_adapter(folder)
    ours = adapter_config(config, base)
    refuse_different(
        folder,
        ("lora.r", theirs.r, ours.r),
        ("lora.alpha, scaled", theirs.scale, ours.scale),
        ("lora.target_modules", sorted(theirs.target_modules), sorted(ours.target_modules)),
        ("moe.num_experts", list(theirs.experts_per_layer), list(ours.experts_per_layer)),
        ("moe.top_k", theirs.top_k, ours.top_k),
        ("moe.router", *different_routers(theirs.router, ours.router)),
    )
    require_fit(moe, base, tensors, folder)
    load_into(moe, tensors)


def refuse_different(folder: Path, *compared: tuple[str, Any, Any]) -> None:
    """Refuse an adapter that training cannot begin with.

    Args:
        compared: a key, its value in the adapter, and its value in the configuration.

    Raises:
        UserError: two values differ.
    """
    for key, of_file, configured in compared:
        if of_file != configured:
            named = {"lora.alpha, scaled": "lora.alpha and lora.use_rslora", "rank and scale": "lora.r, lora.alpha and lora.use_rslora"}
            hint = f"give {named.get(key, key.partition(',')[0])} as the adapter has it, or leave lora.init_from out"
            raise UserError(f"lora.init_from: {folder} has {key} {of_file}, but the configuration has {configured}\n  {hint}")


def different_routers(theirs: RouterConfig, ours: RouterConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """The choices that differ between two kinds of routers; how a router is trained, a run may change."""
    of_file, configured = asdict(theirs), asdict(ours)
    keys = [key for key in configured if of_file[key] != configured[key] and key not in ("bias_rate", "balance")]
    return {key: of_file[key] for key in keys}, {key: configured[key] for key in keys}


def require_fit(moe: MoeModel, base: BaseModel, tensors: Mapping[str, Tensor], where: Path) -> None:
    """Check that an adapter has exactly the tensors that the experts in a model have, in their shapes.

    Raises:
        UserError: a tensor is missing, superfluous or of another shape than the model needs.
    """
    wanted: dict[str, tuple[int, ...]] = {}
    sizes = {ffn.unit: FfnSizes(ffn.shape.hidden, ffn.shape.ffn) for ffn in base.ffns}
    for unit, router in moe.router_modules.items():
        wanted[router_tensor_name(unit.layer)] = tuple(moe.routers[unit].shape)
        wanted |= {router_buffer_name(unit.layer, name): tuple(vector.shape) for name, vector in router_vectors(router).items()}
        family = moe.engine.shards.families[unit]
        source = family.pair_source
        for name in source.projections:
            inputs, outputs = sizes[unit].of_projection(name)
            for expert in range(family.num_experts):
                wanted[expert_tensor_name(unit.layer, name, expert, "A")] = source.lora.rank, inputs
                wanted[expert_tensor_name(unit.layer, name, expert, "B")] = outputs, source.lora.rank
    for (layer, module), lora in moe.attention.items():
        name = module.rpartition(".")[2]
        wanted[attention_tensor_name(layer, name, "A")] = tuple(lora.lora_A.shape)
        wanted[attention_tensor_name(layer, name, "B")] = tuple(lora.lora_B.shape)
    require_tensors(tensors, wanted, where)


def router_vectors(router: Router) -> dict[str, Tensor]:
    """What a router has beside its weight, one number per expert each, by name."""
    return dict(router.named_buffers()) | {name: part for name, part in router.trained.items() if name != "weight"}


def pairs_on_first(moe: MoeModel, units: Iterable[Unit], ranks: Ranks) -> Iterator[tuple[Unit, dict[str, LowRankPairs]]]:
    """Gather the pairs of all experts, one unit at a time, and yield those of each unit on rank 0, nothing on other ranks.

    Every rank must go through them. A pool that several units draw on is gathered once.
    """
    shards = moe.engine.shards
    pools: dict[Unit, Tensor | None] = {}
    for unit in units:
        source = shards.trained_in[unit]
        if source in shards.pools and source not in pools:
            pools[source] = gather_on_first(moe, source, ranks)
        chunks = pools[source] if source in pools else gather_on_first(moe, source, ranks)
        if chunks is not None:
            family = shards.families[unit]
            yield unit, family.pair_source.stacked(chunks, torch.arange(family.num_experts, device=chunks.device))


def gather_on_first(moe: MoeModel, unit: Unit, ranks: Ranks) -> Tensor | None:
    """Return all master chunks of a unit or a pool, [experts, C], on rank 0 and None on other ranks. Every rank must call it."""
    if not moe.engine.shards.in_first_group:
        return None
    owner_E: np.ndarray = moe.engine.shards.owners[unit]
    where_ED = owners_only(owner_E, moe.engine.shards.world_size).where_ED.copy()
    where_ED[:, 0] = True
    store, placement = moe.engine.shards.stores[unit], Placement(owner_E.copy(), where_ED)
    plan = plan_chunks(placement, store.chunk, None, moe.engine.shards.rank)
    gathered = arrived(sparse_all_gather(store.owned, plan, ranks.groups.experts).wait(), ranks.groups.experts)
    return gathered if ranks.is_first else None
