"""The default planner. It chooses replicas and token shares together, for any mix of devices and links, and keeps the candidate with the
lowest predicted time.

A candidate is made in two moves. *Replication* brings replicas to the ranks that hold an expert's tokens, by one of a few rules.
*Rebalancing* then lets devices that are still too busy hand assignments of their largest experts to devices with time left, which get
replicas of them. `CANDIDATES` is what was left of some hundreds of rules with degrees of rebalancing, after those that made little
difference to 312 layers had been dropped (`benchmarks.plan_quality`, with the slots that memory gives and with four).

*Local search* then changes the best candidate, and two simple plans, replica by replica (`hecate.parallel.planners.local_search`), for as
long as a share of the layer's predicted seconds. It finds most where slots are few.
"""

from __future__ import annotations

import numpy as np

from hecate.parallel import jit
from hecate.parallel.array_loops import largest, total
from hecate.parallel.cost_loops import (
    LayerLoads,
    busy_seconds,
    dispatch_seconds,
    even_quota_into,
    layer_loads,
    replica_seconds,
)
from hecate.parallel.cost_model import cost_numbers, overlap_degree, topology_numbers
from hecate.parallel.cost_numbers import CostNumbers, TopologyNumbers
from hecate.parallel.planners.local_search import improve
from hecate.parallel.planners.plan import Plan, PlanInput
from hecate.parallel.planners.rebalancing import rebalance
from hecate.parallel.planners.replication import DEALT, HOT, NODES, OWNERS, WANTED, Wishes, replicate, wishes
from hecate.parallel.replica_lists import Replicas, copy_into, everywhere, no_replicas, only_owners

_ALL_BUDGETS = 400
"""experts x ranks x budgets: where all budgets together take no longer than the one of a layer of 64 experts on 32 ranks"""
_INSIDE = -1.0
CANDIDATES = (
    ((NODES, 0.25, 0.25), (1.05, 2.5)),
    ((NODES, 0.0, 0.5), (1.1, _INSIDE * 2.5)),
    ((NODES, -1.0, 1.0), (1.05, _INSIDE * 4.0)),
    ((WANTED, 1.0, 0.0), (_INSIDE * 1.05,)),
    ((OWNERS, 0.0, 0.0), (1.05, 1.1, 1.25)),
    ((WANTED, 0.75, 0.0), (1.0,)),
    ((WANTED, 0.5, 0.0), (1.0,)),
    ((HOT, 1.0, 0.0), (1.0,)),
)
"""`replicate`'s rule, share and factor; and degrees of rebalancing, beside none: how far above the mean a device's compute may stay;
negative: no assignment leaves its node. Those that win most often come first: what they cost spares looking closely at others."""

SEARCH_SHARE = 0.05
"""of a layer's predicted seconds: how long the search for small changes may take"""
_DEAL_SECONDS = 1e-9
"""about what `deal` takes for each slot and each expert or rank"""


