"""Ours: replicas and token shares planned together, for devices and links that may all differ, chosen by predicted seconds.

A plan is made in two moves. *Reach* gives each device the experts that its own tokens want most, as many as one of a few rules says.
*Spill*: where devices are still too busy, they hand choices of their largest experts to those with time left, which get a replica for
it. Every rule with every degree of spill is a candidate; the cost model picks the best for each layer.
"""

from __future__ import annotations

import numpy as np

from hecate.parallel.compiled import compiled
from hecate.parallel.cost_model import overlap_degree
from hecate.parallel.planners.layer_loops import (
    CostNumbers,
    TopologyNumbers,
    busy_seconds,
    cost_numbers,
    even_quota_into,
    topology_numbers,
    total_seconds,
)
from hecate.parallel.planners.plan import Plan, PlanInput
from hecate.parallel.planners.spill import spill

SLACKS = (1.0, 1.06, 1.25, 1.6)
"""how far above the mean a device's compute may stay before it spills; and so much of the way to the unspilled maximum"""
_REACHES = 5


def plan_auto(given: PlanInput) -> Plan:
    """The fastest of a few candidate plans under the cost model, layer by layer; with `max_imbalance`, of those that keep to it.

    Never gives a device more replicas than it has slots. Before any load is known every expert counts as equally hot.
    """
    tokens_LED = np.ascontiguousarray(given.tokens_LED, dtype=np.float64)
    topology, cost = topology_numbers(given.topology), cost_numbers(given.cost, given.topology)
    owned_LED = given.owned_LED
    resident_LED = owned_LED if given.resident_LED is None else given.resident_LED | owned_LED
    where_LED, quota_LED = np.empty_like(owned_LED), np.empty_like(tokens_LED)
    hidden = overlap_degree(given.cost, given.topology)
    worth = (given.cost.expert_bytes + given.cost.reduced_bytes) / (4 * given.cost.row_bytes) if given.cost.row_bytes else np.inf
    for layer in range(given.num_layers):
        _plan_layer(
            given.owner_LE[layer],
            tokens_LED[layer],
            resident_LED[layer],
            np.asarray(given.slots_D, dtype=np.int64),
            hidden,
            worth,
            np.inf if given.max_imbalance is None else float(given.max_imbalance),
            topology,
            cost,
            where_LED[layer],
            quota_LED[layer],
        )
    return Plan(given.owner_LE, where_LED, quota_LED)


@compiled
def _plan_layer(
    owner: np.ndarray,
    tokens: np.ndarray,
    resident: np.ndarray,
    slots: np.ndarray,
    hidden: int,
    worth: float,
    max_imbalance: float,
    topology: TopologyNumbers,
    cost: CostNumbers,
    best_where: np.ndarray,
    best_quota: np.ndarray,
) -> None:
    """Fills `best_where` and `best_quota` [experts, ranks]."""
    where, base = np.empty_like(best_where), np.empty_like(best_quota)
    trial_where, trial_quota = np.empty_like(best_where), np.empty_like(best_quota)
    best_seconds, best_uneven = np.inf, np.inf
    last_copies = -1
    for rule in range(_REACHES):
        copies = _reach(rule, owner, tokens, slots, hidden, worth, topology, where)
        if copies == last_copies:
            continue
        last_copies = copies
        even_quota_into(where, tokens, topology, base)
        unspilled = _imbalance(tokens, base, topology, cost)
        for degree in range(len(SLACKS) + 1):
            trial_where[:] = where
            trial_quota[:] = base
            if degree > 0:
                slack = min(SLACKS[degree - 1], max_imbalance)
                if unspilled <= slack:
                    continue
                spill(owner, tokens, slots, slack, topology, cost, trial_where, trial_quota)
            uneven = max(_imbalance(tokens, trial_quota, topology, cost), max_imbalance) if max_imbalance < np.inf else 0.0
            seconds = total_seconds(owner, trial_where, trial_quota, tokens, resident, topology, cost)
            if uneven < best_uneven - 1e-9 or (uneven <= best_uneven + 1e-9 and seconds < best_seconds):
                best_seconds, best_uneven = seconds, uneven
                best_where[:] = trial_where
                best_quota[:] = trial_quota


@compiled
def _reach(
    rule: int,
    owner: np.ndarray,
    tokens: np.ndarray,
    slots: np.ndarray,
    hidden: int,
    worth: float,
    topology: TopologyNumbers,
    where: np.ndarray,
) -> int:
    """Fills `where` by rule; returns the number of replicas. Rules: owners only; one replica a node where its tokens are worth it; each
    device's experts whose tokens are worth it; as many as travel hidden; as many as fit."""
    experts, ranks = where.shape
    nodes = len(topology.uplink_N)
    where[:] = False
    for e in range(experts):
        where[e, owner[e]] = True
    if rule == 1:
        used = np.zeros(ranks, np.int64)
        wanted, best = np.empty(nodes), np.empty(nodes, np.int64)
        for e in range(experts):
            wanted[:] = 0.0
            best[:] = -1
            for d in range(ranks):
                n = topology.node_D[d]
                wanted[n] += tokens[e, d]
                if used[d] < slots[d] and (best[n] < 0 or used[d] < used[best[n]]):
                    best[n] = d
            for n in range(nodes):
                if n != topology.node_D[owner[e]] and wanted[n] > worth and best[n] >= 0:
                    where[e, best[n]] = True
                    used[best[n]] += 1
    elif rule > 1:
        for d in range(ranks):
            room = min(slots[d], hidden) if rule == 3 else slots[d]
            if room <= 0:
                continue
            if rule != 2 and room >= experts:
                where[:, d] = True
                continue
            for e in np.argsort(-tokens[:, d], kind="mergesort"):
                if room == 0 or (rule == 2 and tokens[e, d] <= worth):
                    break
                if not where[e, d]:
                    where[e, d] = True
                    room -= 1
    return where.sum()


@compiled
def _imbalance(tokens: np.ndarray, quota: np.ndarray, topology: TopologyNumbers, cost: CostNumbers) -> float:
    """Largest compute time over that of the same work shared by the devices' rates."""
    busy = busy_seconds(tokens, quota, topology, cost)
    mean = (busy * topology.rate_D).sum() / topology.rate_D.sum()
    return busy.max() / mean if mean > 0 else 1.0
