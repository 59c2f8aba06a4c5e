"""Redundant experts (EPLB, DeepSeek 2025)."""

from __future__ import annotations

import numpy as np

from hecate.parallel.flows import node_index
from hecate.parallel.planners.expert_packing import even_split, pack_copies, spare_copies, spare_slots
from hecate.parallel.planners.plan import Plan, PlanInput


def plan_eplb(given: PlanInput) -> Plan:
    """Spare copies to the highest load per copy, then all copies packed by load; each copy serves the same number of assignments.

    With several nodes experts are first packed to nodes and get their spare copies in these nodes, so that an expert is in one node only.
    hecate's routers have no expert groups, so each expert is a group. EPLB leaves the choice between this and the global variant to its
    user; this function takes, for each layer, the one whose busiest device has less. Devices and nodes count as equally fast and large.
    """
    load_LE = given.expected_LED.sum(-1)
    where_LED = _pack(given, load_LE)
    if given.topology.num_nodes > 1:
        in_node_LED = _pack_in_nodes(given, load_LE)
        busiest, busiest_in_node = (even_split(load_LE, w).sum(1).max(-1) for w in (where_LED, in_node_LED))
        where_LED = np.where((busiest_in_node <= busiest)[:, None, None], in_node_LED, where_LED)
    return Plan(given.owner_LE, where_LED | given.owned_LED, even_split(load_LE, where_LED))


def _pack(given: PlanInput, load_LE: np.ndarray) -> np.ndarray:
    copies_LE = spare_copies(load_LE, spare_slots(int(given.slots_D.sum())), given.world_size)
    return pack_copies(load_LE, copies_LE, given.owner_LE, given.slots_D)


def _pack_in_nodes(given: PlanInput, load_LE: np.ndarray) -> np.ndarray:
    node_D, num_nodes = node_index(given.topology), given.topology.num_nodes
    slots_N = np.bincount(node_D, weights=given.slots_D, minlength=num_nodes).astype(np.int64)
    # A quarter of the slots for moves between nodes: half is for spares, and packing inside the nodes needs some, too.
    in_node_LEN = pack_copies(load_LE, np.ones_like(given.owner_LE), node_D[given.owner_LE], slots_N // 4)
    copies_LE = np.ones_like(given.owner_LE)
    for node, slots in enumerate(slots_N.tolist()):
        here_LE = in_node_LEN[..., node]
        copies_LE += spare_copies(np.where(here_LE, load_LE, 0.0), spare_slots(slots), int((node_D == node).sum())) - 1
    return pack_copies(load_LE, copies_LE, given.owner_LE, given.slots_D, allowed_LEB=in_node_LEN[..., node_D])
