"""Choose among plans by what they would have cost in the last steps, for `benchmarks.prediction`; no planner does this.

The loads that come are never those that were predicted. Of two plans that are equally fast under the prediction one may bear a wrong
prediction better: for example, the one that keeps tokens on their ranks, whatever they are. So candidates are priced on the loads of each
of the last steps, every source's assignments divided as the plan divides those that it was made for
(`Plan.traffic`).

Shapes: S steps, C candidates, L layers, E experts, D ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hecate.parallel.cost.cost_model import price_traffic
from hecate.parallel.planners.plan import Plan, PlanInput


def seconds_over(plan: Plan, given: PlanInput, recent_SLED: np.ndarray) -> np.ndarray:
    """float64 [steps, layers]: what each layer would take under the loads of each of some steps.

    Args:
        plan: made from `given`.
        recent_SLED: the loads, as many assignments as those of `given` stand for.
    """

    def each_step(values: np.ndarray) -> np.ndarray:
        return np.broadcast_to(values, (len(recent_SLED), *values.shape))

    traffic_SLXD = np.stack([plan.traffic(given.expected_LED, true_LED, given.topology) for true_LED in recent_SLED.astype(np.float64)])
    resident_SLED = None if given.resident_LED is None else each_step(given.resident_LED)
    return price_traffic(
        each_step(plan.owner_LE),
        each_step(plan.where_LED),
        traffic_SLXD,
        given.topology,
        given.cost,
        execution=given.execution,
        resident_ED=resident_SLED,
    ).seconds.total


def cheapest_over(candidates: Sequence[Plan], given: PlanInput, recent_SLED: np.ndarray) -> Plan:
    """Return for each layer the plan with the smallest mean seconds over some steps; of equal ones the first.

    Args:
        candidates: plans made from `given`, all with quotas or all without.
        recent_SLED: see `seconds_over`.
    """
    best_L = np.argmin([seconds_over(plan, given, recent_SLED).mean(0) for plan in candidates], axis=0)
    layers = np.arange(len(best_L))
    where_LED = np.stack([plan.where_LED for plan in candidates])[best_L, layers]
    quotas = [plan.quota_LED for plan in candidates if plan.quota_LED is not None]
    assert len(quotas) in (0, len(candidates)), "some candidates have quotas, and others have none"
    return Plan(given.owner_LE, where_LED, np.stack(quotas)[best_L, layers] if quotas else None)
