"""What no plan can beat: a lower bound on the seconds of one MoE layer, by linear programming.

The bound is on the very model that plans are judged by (`hecate.parallel.cost_model`), for all plans with the given owners, any replicas
within the slots and any quotas. `hecate.parallel.bound_relaxation` relaxes three things, each downwards only:

- A replica may be a fraction. A rank serves at most that fraction of what it could serve with the whole.
- The distinct tokens behind c choices are a concave function of c, from 0. On [0, cap] it is nowhere below its chord, which is linear.
- Which choices of a rank leave its node, and which rank leads, is free: only the sums over experts must fit.

*Cutoff*: plans slower than some number of seconds need no relaxation, for they are above that number. Of the others much is known, e.g.
that no rank serves more choices than it can compute in that time. So min(cutoff, relaxation of the plans below it) is a bound at any
cutoff, and best where both are equal. Without it an expert ten times as hot as a rank can bear would be cured by a tenth of a replica on
each of ten ranks.
"""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import numpy as np

from hecate.parallel.bound_relaxation import LayerProblem, Reach, Relaxation
from hecate.parallel.planners.hecate import plan_hecate
from hecate.parallel.planners.plan import PlanInput

ROUNDS = 6
"""cutoffs to try"""
CLOSE = 4e-3
"""relative distance from the best that this relaxation can give at which to stop before that"""
UNCOUNTED = 1e-6
"""share of the seconds by which the cost model may miss what it takes for rounding"""


def lower_bound(given: PlanInput, layer: int, *, plan_seconds: float = np.inf) -> float:
    """Seconds that no plan for `layer` goes below under the given loads, as `LayerSeconds.total` counts them.

    It holds for every plan with the given owners and on each rank no more replicas of other ranks' experts than it has slots, executed
    as `given.execution` says. The solver's tolerances do not matter.

    Args:
        plan_seconds: of some plan, a good one if there is one: the nearer to the bound, the fewer linear programs it takes.

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
    known: dict[Reach, float] = dict.fromkeys(get_args(Reach), 0.0)  # at `high`; what holds of all plans below it holds of fewer
    cutoff = min(problem.static, plan_seconds)  # a start; the bound would hold with any
    if given.cost.expert_bytes and (replicated := float(plan_hecate(alone).seconds(alone).total[0])):
        cutoff = min(cutoff, replicated)
    low, high = 0.0, cutoff  # there is a plan of so many seconds
    points: list[tuple[float, float]] = []
    for _ in range(ROUNDS):
        found = known | {reach: max(v, Relaxation(problem, cutoff, reach).least()) for reach, v in known.items() if v < cutoff}
        value = min(found.values())
        points.append((cutoff, value))
        low = max(low, min(cutoff, value))
        if value < cutoff:
            high, known = cutoff, found
        if high - low <= CLOSE * high:
            break
        cutoff = _crossing(points[-2:], low, high)
    return low * (1 - UNCOUNTED)


def _crossing(points: list[tuple[float, float]], low: float, high: float) -> float:
    """Where bound and cutoff will probably be equal, between `low` and `high`, by one or two points (cutoff, bound)."""
    (x, v), (y, w) = points[0], points[-1]
    least = (high - low) / 16  # so that each round learns something
    if x != y and np.isfinite(v + w):
        # Replicas are at least served choices over caps, and those are about as the cutoff: bounds go as p + q / cutoff.
        q = (v - w) / (1 / x - 1 / y)
        p = v - q / x
        guess = (p + np.sqrt(max(p * p + 4 * q, 0.0))) / 2
        if low < guess < high:
            return float(np.clip(guess, low + least, high - least))
    return low + 4 * least
