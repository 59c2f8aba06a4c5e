"""Putting experts, routers and adapters into a loaded model, where its units were found.

Units are found elsewhere: dense gated FFNs by `hecate.model.gated_ffn`, linears by `hecate.model.linears`, the experts of MoE models by
`hecate.model.files.load_moe`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from hecate.config import RouterConfig
from hecate.engine.engine import Engine
from hecate.engine.step_plans import EngineConfig
from hecate.errors import UserError
from hecate.experts.families import ROUTERS, make_experts
from hecate.experts.family import ExpertChoices, FfnSource, Site, UnitExperts
from hecate.experts.forward_pass import CurrentPass
from hecate.experts.layer import MoeLayer
from hecate.experts.linear import MoeLinear
from hecate.experts.routers.by_input.given import OnlyExpert
from hecate.experts.routers.router import ModelRouter, Router, RouterSite
from hecate.kernels.backend import Backend
from hecate.kernels.common.ffn import FfnShape
from hecate.model.gated_ffn import decoder_layers
from hecate.model.layers.lora import LoraLinear
from hecate.model.linears import FoundLinear, ends_of, target_linears
from hecate.model.moe_blocks import renormalises
from hecate.model.moe_model import MoeModel, adapter_dtype
from hecate.parallel.values.expert_kinds import PROJECTIONS, ExpertKind, LinearSizes, LoraShape
from hecate.parallel.values.units import Unit
from hecate.ranks.groups import ExpertGroups


class FoundUnit(Protocol):
    """A place of a base model where experts may be put."""

    @property
    def unit(self) -> Unit: ...

    @property
    def path(self) -> str:
        """Dotted name of the module whose place the experts take: a dense FFN, a linear, or a model's own experts."""

    @property
    def block_path(self) -> str:
        """Dotted name of the module that is no attention: the FFN, or the block with router and experts; of a linear, the linear."""

    @property
    def router_path(self) -> str | None:
        """Dotted name of the model's own router, if it has one."""

    @property
    def own_experts(self) -> int:
        """Experts that the model has itself; 0: none."""

    @property
    def shape(self) -> FfnShape | LinearSizes: ...

    def source(self, model: nn.Module) -> FfnSource:
        """What families are made from, in the model's dtype and on its device."""


@dataclass(frozen=True, kw_only=True)
class InsertionPlan:
    """What to put into a model."""

    kind: ExpertKind
    experts_per_layer: tuple[int, ...] | None = None
    """The number of experts of the units in each decoder layer that has any; 0: the layer keeps its plain FFN, or its linears get one
    adapter each; None: as many as the model has itself."""
    top_k: int = 1
    """The number of experts that new routers choose for a token; a model's own routers choose as they did."""
    router: RouterConfig = field(default_factory=RouterConfig)
    """The choices of new routers."""
    user_width: int | None = None
    """The size of a user's vector (`Router.user_width`)."""
    lora: LoraShape | None = None
    lora_of_experts: LoraShape | None = None
    """The shape of the experts' pairs; None: `lora`."""
    target_modules: tuple[str, ...] = ()
    upcycle_noise: float = 0.0
    """The standard deviation of the noise on a copied weight, as a share of its matrix's own."""
    train_router: bool = False
    """Whether the model's own routers are trained, too."""
    train_non_experts: bool = False
    """Whether the rest of the model is trained, too, alike on every rank."""
    seed: int
    expert_names: tuple[str, ...] = ()
    """The names of the experts (`Site.names`)."""
    kernels: Backend = "auto"

    @property
    def one_pair_each(self) -> bool:
        """Whether units are linears with one pair each, which needs no router."""
        return self.router.input == "token" and self.kind.one_pair_each(self.experts_per_layer or (0,))

    @property
    def choices(self) -> ExpertChoices:
        return ExpertChoices(
            self.lora_of_experts or self.lora, self.kind.projections(self.target_modules), self.upcycle_noise, self.router.mixes
        )


class RouterError(Exception):
    """A class of routers cannot be trained: a mistake in the class, not of whoever trains with it."""


