"""From a dense model to a mixture of full experts: each expert begins as a copy of its layer's FFN, with a little noise.

Sparse upcycling (arXiv 2212.05055). The weights of a token's choices sum to 1, so without noise the model computes at first what the dense
one did, whatever the number of experts and choices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hecate.engine.engine import Engine
from hecate.engine.step_plans import EngineConfig
from hecate.errors import UserError
from hecate.experts.full import FullExperts
from hecate.experts.router import TopKRouter
from hecate.experts.seeding import generator
from hecate.kernels.backend import Backend
from hecate.kernels.common.ffn import FfnBase, FfnShape
from hecate.model.gated_ffn import GatedFfn, find_gated_ffns
from hecate.model.surgery import MoeModel, adapter_dtype, put_layers
from hecate.parallel.units import Unit
from hecate.ranks.groups import ExpertGroups


@dataclass(frozen=True)
class UpcyclingPlan:
    """What to make of a dense model: values only."""

    experts_per_layer: tuple[int, ...]
    """0: the layer keeps its plain FFN"""
    top_k: int
    noise: float
    """standard deviation of what is added to a copied weight, as a share of its matrix's own"""
    seed: int
    train_non_experts: bool = False
    kernels: Backend = "auto"


def upcycle(
    model: nn.Module,
    plan: UpcyclingPlan,
    engine_config: EngineConfig,
    groups: ExpertGroups,
    router_class: type[TopKRouter] = TopKRouter,
) -> MoeModel:
    """Put routers and trained experts in the place of the model's FFNs; the rest is frozen, or trains on every rank alike.

    Every rank of the groups must call it. A rank makes the experts that it owns and no others; nothing of it depends on the number of
    ranks. The dense FFNs are let go.

    Raises:
        UserError: the architecture is not supported, the list of experts is not as long as the model has layers, or what is to train is
            held in a type too narrow for an optimizer.
    """
    model.requires_grad_(False)
    ffns = find_gated_ffns(model)
    if len(plan.experts_per_layer) != len(ffns):
        raise UserError(f"moe.num_experts lists {len(plan.experts_per_layer)} layers, but the model has {len(ffns)}")
    model_dtype = next(model.parameters()).dtype
    if plan.train_non_experts and model_dtype.itemsize < 4:
        name = str(model_dtype).removeprefix("torch.")
        raise UserError(f"model.train_non_experts: the model is held in {name}, whose steps would be lost\n  set model.dtype=float32")
    changed = [ffn for ffn in ffns if plan.experts_per_layer[ffn.layer] > 0]
    families = {Unit(ffn.layer): _family(ffn, plan) for ffn in changed}
    engine = Engine(dict(families), engine_config, groups)
    for family in families.values():
        family.forget_initial()
    layers = put_layers(model, changed, engine, plan.top_k, plan.seed, router_class)
    others: dict[str, nn.Parameter] = {}
    if plan.train_non_experts:
        routed = tuple(f"{ffn.path}." for ffn in changed)
        others = {name: parameter for name, parameter in model.named_parameters() if not name.startswith(routed)}
    for parameter in others.values():
        parameter.requires_grad_()
    return MoeModel(model, engine, layers, {}, others)


def noisy_copies(base: FfnBase, noise: float, *, layer: int, seed: int) -> Callable[[int], Tensor]:
    """The initial chunk of each expert, float64 [C]: a function of (seed, layer, expert, matrix) alone."""

    def initial(expert: int) -> Tensor:
        parts = []
        for name, weight in (("gate_proj", base.gate_FD), ("up_proj", base.up_FD), ("down_proj", base.down_DF)):
            copy = weight.detach().to("cpu", torch.float64)
            if noise > 0:
                random = generator(seed, "upcycle", layer, expert, name)
                copy = copy + torch.randn(copy.shape, generator=random, dtype=torch.float64) * (noise * copy.std())
            parts.append(copy.flatten())
        return torch.cat(parts)

    return initial


def _family(ffn: GatedFfn, plan: UpcyclingPlan) -> FullExperts:
    gate_FD = ffn.base.gate_FD
    inner, hidden = gate_FD.shape
    return FullExperts(
        FfnShape(hidden, inner, ffn.base.activation),
        layer=ffn.layer,
        num_experts=plan.experts_per_layer[ffn.layer],
        seed=plan.seed,
        master_dtype=adapter_dtype(gate_FD.dtype),
        compute_dtype=gate_FD.dtype,
        device=gate_FD.device,
        kernels=plan.kernels,
        initial=noisy_copies(ffn.base, plan.noise, layer=ffn.layer, seed=plan.seed),
    )