def plan_auto(given: PlanInput) -> Plan:
    """The fastest of a few candidate plans under the cost model, layer by layer; with `max_imbalance`, of those that keep to it.

    Never gives a device more replicas than it has slots. Before any load is known every expert counts as equally hot.

    The moves are greedy, so with more slots they may end up worse. Where a layer is small all smaller budgets are tried as well, smallest
    first, so that more slots for everyone never cost seconds. Of plans that are equally fast the first, everything everywhere before all
    others.
    """
    # The compiled loops read a source's loads of all experts one after the other.
    tokens_LSE = np.ascontiguousarray(given.expected_LED.swapaxes(1, 2), dtype=np.float64)
    shape = (given.num_layers, given.num_experts, given.world_size)
    where_LED, quota_LED = np.zeros(shape, np.bool_), np.zeros(shape)
    slots_D = np.minimum(np.array(given.slots_D, dtype=np.int64), given.num_experts)
    most = int(slots_D.max())
    resident_LED = np.zeros((given.num_layers, 0, 0), np.bool_) if given.resident_LED is None else given.resident_LED
    # Arrays that lie otherwise, or cannot be written, would be compiled for anew.
    owner_LE, resident_LED = np.array(given.owner_LE, dtype=np.int64), np.array(resident_LED, dtype=np.bool_)
    topology, cost = topology_numbers(given.topology), cost_numbers(given.cost, given.topology, given.execution)
    hidden = overlap_degree(given.cost, given.topology) if given.cost.expert_bytes else given.num_experts
    worth = (given.cost.expert_bytes + given.cost.reduced_bytes) / (4 * given.cost.row_bytes) if given.cost.row_bytes else np.inf
    base, trial, best = (no_replicas(given.num_experts, given.world_size) for _ in range(3))
    first = 0
    while first < given.num_layers:
        # Plain Python plans layer by layer, so that machine code takes over as soon as it is there.
        some = slice(first, given.num_layers if jit.have_machine_code() else first + 1)
        _plan_layers(
            owner_LE[some],
            tokens_LSE[some],
            resident_LED[some],
            slots_D,
            0 if given.num_experts * given.world_size * (most + 1) <= _ALL_BUDGETS else most,
            hidden,
            float(worth),
            np.inf if given.max_imbalance is None else float(given.max_imbalance),
            topology,
            cost,
            base,
            trial,
            best,
            _REPLICATIONS,
            _SLACKS,
            SEARCH_SHARE,
            where_LED[some],
            quota_LED[some],
        )
        first = some.stop
    return Plan(given.owner_LE, where_LED, quota_LED)


_REPLICATIONS = np.array([rule for rule, _ in CANDIDATES])
_SLACKS = np.array([(0.0, *slacks, *(0.0,) * (4 - len(slacks))) for _, slacks in CANDIDATES])


