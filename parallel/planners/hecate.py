"""Sparse materialization of the Hecate paper (arXiv 2502.02581, Algorithm 1)."""

from __future__ import annotations

import numpy as np

from hecate.parallel.cost_model import overlap_degree
from hecate.parallel.placement import Placement, owners_only
from hecate.parallel.planners.plan import PlanInput


def plan_hecate(given: PlanInput) -> Placement:
    """Materialize the hottest experts, as many as travel hidden behind the non-MoE compute and fit in memory.

    With overlap degree t and m free slots a device: if t <= m the t hottest go to all devices. Otherwise the D·m slots are dealt to
    the t hottest in proportion to their loads, each expert's copies spread over the nodes first (the node with the fewest copies of
    it, then with the most free slots), then over the devices with the most free slots of the node. Ties by index. Before any load is
    known every expert counts as equally hot.
    """
    experts, world = len(given.owner_E), given.topology.world_size
    load_E = np.ones(experts) if given.loads_SE is None else given.loads_SE.sum(axis=0)
    degree = min(overlap_degree(given.cost, given.topology), experts)
    hottest = np.argsort(-load_E, kind="stable")[:degree]
    if degree <= given.memory_slots:
        where_ED = owners_only(given.owner_E, world).where_ED.copy()
        where_ED[hottest] = True
        return Placement(given.owner_E.copy(), where_ED)
    return _deal_slots(given, load_E, hottest)


def _deal_slots(given: PlanInput, load_E: np.ndarray, hottest: np.ndarray) -> Placement:
    """Slot by slot: the expert with the highest load per replica that still finds room gets one more."""
    node_of_rank, num_nodes = np.asarray(given.topology.node_of_rank), given.topology.num_nodes
    where_ED = owners_only(given.owner_E, given.topology.world_size).where_ED.copy()
    free_D = np.full(given.topology.world_size, given.memory_slots)
    open_experts = list(hottest)
    while open_experts:
        expert = max(open_experts, key=lambda e: load_E[e] / where_ED[e].sum())  # the first of equals
        candidates = np.flatnonzero((free_D > 0) & ~where_ED[expert])
        if not len(candidates):
            open_experts.remove(expert)
            continue
        copies_in_node = np.bincount(node_of_rank, weights=where_ED[expert], minlength=num_nodes)
        free_in_node = np.bincount(node_of_rank, weights=free_D, minlength=num_nodes)
        node = node_of_rank[candidates]
        rank = candidates[np.lexsort((candidates, -free_D[candidates], -free_in_node[node], copies_in_node[node]))[0]]
        where_ED[expert, rank] = True
        free_D[rank] -= 1
    return Placement(given.owner_E.copy(), where_ED)
