"""Compute a lower bound on the seconds of one MoE layer, which no plan can beat, by linear programming.

The bound is on the predictions of `hecate.parallel.cost.cost_model`, by which plans are compared, and holds for all plans with the given
owners, any replicas within the slots and any quotas. `testing.bound.bound_relaxation` makes three relaxations, each of which can
only lower the bound:

- A rank may hold a fraction of a replica. It then serves at most that fraction of what it could serve with the whole replica.
- The number of distinct tokens of c assignments is a concave function of c that is 0 at 0. On [0, cap] it is replaced by its chord,
  which is linear and nowhere above it.
- Which assignments of a rank leave its node, and which rank is the leader, is free: only the sums over experts must agree.

What the relaxations give away in part is taken back by bounding groups of plans apart: by how far tokens travel, and by whether replicas
are in their owners' nodes, in others or in both, which wait for other links. In each group one replica at least travels as a whole. The
group that the bound comes from is divided further, by how long the slowest rank computes: the chords end where it has no more time.

Plans slower than a *cutoff* need no relaxation, because the cutoff bounds them. The other plans obey further limits; for example, no
rank serves more assignments than it can compute in that time. So min(cutoff, relaxation of the plans below the cutoff) is a bound for
any cutoff, and it is best where the two are equal. Without a cutoff, an expert with ten times the load that one rank can serve would be
balanced by a tenth of a replica on each of ten ranks.
"""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import numpy as np

from hecate.parallel.planners.plan import PlanInput
from hecate.parallel.planners.policies.hecate_paper import plan_hecate_paper
from testing.bound.bound_relaxation import Copies, LayerProblem, Reach, Relaxation

ROUNDS = 4
"""the number of cutoffs to try"""
DIVISIONS, NARROW = 5, 1.2
"""how often a group is divided by how long the slowest rank computes; no more where the most that it may is so little over the least"""
CLOSE = 4e-3
"""the search stops early when the bound is within this relative distance of the best one that this relaxation can give"""
UNCOUNTED = 1e-6
"""the share of the seconds that the cost model may neglect as rounding"""


Group = tuple[Reach, Copies, float, float]
"""how far tokens travel, where replicas are, and between which seconds the slowest rank computes"""


def lower_bound(given: PlanInput, layer: int, *, plan_seconds: float = np.inf) -> float:
    """Return seconds that no plan for `layer` is faster than under the given loads, as `LayerSeconds.total` counts them.

    The bound holds for every plan with the given owners and with at most as many replicas of other ranks' experts on each rank as it
    has slots, executed as `given.execution` says. It does not depend on the solver's tolerances.

    Args:
        plan_seconds: the seconds of some plan. The nearer they are to the bound, the fewer linear programs are solved.

    Raises:
        UserError: scipy is not installed.
    """
    alone = replace(
        given,
        owner_LE=given.owner_LE[[layer]],
        loads_LED=None if given.loads_LED is None else given.loads_LED[[layer]],
        resident_LED=None if given.resident_LED is None else given.resident_LED[[layer]],
        present_LED=None if given.present_LED is None else given.present_LED[[layer]],
    )
    problem = LayerProblem(alone)
    if not problem.load_E.size:
        return problem.static
    cutoff = min(problem.static, plan_seconds)  # the first cutoff; the bound holds with any
    if given.cost.expert_bytes and (replicated := float(plan_hecate_paper(alone).seconds(alone).total[0])):
        cutoff = min(cutoff, replicated)
    low, high = 0.0, cutoff  # a plan of `high` seconds exists
    known = dict.fromkeys(_groups(problem, cutoff), 0.0)  # limits of plans below `high`, and so below any lower cutoff
    points: list[tuple[float, float]] = []
    for round_ in range(ROUNDS):
        found = _bounded(problem, cutoff, known)
        if round_ == 0:
            found = _divided(problem, cutoff, found)
        value = min(found.values())
        points.append((cutoff, value))
        low = max(low, min(cutoff, value))
        if value < cutoff:
            high, known = cutoff, found
        if high - low <= CLOSE * high:
            break
        cutoff = _crossing(points[-2:], low, high)
    return low * (1 - UNCOUNTED)


def _bounded(problem: LayerProblem, cutoff: float, known: dict[Group, float]) -> dict[Group, float]:
    """The groups' bounds for plans below the cutoff; of groups that do not decide, it may be what was known before."""
    found, looked_at = dict(known), set()
    while (lowest := min(found, key=lambda group: found[group])) not in looked_at and found[lowest] < cutoff:
        found[lowest] = max(found[lowest], Relaxation(problem, cutoff, *lowest).least())
        looked_at.add(lowest)
    return found


def _divided(problem: LayerProblem, cutoff: float, found: dict[Group, float]) -> dict[Group, float]:
    """The same plans in more groups: the one that decides is divided, again and again, by how long the slowest rank computes."""
    for _ in range(DIVISIONS):
        lowest = min(found, key=lambda group: found[group])
        reach, copies, least, most = lowest
        least, most = max(least, problem.balanced), min(most, cutoff)
        if found[lowest] >= cutoff * (1 - CLOSE) or reach in ("everywhere", "stay") or most <= NARROW * least:
            break
        bound, middle = found.pop(lowest), float(np.sqrt(least * most))
        found |= dict.fromkeys([(reach, copies, lowest[2], middle), (reach, copies, middle, lowest[3])], bound)
        found = _bounded(problem, cutoff, found)
    return found


def _groups(problem: LayerProblem, cutoff: float) -> list[Group]:
    """The groups of plans that are bounded apart: by how far tokens travel, and by where replicas are if that matters to the latency."""
    groups: list[Group] = []
    for reach in get_args(Reach):
        kinds = {} if reach in ("everywhere", "stay") else problem.kinds(reach)
        differ = len(kinds) > 1 and max(kinds.values()) - min(kinds.values()) > CLOSE * cutoff / 2
        groups += [(reach, kind, 0.0, np.inf) for kind in kinds] if differ else [(reach, "any", 0.0, np.inf)]
    return groups


def _crossing(points: list[tuple[float, float]], low: float, high: float) -> float:
    """Estimate the cutoff between `low` and `high` at which it equals the bound, from one or two known points (cutoff, bound)."""
    (x, v), (y, w) = points[0], points[-1]
    least = (high - low) / 16  # the smallest step, so that each round narrows the interval
    if x != y and np.isfinite(v + w):
        # Replicas are at least the served assignments divided by the caps, which grow with the cutoff: the bound is about p + q / cutoff.
        q = (v - w) / (1 / x - 1 / y)
        p = v - q / x
        guess = (p + np.sqrt(max(p * p + 4 * q, 0.0))) / 2
        if low < guess < high:
            return float(np.clip(guess, low + least, high - least))
    return low + 4 * least
