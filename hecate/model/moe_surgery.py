"""Putting adapted, sharded experts into an MoE model whose own were left out when it was loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hecate.engine.engine import Engine
from hecate.engine.step_plans import EngineConfig
from hecate.experts.moe_lora import MoeLoraExperts
from hecate.experts.pairs import GATE_UP, LoraShape
from hecate.experts.routed_experts import RoutedExperts
from hecate.kernels.backend import Backend
from hecate.kernels.common.ffn import FfnShape
from hecate.model.expert_files import LayerExperts
from hecate.model.expert_weights import read_expert
from hecate.model.gated_ffn import decoder_layers
from hecate.model.moe_blocks import MoeBlock
from hecate.model.surgery import MoeModel, adapt_attention, adapter_dtype, find_attention_targets, prefetch_during_attention
from hecate.parallel.units import Unit
from hecate.ranks.groups import ExpertGroups

_DOWN = "down_proj"


@dataclass(frozen=True)
class AdaptedLayer:
    """A layer's router and experts in the model, and where the experts' weights are."""

    block: MoeBlock
    files: LayerExperts


@dataclass(frozen=True)
class MoeLoraPlan:
    """What to put in: values only."""

    lora: LoraShape
    target_modules: tuple[str, ...]
    train_router: bool
    seed: int
    kernels: Backend = "auto"


def expert_projections(target_modules: Sequence[str]) -> tuple[str, ...]:
    """The projections of an expert that get a pair: gate and up are one, as in the model, and are named together."""
    halves = {"gate_proj", "up_proj"} & set(target_modules)
    assert len(halves) != 1, target_modules
    return (GATE_UP,) * bool(halves) + (_DOWN,) * (_DOWN in target_modules)


def adapt_experts(
    model: nn.Module, layers: Sequence[AdaptedLayer], plan: MoeLoraPlan, engine_config: EngineConfig, groups: ExpertGroups
) -> MoeModel:
    """Freeze the model and put the engine in the place of its experts, each owner reading its own from the files.

    Every rank of the groups must call it. Nothing of it depends on the number of ranks.

    Raises:
        UserError: a target module matches nothing, or a file cannot be read.
    """
    model.requires_grad_(False)
    like = next(model.parameters())
    dtype, compute_dtype, device = adapter_dtype(like.dtype), like.dtype, like.device
    projections = expert_projections(plan.target_modules)
    targets = find_attention_targets(model, plan.target_modules, _beside_attention(model, layers))
    families = {
        Unit(layer.block.layer): MoeLoraExperts(
            FfnShape(layer.block.hidden, layer.block.ffn, layer.block.activation),
            _reader(layer.files, compute_dtype, device),
            plan.lora,
            projections,
            layer=layer.block.layer,
            num_experts=layer.block.num_experts,
            seed=plan.seed,
            master_dtype=dtype,
            compute_dtype=compute_dtype,
            device=device,
            kernels=plan.kernels,
        )
        for layer in layers
    }
    engine = Engine(dict(families), engine_config, groups)
    modules = {}
    for block in (layer.block for layer in layers):
        unit = Unit(block.layer)
        router = model.get_submodule(block.router_path)
        trained = _train(router, dtype) if plan.train_router else None
        modules[unit] = RoutedExperts(unit, router, engine.current, trained)
        model.set_submodule(block.experts_path, modules[unit])
    attention = adapt_attention(model, targets, plan.lora, seed=plan.seed, dtype=dtype, current=engine.current)
    prefetch_during_attention(decoder_layers(model)[1], engine.current, modules, engine_config.prefetch)
    return MoeModel(model, engine, modules, attention)


def _reader(files: LayerExperts, dtype: torch.dtype, device: torch.device) -> Any:
    return lambda expert: read_expert(files, expert, dtype, device)


def _beside_attention(model: nn.Module, layers: Sequence[AdaptedLayer]) -> tuple[str, ...]:
    """Paths under which linears are no attention: MoE blocks with their shared experts, and the FFNs of layers without experts."""
    name, decoder = decoder_layers(model)
    last = {layer.block.path.rpartition(".")[2] for layer in layers}
    return tuple(f"{name}.{index}.{one}." for index in range(len(decoder)) for one in last)


def _train(router: nn.Module, dtype: torch.dtype) -> nn.Parameter:
    """Train a router, in float32 or wider, whatever its input comes in."""
    router.to(dtype)
    router.register_forward_pre_hook(lambda _, inputs: tuple(x.to(dtype) if isinstance(x, Tensor) else x for x in inputs))
    (weight,) = router.parameters()
    weight.requires_grad_()
    return weight


def non_moe_flops_per_token(model: nn.Module, layers: Sequence[AdaptedLayer]) -> float:
    """Forward FLOPs of one token in the first layer that has experts, outside them (projections only)."""
    _, decoder = decoder_layers(model)
    linears = [module for module in decoder[layers[0].block.layer].modules() if isinstance(module, nn.Linear)]
    return 2.0 * sum(module.weight.numel() for module in linears)
