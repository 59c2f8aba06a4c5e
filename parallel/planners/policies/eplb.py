"""Redundant experts (EPLB, DeepSeek, 2025: github.com/deepseek-ai/EPLB)."""

from __future__ import annotations

import numpy as np

from hecate.parallel.cost.flows import node_index
from hecate.parallel.planners.plan import PlanInput, Policy
from hecate.parallel.planners.rivals.expert_packing import even_split, pack_copies, spare_copies
from hecate.parallel.planners.rivals.source_split import SourceSplit, SplitPlan


def plan_eplb(given: PlanInput) -> SplitPlan:
    """Spare copies to the highest load per copy, then all copies packed by load; each copy serves the same number of assignments.

    With several nodes experts are first packed to nodes and get their spare copies in these nodes, so that an expert is in one node only.
    hecate's routers have no expert groups, so each expert is a group. EPLB leaves the choice between this and the global variant to its
    user. Its budget is as many spare copies as there are slots. EPLB also moves experts away from where they were, which here takes a
    slot, too; so plans with spares in half of the slots are made as well. Of all these each layer takes the one whose busiest device has
    least. Devices and nodes count as equally fast and large.

    EPLB does not say which copy a token goes to. Here it is as in vLLM: any of them, wherever the token is.
    """
    load_LE = given.expected_LED.sum(-1)
    found = [pack(given, load_LE, share) for pack in (_pack_in_nodes, _pack) for share in (1.0, 0.5)]
    busiest_CL = np.stack([even_split(load_LE, where_LED).sum(1).max(-1) for where_LED in found])
    where_LED = np.stack(found)[busiest_CL.argmin(0), np.arange(given.num_layers)]
    return SplitPlan(
        given.owner_LE, where_LED | given.owned_LED, even_split(load_LE, where_LED), source_split=SourceSplit("alike", where_LED)
    )


def _pack(given: PlanInput, load_LE: np.ndarray, share: float) -> np.ndarray:
    """Spare copies in a share of the slots."""
    copies_LE = spare_copies(load_LE, round(given.slots_D.sum() * share), given.world_size)
    return pack_copies(load_LE, copies_LE, given.owner_LE, given.slots_D)


def _pack_in_nodes(given: PlanInput, load_LE: np.ndarray, share: float) -> np.ndarray:
    node_D, num_nodes = node_index(given.topology), given.topology.num_nodes
    slots_N = np.bincount(node_D, weights=given.slots_D, minlength=num_nodes).astype(np.int64)
    in_node_LEN = pack_copies(load_LE, np.ones_like(given.owner_LE), node_D[given.owner_LE], slots_N // 4)
    copies_LE = np.ones_like(given.owner_LE)
    for node, slots in enumerate(slots_N.tolist()):
        load_of_node_LE = np.where(in_node_LEN[..., node], load_LE, 0.0)
        copies_LE += spare_copies(load_of_node_LE, round(slots * share), int((node_D == node).sum())) - 1
    return pack_copies(load_LE, copies_LE, given.owner_LE, given.slots_D, allowed_LEB=in_node_LEN[..., node_D])


POLICY = Policy(plan_eplb, own_split=True)