def insert_experts(
    model: nn.Module, found: Sequence[FoundUnit], plan: InsertionPlan, engine_config: EngineConfig, groups: ExpertGroups
) -> MoeModel:
    """Freeze the model, put routers and experts in the found places and adapters around its attention projections.

    Every rank of the groups must call it. Nothing of it depends on their number: a rank makes the experts that it owns.

    Raises:
        UserError: the list of experts is not as long as the model has layers, a target module matches nothing, nothing would train, what is
            to train is held in a type too narrow for an optimizer, or a file cannot be read.
        RouterError: a class of routers has parameters that nothing would step or save.
    """
    model.requires_grad_(False)
    if plan.kind.over_linears:
        linears, routed = [place for place in found if isinstance(place, FoundLinear)], plan.router.input != "given"
        found = target_linears(linears, plan.target_modules, type(model).__name__, without_routers=not routed)
    counts = _experts_of(found, plan)
    changed = [place for place in found if counts[place.unit] > 0 and (plan.choices.projections or not plan.kind.has_pairs)]
    if plan.kind.over_linears:
        targets = [(place.unit.layer, place.unit.place, place.path) for place in found if counts[place.unit] == 0]
    else:
        targets = _attention_targets(model, found, plan)
    if not changed and not targets:
        raise UserError(
            "nothing would train: no layer gets experts and no attention module gets an adapter.\n"
            f"  lora.target_modules: {', '.join(plan.target_modules)}; moe.num_experts: {sorted(set(counts.values()))}"
        )
    if plan.train_non_experts:
        _refuse_narrow(model)
    units_per_layer = Counter(place.unit.layer for place in changed)
    peers: dict[object, list[tuple[Unit, int]]] = {}
    for place in sorted(changed, key=lambda place: place.unit):
        peers.setdefault((place.unit.place, place.shape), []).append((place.unit, counts[place.unit]))
    families = {
        place.unit: _experts(model, place, plan, units_per_layer[place.unit.layer], tuple(peers[place.unit.place, place.shape]))
        for place in changed
    }
    engine = Engine(dict(families), engine_config, groups)
    # The engine has copied the initial chunks; what they were computed from, such as the dense FFNs, would stay in memory.
    for family in families.values():
        family.forget_initial()
    layers = {}
    for place in changed:
        router = _router(model, place, families[place.unit], plan)
        layers[place.unit] = _layer(model, place, router, engine.current, plan)
        model.set_submodule(place.path, layers[place.unit])
    dtype = adapter_dtype(next(model.parameters()).dtype)
    attention = _adapt_attention(model, targets, plan, dtype, engine.current)
    prefetch_during_attention(decoder_layers(model)[1], engine.current, layers, engine_config.prefetch)
    others = _train_others(model, changed) if plan.train_non_experts else {}
    return MoeModel(model, engine, layers, attention, others)


def _experts_of(found: Sequence[FoundUnit], plan: InsertionPlan) -> dict[Unit, int]:
    if plan.experts_per_layer is None:
        return {place.unit: place.own_experts for place in found}
    layers = sorted({place.unit.layer for place in found})
    if len(plan.experts_per_layer) != len(layers):
        raise UserError(f"moe.num_experts lists {len(plan.experts_per_layer)} layers, but the model has {len(layers)}")
    of_layer = dict(zip(layers, plan.experts_per_layer, strict=True))
    return {place.unit: of_layer[place.unit.layer] for place in found}


def _layer(model: nn.Module, place: FoundUnit, router: Router, current: CurrentPass, plan: InsertionPlan) -> MoeLayer:
    """What takes the unit's place in the model."""
    if not plan.kind.over_linears:
        return MoeLayer(place.unit, router, current)
    linear = model.get_submodule(place.path)
    assert isinstance(linear, nn.Linear)
    return MoeLinear(place.unit, router, current, linear)


def _refuse_narrow(model: nn.Module) -> None:
    dtype = next(model.parameters()).dtype
    if dtype.itemsize < 4:
        name = str(dtype).removeprefix("torch.")
        raise UserError(f"model.train_non_experts: the model is held in {name}, whose steps would be lost\n  set model.dtype=float32")


def _experts(
    model: nn.Module, place: FoundUnit, plan: InsertionPlan, units_per_layer: int, peers: tuple[tuple[Unit, int], ...]
) -> UnitExperts:
    like, experts = next(model.parameters()), dict(peers)[place.unit]
    dtypes = adapter_dtype(like.dtype), like.dtype
    site = Site(place.unit, experts, place.shape, plan.seed, *dtypes, like.device, plan.kernels, units_per_layer, peers, plan.expert_names)
    return make_experts(plan.kind, site, place.source(model), plan.choices)


def _router(model: nn.Module, place: FoundUnit, family: UnitExperts, plan: InsertionPlan) -> Router:
    """A new router, or the model's own with what is kept of its decisions."""
    site = family.site
    if place.router_path is None:
        top_k = min(plan.top_k, site.num_experts)  # of a dense router in the layer with the most experts
        router = (OnlyExpert if plan.one_pair_each else ROUTERS[plan.router.input])(
            RouterSite(
                unit=site.unit,
                hidden=site.inputs,
                num_experts=site.num_experts,
                top_k=top_k,
                seed=site.seed,
                dtype=site.master_dtype,
                device=site.device,
                choices=plan.router,
                user_width=plan.user_width,
            )
        )
        _check_router(router, None if plan.kind.over_linears else (site.num_experts, site.inputs))
        return router
    own = model.get_submodule(place.router_path)
    return ModelRouter(own, site.master_dtype if plan.train_router else None, renormalises=renormalises(own))


