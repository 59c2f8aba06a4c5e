"""Copies that bring every rank of a node under the lowest feasible bound (UltraEP, PKU-DASYS and Dots-Infra)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from hecate.parallel.planners.plan import Plan, PlanInput, Policy
from hecate.parallel.planners.rivals.whole_loads import Moves, plan_whole_loads

FIRST_TRIES = 3
MIN_ASSIGNMENTS = 1024
"""the fewest that a copy takes over, where a bound is searched for because the first tries have failed"""


def plan_ultraep(given: PlanInput) -> Plan:
    """What a rank has above a bound goes to the ranks of its node with the most room under it; the bound is the lowest found feasible.

    The rule is that of UltraEP's quota planner with its defaults (commit 94cab09): balance 1.0, 1 % of tolerance, at least 1024
    assignments a copy where the bound is searched for. Ranks above the bound give, those with the most first, their largest experts
    first, and keep at least one assignment of each; a copy takes as much as its rank has room for. Ties go to the lowest index. Each node
    is planned alone, and no copy leaves its expert's node. Its budget is the slots, as UltraEP's are redundant slots beside the owned
    experts.

    UltraEP splits an expert's assignments as plans do here: a rank's own first, the rest in proportion to what is left of the quotas,
    which is all in one node; but each source rounds to whole assignments. Here ranks may own any number of experts, and have different
    numbers of slots.

    For exact loads; the fractions of expected ones are rounded to whole assignments. Devices count as equally fast.
    """
    topology = given.topology
    nodes = [topology.ranks_of_node(node) for node in range(topology.num_nodes)]
    return plan_whole_loads(given, partial(_moved, nodes=nodes, slots_D=given.slots_D.tolist()))


def _moved(whole_E: list[int], owner_E: list[int], nodes: list[list[int]], slots_D: list[int]) -> Moves:
    moved: Moves = {}
    for ranks in nodes:
        own = {rank: {expert: whole_E[expert] for expert, owner in enumerate(owner_E) if owner == rank} for rank in ranks}
        moved |= _in_node(own, {rank: slots_D[rank] for rank in ranks})
    return moved


def _in_node(own: dict[int, dict[int, int]], slots: dict[int, int]) -> Moves:
    """
    Args:
        own: the loads of each rank's own experts.
        slots: of each rank.
    """
    busiest = max(sum(load_of.values()) for load_of in own.values())
    mean = -(-sum(sum(load_of.values()) for load_of in own.values()) // len(own))
    most = max(busiest, mean)
    bound = mean - -mean // 100  # rounded up
    for _ in range(FIRST_TRIES):
        moved = _under(bound, own, slots, None)
        if moved is not None:
            return moved
        bound = min(most, bound + max(1, -(-most // 100)))
    bound = _lowest_feasible(mean, most, lambda tried: _under(tried, own, slots, MIN_ASSIGNMENTS) is not None)
    return _under(bound, own, slots, MIN_ASSIGNMENTS) or {}


def _lowest_feasible(low: int, high: int, feasible: Callable[[int], bool]) -> int:
    """Search from `low` to `high` in steps of a fifth, taking feasibility to be monotone; `high` is always feasible."""
    if feasible(low):
        return low
    low = min(low + 1, high)
    while low < high:
        distance = high - low
        tried = list(range(low, high)) if distance <= 4 else [low + distance * fifth // 5 for fifth in range(1, 5)]
        found = next((place for place, bound in enumerate(tried) if feasible(bound)), None)
        if distance <= 4:
            return high if found is None else tried[found]
        if found is None:
            low = tried[-1] + 1
        else:
            high = tried[found]
            low = tried[found - 1] + 1 if found else low
    return low


def _under(bound: int, own: dict[int, dict[int, int]], slots: dict[int, int], at_least: int | None) -> Moves | None:
    """Move what ranks have above the bound.

    Args:
        at_least: the fewest assignments of a copy; None: what is left to move, over the ranks that can take some of it.

    Returns:
        None if not all of it finds room.
    """
    load = {rank: sum(load_of.values()) for rank, load_of in own.items()}
    room = {rank: max(bound - has, 0) for rank, has in load.items()}
    free, moved = slots.copy(), {}
    if sum(max(has - bound, 0) for has in load.values()) > sum(room.values()):
        return None
    for source in sorted(load, key=lambda rank: (-load[rank], rank)):
        need = load[source] - bound
        for expert in sorted(own[source], key=lambda e: (-own[source][e], e)):
            movable = max(own[source][expert] - 1, 0)
            while need > 0 and movable > 0:
                targets = [rank for rank in room if room[rank] > 0 and free[rank] > 0 and (expert, rank) not in moved]
                floor = at_least or -(-need // max(len(targets), 1))
                targets = [rank for rank in targets if min(need, room[rank], movable) >= floor]
                if not targets:
                    break
                target = max(targets, key=lambda rank: (room[rank], -rank))
                taken = min(need, room[target], movable)
                moved[expert, target] = taken
                room[target] -= taken
                need -= taken
                movable -= taken
                free[target] -= 1
        if need > 0:
            return None
    return moved


POLICY = Policy(plan_ultraep)
