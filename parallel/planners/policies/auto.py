"""The default planner. It chooses replicas and token shares together, for any mix of devices and links, and keeps the candidate with the
lowest predicted time.

A candidate is made in two moves. *Replication* brings replicas to the ranks that hold an expert's tokens, by one of a few rules.
*Rebalancing* then lets devices that are still too busy hand assignments of their largest experts to devices with time left, which get
replicas of them. `CANDIDATES` is what was left of some hundreds of rules with degrees of rebalancing, after those that made less than
0.3 % of difference to every kind of layer had been dropped (`benchmarks.drawn_plans --ablation`).

*Local search* then changes the best candidate, and plans as other systems make them (`hecate.parallel.planners.search_starts`), replica
by replica (`hecate.parallel.planners.local_search`), for as long as a share of the layer's predicted seconds. It finds most where slots
are few.
"""

from __future__ import annotations

import numpy as np

from hecate.parallel.cost.cost_loops import (
    LayerLoads,
    busy_seconds,
    dispatch_seconds,
    even_quota_into,
    layer_loads,
    moved_bytes,
    replica_seconds,
)
from hecate.parallel.cost.cost_model import cost_numbers, overlap_degree, topology_numbers
from hecate.parallel.cost.cost_numbers import CostNumbers, TopologyNumbers
from hecate.parallel.loops import jit
from hecate.parallel.loops.array_loops import largest, total, where_largest
from hecate.parallel.loops.replica_lists import Replicas, copy_into, everywhere, no_replicas, only_owners, remove, room_for_plans
from hecate.parallel.planners.local_search import improve
from hecate.parallel.planners.plan import Plan, PlanInput, Policy
from hecate.parallel.planners.plan_changes import LEAST
from hecate.parallel.planners.rebalancing import rebalance
from hecate.parallel.planners.replication import NODES, NODES_BUT_ONE, OWNERS, WANTED, ExpertOrders, expert_orders, replicate
from hecate.parallel.planners.search_starts import BEST, HELD, STARTS, goes_slot_by_slot, start_with

_ALL_BUDGETS = 400
"""the most experts x ranks x budgets for which all budgets are tried: no longer than a layer of 64 experts on 32 ranks takes with one"""
_INSIDE = -1.0
CANDIDATES = (
    (NODES, (1.1, _INSIDE * 2.5)),
    (NODES_BUT_ONE, (1.05, _INSIDE * 4.0)),
    (WANTED, (_INSIDE * 1.05,)),
    (OWNERS, (1.02, 1.05, 1.1, 1.25)),
)
"""`replicate`'s rule, and degrees of rebalancing, beside none: how far above the mean a device's compute may stay; negative: no assignment
leaves its node. Those that win most often come first: what they cost spares looking closely at others."""

TIE = 1e-9
"""share of a layer's seconds: plans that differ by no more are equally fast"""
SEARCH_SHARE, SEARCH_SHARE_AFTER_ROUTER = 0.08, 0.02
"""the share of a layer's predicted seconds that the search for small changes may take by its estimate; less where ranks wait for it, since
there it must gain more than it takes"""
LEAST_SEARCH, LEAST_SEARCH_AFTER_ROUTER = 0.2, 0.1
"""the seconds times experts times ranks that the search may take however fast the layer is, so that small layers are searched through"""
_EVEN = 1.005
"""where every rank has every expert and the busiest device has at most so many times the mean to do, there is nothing to search for"""
_PROMISING = 1.3
"""a start that takes more than so many times the seconds of the best plan is not searched from"""
_GIVE_SECONDS = 1.2e-9
"""about what a plan made slot by slot takes for each slot, and others for each rank, times experts and ranks"""
_EXPERT_SECONDS, _RANK_SECONDS = 5e-8, 5e-7
"""about what making and pricing another plan takes beside that, for each expert and for each rank"""
_ROUND_SECONDS = 1e-6
"""about what a round of changes to a plan takes for each expert or rank"""