def _check_router(router: Router, shape: tuple[int, int] | None) -> None:
    """Raises RouterError: the router has parameters besides `trained`, or some that no adapter can hold.

    Args:
        shape: [experts, hidden], of the weight that the adapter can hold, beside vectors of one number per expert; None: it can hold any.
    """
    name, held = type(router).__name__, router.trained
    others = [
        other
        for other, parameter in router.named_parameters()
        if parameter.requires_grad and not any(parameter is trained for trained in held.values())
    ]
    if others:
        raise RouterError(
            f"router {name}: besides `trained` it has the parameters {', '.join(others)}, which nothing would step or save\n"
            "  let these be all that it learns, and keep what changes by other means in buffers (`Router.after_step`)"
        )
    if shape is None:
        return
    for part, parameter in held.items():
        wanted = shape if part == "weight" else shape[:1]
        if part not in ("weight", "bias") or tuple(parameter.shape) != wanted:
            raise RouterError(
                f"router {name}: it trains {part} of the shape {list(parameter.shape)}, but adapters hold weight [experts, hidden] and "
                f"bias [experts], which are {list(shape)} and {list(shape[:1])} in this layer"
            )


def _train_others(model: nn.Module, changed: Sequence[FoundUnit]) -> dict[str, nn.Parameter]:
    """The model's own parameters outside experts and routers, which train from now on."""
    routed = tuple(f"{place.path}." for place in changed)
    others = {name: parameter for name, parameter in model.named_parameters() if not name.startswith(routed)}
    for parameter in others.values():
        parameter.requires_grad_()
    return others


def _attention_targets(model: nn.Module, found: Sequence[FoundUnit], plan: InsertionPlan) -> list[tuple[int, str, str]]:
    """(layer, name inside the layer, dotted path) of the decoder layers' linears whose dotted name has a target as its end.

    Blocks where units were found are no attention, in the layers without units either.

    Raises:
        UserError: a target matches neither a linear nor a projection of the experts.
    """
    name, layers = decoder_layers(model)
    inside = {place.block_path.removeprefix(f"{name}.{place.unit.layer}.") for place in found}
    targets, seen = [], {target for target in plan.target_modules if target in PROJECTIONS}
    available = set(PROJECTIONS)
    for index, layer in enumerate(layers):
        excluded = tuple(f"{block}." for block in inside)
        for module, child in layer.named_modules():
            if type(child) is not nn.Linear or module.startswith(excluded):
                continue
            path = f"{name}.{index}.{module}"
            available.add(module.rpartition(".")[2])
            if matching := ends_of(path) & set(plan.target_modules):
                targets.append((index, module, path))
                seen |= matching
    missing = [target for target in plan.target_modules if target not in seen]
    if missing:
        raise UserError(
            f"lora.target_modules: {', '.join(missing)} matches no module of {type(model).__name__}; it has {', '.join(sorted(available))}"
        )
    return targets


def _adapt_attention(
    model: nn.Module, targets: list[tuple[int, str, str]], plan: InsertionPlan, dtype: torch.dtype, current: CurrentPass
) -> dict[tuple[int, str], LoraLinear]:
    """Put adapters around linears; (layer, module name) -> adapter."""
    attention = {}
    for layer, module, path in targets:
        linear = model.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        assert plan.lora is not None
        adapter = LoraLinear(
            linear, plan.lora, path=f"{layer}.{module}", seed=plan.seed, dtype=dtype, current=current, kernels=plan.kernels
        )
        attention[layer, module] = adapter
        model.set_submodule(path, adapter)
    return attention


def prefetch_during_attention(decoder: nn.ModuleList, current: CurrentPass, layers: Collection[Unit], ahead: int) -> None:
    """Start the gather of a layer's units when the layer begins, so that attention hides that of its FFN, or `ahead` - 1 layers earlier.

    Args:
        layers: the units, in the order in which they are needed.
    """

    def hook_for(coming: list[Unit]) -> Any:
        def start(*_: Any) -> None:
            current.required().prefetch(*coming)

        return start

    for index, module in enumerate(decoder):
        coming = [unit for unit in layers if index <= unit.layer < index + ahead]
        if coming:
            module.register_forward_pre_hook(hook_for(coming))


def non_moe_flops_per_token(model: nn.Module, found: Sequence[FoundUnit]) -> float:
    """Forward FLOPs of one token in the first decoder layer that has a unit, outside its experts (projections only).

    Of a model with experts, before they are put in, their place is empty; of a dense model the FFN is left out. Where units are linears,
    these are no experts, and count.
    """
    name, layers = decoder_layers(model)
    first = found[0]
    inside = first.path.removeprefix(f"{name}.{first.unit.layer}.")
    named = layers[first.unit.layer].named_modules()
    linears = [module for path, module in named if isinstance(module, nn.Linear) and not path.startswith(f"{inside}.")]
    return 2.0 * sum(module.weight.numel() for module in linears)
