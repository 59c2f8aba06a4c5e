"""Replicas re-laid out in every iteration (LAER-MoE, ASPLOS 26)."""

from __future__ import annotations

import heapq

import numpy as np

from hecate.parallel.cost.flows import node_index, node_membership
from hecate.parallel.planners.plan import PlanInput, Policy
from hecate.parallel.planners.rivals.copy_places import CopyPlaces, copy_places, place_copies
from hecate.parallel.planners.rivals.expert_packing import even_split_in_node
from hecate.parallel.planners.rivals.source_split import SourceSplit, SplitPlan


def plan_laer(given: PlanInput) -> SplitPlan:
    """Two candidates for the numbers of copies, placed alike; each layer takes the cheaper by LAER-MoE's own cost.

    The rules are those of the LAER-MoE artifact (commit 72db5b7). Numbers: the same of every expert; or one by one to the highest load per
    copy, from one in each node if that fits, else from one, and a copy in each node more at a time once an expert has that many. Copies
    are placed by `place_copies`; a device may hold several of an expert, which then serve as many shares. Assignments are split evenly
    over the copies in their own node, else over all. The cost sums the devices' communication, where the slowest would decide, assumes that
    all devices are equally fast, and leaves out the transfer of the copies.

    LAER-MoE shards every expert over all devices, each of which gathers C copies. Its budget here is C = slots wherever these hold every
    expert, and a place for each expert at its owner beside the slots; a layer takes the cheaper (see `copy_places`).

    What differs from LAER-MoE: where an even number is not whole, the hottest get one more; its random swaps of two copies are left out;
    shares are not rounded; a copy that serves nothing is not made. Since an expert away from its owner takes a slot, layers with copies in
    half of the slots are candidates, too. LAER-MoE plans from the sum of the last passes, which is the caller's affair.
    """
    loads_LED = given.expected_LED
    quota_LED, weight_LED = np.empty_like(loads_LED), np.empty_like(loads_LED)
    for layer, (loads_ED, owner_E) in enumerate(zip(loads_LED, given.owner_LE, strict=True)):
        load_E, least = loads_ED.sum(-1), np.inf
        for places in copy_places(given.slots_D, owner_E):
            for number_E in _numbers(load_E, places, given.topology.num_nodes):
                copies_ED = place_copies(number_E, load_E, places, node_index(given.topology))
                quota_ED = even_split_in_node(copies_ED, loads_ED, given.topology)
                cost = _cost(given, loads_ED, copies_ED, quota_ED)
                if cost < least:
                    least, quota_LED[layer], weight_LED[layer] = cost, quota_ED, copies_ED * (quota_ED > 0)
    return SplitPlan(given.owner_LE, given.owned_LED | (quota_LED > 0), quota_LED, source_split=SourceSplit("in_node", weight_LED))


def _numbers(load_E: np.ndarray, places: CopyPlaces, num_nodes: int) -> list[np.ndarray]:
    """The candidates, each int64 [experts]; beside places at owners also with copies in half of the slots, so that experts can move."""
    totals = [places.number]
    if places.at_owners and places.number > len(load_E):
        totals.append(len(load_E) + (places.number - len(load_E) + 1) // 2)
    return [number_E for total in totals for number_E in (even_numbers(load_E, total), numbers_by_load(load_E, total, num_nodes))]


def even_numbers(load_E: np.ndarray, total: int) -> np.ndarray:
    """int64 [experts]: `total` copies, the same number of every expert, the remainder to the hottest."""
    each, more = divmod(total, len(load_E))
    number_E = np.full(len(load_E), each)
    number_E[np.argsort(-load_E, kind="stable")[:more]] += 1
    return number_E


def numbers_by_load(load_E: np.ndarray, total: int, num_nodes: int) -> np.ndarray:
    """int64 [experts]: at most `total` copies, to the highest load per copy; of experts that have one in each node, as many again."""
    experts, loads = len(load_E), load_E.tolist()
    start = num_nodes if num_nodes * experts <= total else 1
    number_E, left = [start] * experts, total - start * experts
    hottest = [(-load / start, expert) for expert, load in enumerate(loads)]
    heapq.heapify(hottest)
    while left and hottest:
        _, expert = heapq.heappop(hottest)
        more = 1 if number_E[expert] < num_nodes else num_nodes
        if more <= left:
            number_E[expert] += more
            left -= more
            heapq.heappush(hottest, (-loads[expert] / number_E[expert], expert))
    return np.array(number_E)


def _cost(given: PlanInput, loads_ED: np.ndarray, copies_ED: np.ndarray, quota_ED: np.ndarray) -> float:
    """Return the seconds: 4 · all devices' communication + the busiest one's computation."""
    cost, topology = given.cost, given.topology
    in_node_ED = (copies_ED @ node_membership(topology))[:, node_index(topology)]
    kept_ED = np.divide(copies_ED, in_node_ED, out=np.zeros_like(loads_ED), where=in_node_ED > 0)
    near = (np.where(in_node_ED > 0, loads_ED, 0.0) * (1 - kept_ED)).sum()
    far = np.where(in_node_ED > 0, 0.0, loads_ED).sum()
    seconds = cost.row_bytes * (near / topology.intra_node.bandwidth + far / topology.inter_node.bandwidth)
    compute = cost.assignment_flops * (1 + cost.assignment_backward) / min(topology.flops)
    return float(4 * seconds + compute * quota_ED.sum(0).max())


POLICY = Policy(plan_laer, own_split=True, collective="sharded")  # its experts are restored from parts