def plan_auto(given: PlanInput) -> Plan:
    """The fastest of a few candidate plans under the cost model, layer by layer; with `max_imbalance`, of those that keep to it.

    With `max_imbalance` there is no local search. Never gives a device more replicas than it has slots. Before any load is known every
    expert counts as equally hot.

    The moves are greedy, so with more slots they may end up worse. Where a layer is small all smaller budgets are tried as well, so that
    more slots for everyone seldom cost seconds. Of plans that are equally fast the one that moves the fewest bytes, of those the first.
    """
    tokens_LSE = given.tokens_LSE
    slots_D = np.minimum(np.array(given.slots_D, dtype=np.int64), given.num_experts)
    most = int(slots_D.max())
    resident_LED = np.zeros((given.num_layers, 0, 0), np.bool_) if given.resident_LED is None else given.resident_LED
    # Arrays that lie otherwise, or cannot be written, would be compiled for anew.
    owner_LE, resident_LED = np.array(given.owner_LE, dtype=np.int64), np.array(resident_LED, dtype=np.bool_)
    topology, cost = topology_numbers(given.topology), cost_numbers(given.cost, given.topology, given.execution)
    hidden = overlap_degree(given.cost, given.topology) if given.cost.expert_bytes else given.num_experts
    cost_in_rows = (given.cost.expert_bytes + given.cost.reduced_bytes) / (4 * given.cost.row_bytes) if given.cost.row_bytes else np.inf
    search_share, least_search = SEARCH_SHARE, LEAST_SEARCH
    if given.waited_for or given.execution.knows_loads:
        search_share, least_search = SEARCH_SHARE_AFTER_ROUTER, LEAST_SEARCH_AFTER_ROUTER
    base, trial, best = room_for_plans(given.num_experts, given.world_size)
    firsts, like_L = _equal_layers(owner_LE, tokens_LSE, resident_LED)
    if len(firsts) < given.num_layers:
        owner_LE, tokens_LSE, resident_LED = owner_LE[firsts], tokens_LSE[firsts], resident_LED[firsts]
    shape = (len(firsts), given.num_experts, given.world_size)
    where_LED, quota_LED = np.zeros(shape, np.bool_), np.zeros(shape)
    first = 0
    while first < len(firsts):
        # Plain Python plans layer by layer, so that machine code takes over as soon as it is there.
        some = slice(first, len(firsts) if jit.have_machine_code() else first + 1)
        _plan_layers(
            owner_LE[some],
            tokens_LSE[some],
            resident_LED[some],
            slots_D,
            0 if given.num_experts * given.world_size * (most + 1) <= _ALL_BUDGETS else most,
            hidden,
            float(cost_in_rows),
            np.inf if given.max_imbalance is None else float(given.max_imbalance),
            topology,
            cost,
            base,
            trial,
            best,
            _RULES,
            _SLACKS,
            search_share,
            least_search / (given.num_experts * given.world_size),
            where_LED[some],
            quota_LED[some],
        )
        first = some.stop
    if len(firsts) < given.num_layers:
        where_LED, quota_LED = where_LED[like_L], quota_LED[like_L]
    return Plan(given.owner_LE, where_LED, quota_LED)


def _equal_layers(*inputs_L: np.ndarray) -> tuple[list[int], list[int]]:
    """The layers whose inputs no earlier layer has, and for each layer its place among these.

    Layers with one expert all have the same loads, and there may be hundreds of them: each plan is made once.
    """
    if len(inputs_L[0]) == 1:
        return [0], [0]
    places: dict[tuple[bytes, ...], int] = {}
    firsts: list[int] = []
    like_L: list[int] = []
    for layer, inputs in enumerate(zip(*inputs_L, strict=True)):
        like_L.append(places.setdefault(tuple(part.tobytes() for part in inputs), len(places)))
        if like_L[-1] == len(firsts):
            firsts.append(layer)
    return firsts, like_L


_DEGREES = max(len(slacks) for _, slacks in CANDIDATES)
_RULES = np.array([rule for rule, _ in CANDIDATES])
_SLACKS = np.array([(0.0, *slacks, *(0.0,) * (_DEGREES - len(slacks))) for _, slacks in CANDIDATES])


