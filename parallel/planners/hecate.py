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
    world = given.topology.world_size
    node_of_rank = np.asarray(given.topology.node_of_rank)
    where_ED = owners_only(given.owner_E, world).where_ED.copy()
    free_D = np.full(world, given.memory_slots)
    wanted = _copies(load_E[hottest], total=world * given.memory_slots, most=world - 1)
    for expert, copies in zip(hottest, wanted, strict=True):
        for _ in range(copies):
            candidates = np.flatnonzero((free_D > 0) & ~where_ED[expert])
            if not len(candidates):
                break
            copies_in_node = np.bincount(node_of_rank, weights=where_ED[expert], minlength=given.topology.num_nodes)
            free_in_node = np.bincount(node_of_rank, weights=free_D, minlength=given.topology.num_nodes)
            node = node_of_rank[candidates]
            rank = candidates[np.lexsort((candidates, -free_D[candidates], -free_in_node[node], copies_in_node[node]))[0]]
            where_ED[expert, rank] = True
            free_D[rank] -= 1
    return Placement(given.owner_E.copy(), where_ED)


def _copies(load: np.ndarray, total: int, most: int) -> np.ndarray:
    """Deal `total` copies one by one to the expert with the highest load per replica (its owner's counts), at most `most` each."""
    copies = np.zeros(len(load), dtype=np.int64)
    for _ in range(min(total, most * len(load))):
        per_replica = np.where(copies < most, load / (copies + 1), -1.0)
        copies[np.argmax(per_replica)] += 1
    return copies
