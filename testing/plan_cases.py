"""The layers and clusters on which plans are judged: three kinds of experts, and four topologies that differ in size and links."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from hecate.parallel.cluster.topology import Topology
from hecate.parallel.cluster.topology_file import load_topology
from hecate.parallel.cost.cost_model import LayerCost, Priced
from hecate.parallel.cost.model_shapes import ModelShape
from hecate.parallel.planners import COLLECTIVES, Plan, PlanInput
from hecate.parallel.planners.rivals.sharded_gather import with_sharded_gather
from hecate.parallel.values.placement import contiguous_owners

TOPOLOGIES = {"8x1": "h100-node", "4x8 A": "paper-cluster-a", "4x8 B": "paper-cluster-b", "mixed": "mixed"}
"""the presets in configs/topologies, by the name of the case"""
EXPERTS, TOKENS, TOP_K, HIDDEN, FFN, RANK = 64, 4096, 2, 2048, 4096, 16
MEMORY_SHARE = 0.02
"""the share of each device's memory that one layer's replicas may take"""


def topologies() -> dict[str, Topology]:
    """Return the topologies by the names of their cases."""
    presets = Path(__file__).resolve().parent.parent / "configs" / "topologies"
    return {place: load_topology(presets / f"{preset}.yaml") for place, preset in TOPOLOGIES.items()}


@dataclass(frozen=True)
class Kind:
    """A kind of experts and the cost of a layer of them."""

    name: str
    cost: LayerCost


def kinds(top_k: int = TOP_K) -> list[Kind]:
    """Return full experts, LoRA over a dense base, and LoRA over a frozen MoE base, with layers of the same size.

    Their experts are never cut into slices: so the bound, which holds for every route, is nearest to the plans.
    """
    expert, pairs = 3.0 * HIDDEN * FFN, 3.0 * RANK * (HIDDEN + FFN)
    attention = 8.0 * HIDDEN**2 * TOKENS
    row = 2.0 * HIDDEN
    return [
        Kind(
            "full experts",
            LayerCost(
                trainable_bytes=2 * expert, state_bytes=12 * expert, top_k=top_k, row_bytes=row, assignment_flops=2 * expert,
                non_moe_flops=attention,
            ),
        ),
        Kind(
            "LoRA, dense base",
            LayerCost(
                trainable_bytes=2 * pairs, state_bytes=12 * pairs, top_k=top_k, row_bytes=row, row_flops=2 * expert,
                assignment_flops=2 * pairs, assignment_backward=3.0, non_moe_flops=attention,
            ),
        ),
        Kind(
            "LoRA, frozen MoE base",
            LayerCost(
                trainable_bytes=2 * pairs, frozen_bytes=2 * expert, state_bytes=12 * pairs, top_k=top_k, row_bytes=row,
                assignment_flops=2 * (expert + pairs), assignment_backward=1.0, non_moe_flops=attention,
            ),
        ),
    ]  # fmt: skip


def plan_input(topology: Topology, cost: LayerCost, loads_ED: np.ndarray, most_slots: int = EXPERTS) -> PlanInput:
    """Return the input of a planner for one layer whose owners are those of expert parallelism.

    Args:
        loads_ED: [experts, source ranks], the exact loads.
        most_slots: the most replicas on a device, which may have room for fewer (`MEMORY_SHARE`).
    """
    slots = np.minimum((MEMORY_SHARE * np.asarray(topology.memory) / cost.replica_bytes).astype(np.int64), most_slots)
    owners = contiguous_owners(EXPERTS, topology.world_size)
    return PlanInput(owners[None], loads_ED[None].astype(np.float64), topology, cost, slots)


def num_params(shape: ModelShape) -> int:
    """Return the parameters of all layers: attention and FFNs, LoRA pairs included, without embeddings, norms and routers."""
    ffns = 1 if shape.of_kind.shares_ffn else shape.experts
    return shape.layers * (shape.attention_parameters + ffns * shape.ffn_parameters + shape.experts * shape.pair_parameters)


def price_row(name: str, plan: Plan, given: PlanInput) -> Priced:
    """Price a plan of one of `ROWS`, made from `given`, with the collectives of its system. A route that is given holds for all systems."""
    collective = COLLECTIVES.get(name) if given.execution.route == "fastest" else None
    if collective == "flat":
        return plan.price(replace(given, execution=replace(given.execution, route="flat")))
    priced = plan.price(given)
    if collective == "sharded" and plan.quota_LED is not None:
        return with_sharded_gather(priced, plan.quota_LED > 0, given.topology, given.cost, given.execution)
    return priced