@jit.entry
def _plan_layers(
    owner_LE: np.ndarray,
    tokens_LSE: np.ndarray,
    resident_LED: np.ndarray,
    slots: np.ndarray,
    least_slots: int,
    hidden: int,
    cost_in_rows: float,
    max_imbalance: float,
    topology: TopologyNumbers,
    cost: CostNumbers,
    base: Replicas,
    trial: Replicas,
    best: Replicas,
    rules_R: np.ndarray,
    slacks_RS: np.ndarray,
    search_share: float,
    least_search: float,
    where_LED: np.ndarray,
    quota_LED: np.ndarray,
) -> None:
    """Fills `where_LED` and `quota_LED`; `base`, `trial` and `best` are room to work in.

    Budgets: all of each device's slots, at most one less than the most, ..., at most `least_slots`. With the most slots a plan is often so
    fast that little else has to be looked at closely.
    """
    bounded = max_imbalance < np.inf
    single, ranks = len(topology.uplink_N) == 1, len(topology.node_D)
    room, rates = np.empty(ranks, np.int64), total(topology.rate_D)
    for layer in range(len(owner_LE)):
        owner, resident = owner_LE[layer], resident_LED[layer]
        loads = layer_loads(tokens_LSE[layer], topology)
        orders = expert_orders(owner, slots, loads, topology)
        best_seconds, best_uneven = np.inf, np.inf
        for budget in range(int(largest(slots)), least_slots - 1, -1):
            for d in range(ranks):
                room[d] = min(slots[d], budget)
            for r in range(len(rules_R)):
                rule = int(rules_R[r])
                if rule in (NODES, NODES_BUT_ONE) and single:
                    continue
                only_owners(base, owner)
                replicate(rule, owner, room, cost_in_rows, orders, loads, topology, base)
                fixed = replica_seconds(owner, base, resident, topology, cost)
                if fixed > best_seconds * (1 + TIE) and not bounded:  # rebalancing only adds replicas
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
                    if busy + fixed > best_seconds * (1 + TIE) and not bounded:
                        continue
                    added = fixed if degree == 0 else replica_seconds(owner, tried, resident, topology, cost)
                    if busy + added > best_seconds * (1 + TIE) and not bounded:
                        continue
                    enough = np.inf if bounded else best_seconds * (1 + 2 * TIE) - busy - added
                    dispatch = base_dispatch if degree == 0 else dispatch_seconds(tried, loads, topology, cost, enough)
                    seconds = busy + added + dispatch
                    uneven = max(busy / mean, max_imbalance) if bounded and mean > 0 else 0.0
                    if uneven < best_uneven - 1e-9:
                        best_seconds, best_uneven = seconds, uneven
                        copy_into(tried, best)
                    elif uneven <= best_uneven + 1e-9 and _preferred(
                        seconds, best_seconds, owner, resident, loads, topology, cost, tried, best
                    ):
                        best_seconds, best_uneven = min(seconds, best_seconds), uneven
                        copy_into(tried, best)
            if not bounded and not (everywhere(best) and _is_even(best, loads, topology, cost)):
                allowance = max(search_share * best_seconds, least_search)
                best_seconds = _search(owner, room, resident, hidden, orders, loads, topology, cost, allowance, best_seconds, trial, best)
        if not everywhere(best):
            copy_into(best, trial)
            if _without_idle(owner, trial):
                found = _plan_seconds(owner, resident, loads, topology, cost, best_seconds * (1 + 2 * TIE), trial)
                if found <= best_seconds * (1 + TIE):
                    copy_into(trial, best)
        for e in range(len(owner)):
            for c in range(best.count_E[e]):
                d = best.rank_EC[e, c]
                where_LED[layer, e, d] = True
                quota_LED[layer, e, d] = best.quota_ED[e, d]


@jit.loop
def _is_even(plan: Replicas, loads: LayerLoads, topology: TopologyNumbers, cost: CostNumbers) -> bool:
    """Whether the busiest device has hardly more to do than if all shared the work by their rates."""
    busy_D, work = busy_seconds(plan, loads, topology, cost), 0.0
    for d in range(len(busy_D)):
        work += busy_D[d] * topology.rate_D[d]
    return largest(busy_D) * total(topology.rate_D) <= _EVEN * work


