"""Make small MixLoRA layers for tests."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist

from hecate.config import RouterConfig
from hecate.engine.engine import Engine
from hecate.engine.step_plans import EngineConfig
from hecate.experts.family import Site
from hecate.experts.mixlora import MixLoraExperts
from hecate.experts.pairs.sources.plain import PlainPairs
from hecate.experts.routers.router import RouterSite
from hecate.kernels.common.ffn import FfnBase, FfnShape
from hecate.parallel.cluster.mesh import make_mesh
from hecate.parallel.cluster.topology import local_topology
from hecate.parallel.planners import POLICIES
from hecate.parallel.values.expert_kinds import FfnSizes, LoraShape
from hecate.parallel.values.layout import ExpertLayout
from hecate.parallel.values.units import Unit
from hecate.ranks.groups import expert_groups

HIDDEN, FFN, SEED = 6, 10, 3


def base() -> FfnBase:
    random = torch.Generator().manual_seed(0)
    shapes = ((FFN, HIDDEN), (FFN, HIDDEN), (HIDDEN, FFN))
    gate, up, down = (torch.randn(*shape, generator=random, dtype=torch.float64) for shape in shapes)
    return FfnBase(gate, up, down, "silu")


def experts(
    num_experts: int,
    *,
    layer: int = 0,
    seed: int = SEED,
    dropout: float = 0.0,
    projections: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj"),
) -> MixLoraExperts:
    shape, double = FfnShape(HIDDEN, FFN, "silu"), torch.float64
    site = Site(Unit(layer), num_experts, shape, seed, double, double, torch.device("cpu"))
    return MixLoraExperts(site, base(), PlainPairs(LoraShape(rank=2, scale=0.5, dropout=dropout), projections, FfnSizes(HIDDEN, FFN)))


def router_site(
    hidden: int,
    num_experts: int,
    top_k: int,
    *,
    layer: int = 0,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    choices: RouterConfig | None = None,
) -> RouterSite:
    """Of the FFN of a layer, on the CPU."""
    return RouterSite(
        unit=Unit(layer),
        hidden=hidden,
        num_experts=num_experts,
        top_k=top_k,
        seed=seed,
        dtype=dtype,
        device=torch.device("cpu"),
        choices=choices or RouterConfig(),
    )


def engine(num_experts: Mapping[Any, int], policy: str = "static_ep", shard_size: int | None = None) -> Engine:
    """An engine over the default group. Its experts' chunks are random, B included.

    Args:
        num_experts: by unit, or by the number of its layer, which tests may take in its place.
    """
    world = dist.get_world_size()
    families = {unit: experts(count, layer=_layer(unit)) for unit, count in num_experts.items()}
    config = EngineConfig(POLICIES[policy], local_topology(world, cuda=False))
    made = Engine(dict(families), config, expert_groups(make_mesh(world, shard_size)))
    for (unit, expert), parameter in made.shards.named_parameters().items():
        parameter.data.copy_(chunk(_layer(unit), expert, len(parameter)))
    return made


def _layer(unit: Unit | int) -> int:
    return unit.layer if isinstance(unit, Unit) else unit


def chunk(layer: int, expert: int, numel: int) -> torch.Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(100 * layer + expert), dtype=torch.float64)


def offsets(layout: ExpertLayout) -> dict[str, tuple[int, int]]:
    """Start and end of each trainable tensor in a chunk, in elements: one after the other."""
    ends = list(accumulate(spec.numel for spec in layout.trainable))
    return {spec.name: (end - spec.numel, end) for spec, end in zip(layout.trainable, ends, strict=True)}