@jit.entry
def _plan_layers(
    owner_LE: np.ndarray,
    tokens_LSE: np.ndarray,
    resident_LED: np.ndarray,
    slots: np.ndarray,
    least_slots: int,
    hidden: int,
    worth: float,
    max_imbalance: float,
    topology: TopologyNumbers,
    cost: CostNumbers,
    base: Replicas,
    trial: Replicas,
    best: Replicas,
    rules_R: np.ndarray,
    slacks_RS: np.ndarray,
    search_share: float,
    where_LED: np.ndarray,
    quota_LED: np.ndarray,
) -> None:
    """Fills `where_LED` and `quota_LED`; `base`, `trial` and `best` are room to work in.

    Budgets: at most `least_slots` of each device's slots, one more, ..., all. A budget's plan does not depend on those that follow.
    """
    bounded = max_imbalance < np.inf
    single, ranks = len(topology.uplink_N) == 1, len(topology.node_D)
    room, rates = np.empty(ranks, np.int64), total(topology.rate_D)
    for layer in range(len(owner_LE)):
        owner, resident = owner_LE[layer], resident_LED[layer]
        loads = layer_loads(tokens_LSE[layer], topology)
        wish = wishes(owner, slots, loads, topology)
        best_seconds, best_uneven = np.inf, np.inf
        for budget in range(least_slots, int(largest(slots)) + 1):
            for d in range(ranks):
                room[d] = min(slots[d], budget)
            for r in range(len(rules_R)):
                rule, share, factor = int(rules_R[r, 0]), rules_R[r, 1], rules_R[r, 2]
                if rule == NODES and single:
                    continue
                only_owners(base, owner)
                replicate(rule, share, factor, owner, room, hidden, worth, wish, loads, topology, base)
                fixed = replica_seconds(owner, base, resident, topology, cost)
                if fixed >= best_seconds and not bounded:  # rebalancing only adds replicas
                    continue
                even_quota_into(base, loads, topology)
                base_busy = busy_seconds(base, loads, topology, cost)
                base_busiest, mean = largest(base_busy), 0.0
                for d in range(ranks):
                    mean += base_busy[d] * topology.rate_D[d]
                mean /= rates
                sends = np.inf if bounded or best_seconds == np.inf else 4.0 * (best_seconds - fixed - mean)
                base_dispatch = dispatch_seconds(base, loads, topology, cost, sends)
                for degree in range(slacks_RS.shape[1]):
                    if degree > 0:
                        if base_dispatch >= sends:  # rebalancing would have to spare most of it
                            break
                        slack, across = min(abs(slacks_RS[r, degree]), max_imbalance), slacks_RS[r, degree] > 0
                        if slack == 0 or (single and not across):
                            continue
                        if base_busiest <= slack * mean or (not bounded and slack * mean * 0.9 + fixed >= best_seconds):
                            continue
                        copy_into(base, trial)
                        rebalance(owner, base_busy, room, slack, across, topology, trial)
                    tried = base if degree == 0 else trial
                    busy = base_busiest if degree == 0 else largest(busy_seconds(tried, loads, topology, cost))
                    if busy + fixed > best_seconds and not bounded:
                        continue
                    added = fixed if degree == 0 else replica_seconds(owner, tried, resident, topology, cost)
                    if busy + added > best_seconds and not bounded:
                        continue
                    enough = np.inf if bounded else best_seconds - busy - added
                    dispatch = base_dispatch if degree == 0 else dispatch_seconds(tried, loads, topology, cost, enough)
                    seconds = busy + added + dispatch
                    uneven = max(busy / mean, max_imbalance) if bounded and mean > 0 else 0.0
                    # Other loads than those predicted leave tokens where they are, if everything is everywhere.
                    faster = seconds < best_seconds or (seconds == best_seconds and everywhere(tried))
                    if uneven < best_uneven - 1e-9 or (uneven <= best_uneven + 1e-9 and faster):
                        best_seconds, best_uneven = seconds, uneven
                        copy_into(tried, best)
            if not bounded and not everywhere(best):
                best_seconds = _search(owner, room, resident, hidden, worth, wish, loads, topology, cost, search_share, best_seconds, trial, best)
        for e in range(len(owner)):
            for c in range(best.count_E[e]):
                d = best.rank_EC[e, c]
                where_LED[layer, e, d] = True
                quota_LED[layer, e, d] = best.quota_ED[e, d]


@jit.loop
def _search(
    owner: np.ndarray,
    room: np.ndarray,
    resident: np.ndarray,
    hidden: int,
    worth: float,
    wish: Wishes,
    loads: LayerLoads,
    topology: TopologyNumbers,
    cost: CostNumbers,
    share: float,
    seconds: float,
    trial: Replicas,
    best: Replicas,
) -> float:
    """Improve `best`, which takes `seconds`, by small changes; then plans that begin elsewhere, while the time lasts; returns the seconds.

    All that a search finds depends on where it begins. One start has all slots dealt to hot experts, the other has no replicas.
    """
    ranks, slots, left = len(room), 0.0, share * seconds
    for d in range(ranks):
        slots += room[d]
    for start in range(3):
        if start == 0:
            copy_into(best, trial)
        else:
            rule = DEALT if start == 1 else OWNERS
            if rule == DEALT and slots * (ranks + len(owner)) * _DEAL_SECONDS > left:
                continue
            only_owners(trial, owner)
            replicate(rule, 0.0, 0.0, owner, room, hidden, worth, wish, loads, topology, trial)
            even_quota_into(trial, loads, topology)
        left -= improve(owner, room, resident, loads, topology, cost, trial, left)
        found = largest(busy_seconds(trial, loads, topology, cost)) + replica_seconds(owner, trial, resident, topology, cost)
        if found < seconds:
            found += dispatch_seconds(trial, loads, topology, cost, seconds - found)
            if found < seconds:
                seconds = found
                copy_into(trial, best)
        if left <= 0:
            break
    return seconds