@jit.loop
def _search(
    owner: np.ndarray,
    room: np.ndarray,
    resident: np.ndarray,
    hidden: int,
    orders: ExpertOrders,
    loads: LayerLoads,
    topology: TopologyNumbers,
    cost: CostNumbers,
    left: float,
    seconds: float,
    trial: Replicas,
    best: Replicas,
) -> float:
    """Improve `best`, which takes `seconds`, by small changes; then plans that begin elsewhere, while the time lasts; returns the seconds.

    What a search finds depends on where it begins.
    """
    ranks, slots = len(room), 0
    for d in range(ranks):
        slots += room[d]
    size = ranks + len(owner)
    begins_X = np.full(STARTS, np.inf)
    begins_X[BEST] = 0.0  # it comes first
    for start in range(BEST + 1, STARTS):
        given = _GIVE_SECONDS * (slots if goes_slot_by_slot(start) else ranks) * size
        begins = _EXPERT_SECONDS * len(owner) + _RANK_SECONDS * ranks + given
        if begins <= left and (start != HELD or len(resident) > 0):
            left -= begins
            start_with(start, owner, room, resident, hidden, orders, loads, topology, trial)
            begins_X[start] = _plan_seconds(owner, resident, loads, topology, cost, 2 * seconds, trial)
            if _preferred(begins_X[start], seconds, owner, resident, loads, topology, cost, trial, best):
                seconds = min(begins_X[start], seconds)
                copy_into(trial, best)
    for _ in range(STARTS):
        if left < _ROUND_SECONDS * size:
            break
        start = where_largest(-begins_X)  # the most promising first
        if begins_X[start] > _PROMISING * seconds:
            break
        begins_X[start] = np.inf
        if start == BEST:
            copy_into(best, trial)
        else:
            start_with(start, owner, room, resident, hidden, orders, loads, topology, trial)
        left -= improve(owner, room, resident, loads, topology, cost, trial, left, False)
        found = _plan_seconds(owner, resident, loads, topology, cost, seconds * (1 + 2 * TIE), trial)
        if _preferred(found, seconds, owner, resident, loads, topology, cost, trial, best):
            seconds = min(found, seconds)
            copy_into(trial, best)
    return seconds


@jit.loop
def _preferred(
    found: float,
    seconds: float,
    owner: np.ndarray,
    resident: np.ndarray,
    loads: LayerLoads,
    topology: TopologyNumbers,
    cost: CostNumbers,
    tried: Replicas,
    best: Replicas,
) -> bool:
    """Whether a plan that takes `found` seconds goes before the best one so far, which takes `seconds`."""
    if found < seconds * (1 - TIE):
        return True
    if found > seconds * (1 + TIE):
        return False
    # Replicas that serve nothing will be given up.
    needed = no_replicas(len(owner), len(topology.node_D))
    moved = np.empty(2)
    for x in range(2):
        copy_into(tried if x == 0 else best, needed)
        if not everywhere(needed):
            _without_idle(owner, needed)
        moved[x] = moved_bytes(owner, needed, resident, loads, topology, cost)
    return moved[0] < moved[1] * (1 - TIE)


@jit.loop
def _without_idle(owner: np.ndarray, plan: Replicas) -> bool:
    """Take away the replicas that serve nothing; returns whether there were any."""
    found = False
    for e in range(len(owner)):
        c = 0
        while c < plan.count_E[e]:
            d = plan.rank_EC[e, c]
            if d != owner[e] and plan.quota_ED[e, d] <= LEAST:
                freed = plan.quota_ED[e, d]
                remove(plan, e, d)
                plan.quota_ED[e, owner[e]] += freed
                found = True
            else:
                c += 1
    return found


@jit.loop
def _plan_seconds(
    owner: np.ndarray,
    resident: np.ndarray,
    loads: LayerLoads,
    topology: TopologyNumbers,
    cost: CostNumbers,
    enough: float,
    replicas: Replicas,
) -> float:
    """Seconds of a plan; where they are `enough` or more, `enough` or more."""
    seconds = largest(busy_seconds(replicas, loads, topology, cost)) + replica_seconds(owner, replicas, resident, topology, cost)
    return seconds + dispatch_seconds(replicas, loads, topology, cost, max(enough - seconds, 0.0))


POLICY = Policy(plan_auto)
