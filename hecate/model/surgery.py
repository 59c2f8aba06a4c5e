"""Putting MixLoRA experts and attention LoRA into a loaded, frozen model."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hecate.engine.engine import Engine
from hecate.engine.protocol import ExpertEngine
from hecate.engine.step_plans import EngineConfig
from hecate.errors import UserError
from hecate.experts.forward_pass import CurrentPass
from hecate.experts.layer import MoeLayer
from hecate.experts.mixlora import LoraShape, MixLoraExperts
from hecate.experts.routed_experts import RoutedExperts
from hecate.experts.router import TopKRouter
from hecate.kernels.backend import Backend
from hecate.kernels.common.ffn import PROJECTIONS
from hecate.model.gated_ffn import GatedFfn, decoder_layers, find_gated_ffns
from hecate.model.lora import LoraLinear
from hecate.model.tensor_parts import TensorParts
from hecate.parallel.units import Unit
from hecate.ranks.groups import ExpertGroups


@dataclass(frozen=True)
class MoeModel:
    """A model with experts in it, and the parts that the trainer drives."""

    model: nn.Module
    engine: ExpertEngine
    layers: Mapping[Unit, MoeLayer | RoutedExperts]
    attention: dict[tuple[int, str], LoraLinear]
    """(layer, module name) -> adapter, such as (3, "self_attn.q_proj")"""
    others: dict[str, nn.Parameter] = field(default_factory=dict)
    """the model's own parameters that train, by their names in it"""
    parts: TensorParts | None = None
    """those of them of which this rank has only a part"""

    @property
    def routers(self) -> dict[Unit, nn.Parameter]:
        """By unit, the weights of those that are trained."""
        trained = {unit: module.trained_router for unit, module in sorted(self.layers.items())}
        return {unit: router for unit, router in trained.items() if router is not None}

    def replicated_parameters(self) -> dict[str, nn.Parameter]:
        """Trainable parameters that every rank holds alike: routers, attention adapters and the model's own, by stable names."""
        named: dict[str, nn.Parameter] = {}
        for unit, router in self.routers.items():
            named[f"layers.{unit}.router"] = router
        for (layer, module), lora in sorted(self.attention.items()):
            named[f"layers.{layer}.{module}.A"] = lora.lora_A
            named[f"layers.{layer}.{module}.B"] = lora.lora_B
        alike = self.others if self.parts is None else {name: p for name, p in self.others.items() if name not in self.parts.parameters}
        return named | alike

    def whole_others(self) -> Iterator[tuple[str, Tensor]]:
        """`others`, one by one, each all of it. Every rank of a tensor group must go through them."""
        for name, parameter in self.others.items():
            partial = self.parts is not None and name in self.parts.parameters
            yield name, self.parts.whole(name, parameter) if partial and self.parts else parameter.detach()


@dataclass(frozen=True)
class SurgeryPlan:
    """What to put in: values only."""

    experts_per_layer: tuple[int, ...]
    """0: the layer keeps its plain FFN"""
    top_k: int
    lora: LoraShape
    target_modules: tuple[str, ...]
    seed: int
    kernels: Backend = "auto"


def adapter_dtype(model_dtype: torch.dtype) -> torch.dtype:
    """Adapters, routers and their optimizer states: float32, or the model's own where that is wider."""
    return model_dtype if model_dtype.itemsize > 4 else torch.float32


def insert_experts(
    model: nn.Module,
    plan: SurgeryPlan,
    engine_config: EngineConfig,
    groups: ExpertGroups,
    router_class: type[TopKRouter] = TopKRouter,
) -> MoeModel:
    """Freeze the model, put routers and experts in the place of its FFNs and adapters around its attention projections.

    Every rank of the groups must call it. Nothing of it depends on the number of ranks.

    Raises:
        UserError: the architecture is not supported, a target module matches nothing, or nothing would train.
    """
    model.requires_grad_(False)
    ffns = find_gated_ffns(model)
    if len(plan.experts_per_layer) != len(ffns):
        raise UserError(f"moe.num_experts lists {len(plan.experts_per_layer)} layers, but the model has {len(ffns)}")
    projections = tuple(name for name in PROJECTIONS if name in plan.target_modules)
    expert_layers = [ffn for ffn in ffns if plan.experts_per_layer[ffn.layer] > 0 and projections]
    attention_targets = find_attention_targets(model, plan.target_modules, tuple(ffn.path + "." for ffn in ffns))
    if not expert_layers and not attention_targets:
        raise UserError(
            "nothing would train: no layer gets experts and no attention module gets an adapter.\n"
            f"  lora.target_modules: {', '.join(plan.target_modules)}; moe.num_experts: {sorted(set(plan.experts_per_layer))}"
        )

    dtype = adapter_dtype(next(model.parameters()).dtype)
    families = {
        Unit(ffn.layer): MixLoraExperts(
            ffn.base,
            plan.lora,
            projections,
            layer=ffn.layer,
            num_experts=plan.experts_per_layer[ffn.layer],
            seed=plan.seed,
            master_dtype=dtype,
            kernels=plan.kernels,
        )
        for ffn in expert_layers
    }
    engine = Engine(dict(families), engine_config, groups)
    layers = put_layers(model, expert_layers, engine, plan.top_k, plan.seed, router_class)
    attention = adapt_attention(model, attention_targets, plan.lora, seed=plan.seed, dtype=dtype, current=engine.current)
    return MoeModel(model, engine, layers, attention)


