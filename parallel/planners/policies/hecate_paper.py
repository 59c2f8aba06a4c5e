"""Sparse materialization of the Hecate paper (arXiv 2502.02581, Algorithm 1)."""

from __future__ import annotations

import numpy as np

from hecate.parallel.cost.cost_model import overlap_degree
from hecate.parallel.planners.plan import Plan, PlanInput, Policy


def plan_hecate_paper(given: PlanInput) -> Plan:
    """Materialize the hottest experts, as many as travel hidden behind the non-MoE compute and fit in memory.

    With overlap degree t and m free slots on the fullest device: if t <= m the t hottest go to all devices. Otherwise the slots are
    dealt to the t hottest in proportion to their loads, each expert's copies spread over the nodes first (the node with the fewest
    copies of it, then with the most free slots), then over the devices with the most free slots of the node. Ties by index. Before any
    load is known every expert counts as equally hot.
    """
    load_LE = given.expected_LED.sum(-1)
    degree = min(overlap_degree(given.cost, given.topology), given.num_experts)
    where_LED = given.owned_LED.copy()
    for layer, load_E in enumerate(load_LE):
        hottest = np.argsort(-load_E, kind="stable")[:degree]
        if degree <= given.slots_D.min():
            where_LED[layer, hottest] = True
        else:
            _deal_slots(given, load_E, hottest, where_LED[layer])
    return Plan(given.owner_LE, where_LED)


def _deal_slots(given: PlanInput, load_E: np.ndarray, hottest: np.ndarray, where_ED: np.ndarray) -> None:
    """Slot by slot: the expert with the highest load per replica that still finds room gets one more, in `where_ED`."""
    node_of_rank, num_nodes = np.asarray(given.topology.node_of_rank), given.topology.num_nodes
    free_D, copies_E = given.slots_D.copy(), where_ED.sum(1)
    open_experts = hottest
    while len(open_experts):
        place = int((load_E[open_experts] / copies_E[open_experts]).argmax())  # the first of equals
        expert = open_experts[place]
        candidates = np.flatnonzero((free_D > 0) & ~where_ED[expert])
        if not len(candidates):
            open_experts = np.delete(open_experts, place)
            continue
        copies_in_node = np.bincount(node_of_rank, weights=where_ED[expert], minlength=num_nodes)
        free_in_node = np.bincount(node_of_rank, weights=free_D, minlength=num_nodes)
        node = node_of_rank[candidates]
        rank = candidates[np.lexsort((candidates, -free_D[candidates], -free_in_node[node], copies_in_node[node]))[0]]
        where_ED[expert, rank] = True
        copies_E[expert] += 1
        free_D[rank] -= 1


POLICY = Policy(plan_hecate_paper)