def adapt_attention(
    model: nn.Module, targets: list[tuple[int, str, str]], lora: LoraShape, *, seed: int, dtype: torch.dtype, current: CurrentPass
) -> dict[tuple[int, str], LoraLinear]:
    """Put adapters around linears that `find_attention_targets` has found; (layer, module name) -> adapter."""
    attention = {}
    for layer, module, path in targets:
        linear = model.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        attention[layer, module] = LoraLinear(linear, lora, path=f"{layer}.{module}", seed=seed, dtype=dtype, current=current)
        model.set_submodule(path, attention[layer, module])
    return attention


def put_layers(
    model: nn.Module,
    ffns: Sequence[GatedFfn],
    engine: ExpertEngine,
    top_k: int,
    seed: int,
    router_class: type[TopKRouter] = TopKRouter,
) -> dict[Unit, MoeLayer]:
    """Put routers and the engine's experts in the place of FFNs, and hooks that start each layer's gather ahead of its attention."""
    layers = {}
    for ffn in ffns:
        unit, base = Unit(ffn.layer), ffn.base.gate_FD
        router = router_class(
            base.shape[1],
            engine.shards.families[unit].num_experts,
            top_k,
            layer=ffn.layer,
            seed=seed,
            dtype=adapter_dtype(base.dtype),
            device=base.device,
        )
        layers[unit] = MoeLayer(unit, router, engine.current)
        model.set_submodule(ffn.path, layers[unit])
    prefetch_during_attention(decoder_layers(model)[1], engine.current, layers, engine.shards.config.prefetch)
    return layers


def find_attention_targets(model: nn.Module, target_modules: Sequence[str], excluded: tuple[str, ...]) -> list[tuple[int, str, str]]:
    """(layer, name inside the layer, dotted path) of the decoder layers' linears whose last name is a target.

    Args:
        excluded: beginnings of dotted paths of what is no attention.

    Raises:
        UserError: a target matches neither a linear nor a projection of the experts.
    """
    name, layers = decoder_layers(model)
    targets, seen = [], {target for target in target_modules if target in PROJECTIONS}
    available = set(PROJECTIONS)
    for index, layer in enumerate(layers):
        for module, child in layer.named_modules():
            path = f"{name}.{index}.{module}"
            if type(child) is not nn.Linear or path.startswith(excluded):
                continue
            last = module.rpartition(".")[2]
            available.add(last)
            if last in target_modules:
                targets.append((index, module, path))
                seen.add(last)
    missing = [target for target in target_modules if target not in seen]
    if missing:
        raise UserError(
            f"lora.target_modules: {', '.join(missing)} matches no module of {type(model).__name__}; it has {', '.join(sorted(available))}"
        )
    return targets


def prefetch_during_attention(decoder: nn.ModuleList, current: CurrentPass, layers: Collection[Unit], ahead: int) -> None:
    """Start a layer's gather when its decoder layer begins, so that its attention hides it, or `ahead` - 1 decoder layers earlier."""

    def hook_for(coming: list[Unit]) -> Any:
        def start(*_: Any) -> None:
            current.required().prefetch(*coming)

        return start

    for index, module in enumerate(decoder):
        coming = [unit for unit in sorted(layers) if index <= unit.layer < index + ahead]
        if coming:
            module.register_forward_pre_hook(hook_for(coming))


def non_moe_flops_per_token(model: nn.Module) -> float:
    """Forward FLOPs of one token in one decoder layer outside its FFN (projections only)."""
    name, layers = decoder_layers(model)
    ffn_path = find_gated_ffns(model)[0].path
    linears = [m for path, m in layers[0].named_modules() if isinstance(m, nn.Linear) and not f"{name}.0.{path}".startswith(f"{ffn_path}.")]
    return 2.0 * sum(m.weight.numel() for m in linears)
