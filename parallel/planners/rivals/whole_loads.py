"""Plans by rules that hand whole assignments of an expert from its owner to other ranks.

Rules of exact loads count in integers. Expected loads are fractions. So a rule sees them rounded, and the quotas that it gives are
stretched to the load of each expert. Loads that are whole stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable

from hecate.parallel.planners.plan import Plan, PlanInput

Moves = dict[tuple[int, int], int]
"""(expert, rank) -> assignments that the rank takes over from the expert's owner"""
Rule = Callable[[list[int], list[int]], Moves]
"""a function of the experts' loads and owners in one layer"""


def plan_whole_loads(given: PlanInput, rule: Rule) -> Plan:
    """Plan each layer by the rule; what it does not move is served at home."""
    load_LE, where_LED = given.expected_LED.sum(-1), given.owned_LED
    quota_LED = where_LED * load_LE[..., None]
    for layer, (load_E, owner_E) in enumerate(zip(load_LE.tolist(), given.owner_LE.tolist(), strict=True)):
        whole_E = [round(load) for load in load_E]
        kept_E = whole_E.copy()
        for (expert, rank), taken in rule(whole_E, owner_E).items():
            where_LED[layer, expert, rank] = True
            quota_LED[layer, expert, rank] = load_E[expert] * (taken / whole_E[expert])
            kept_E[expert] -= taken
            quota_LED[layer, expert, owner_E[expert]] = load_E[expert] * (kept_E[expert] / whole_E[expert])
    return Plan(given.owner_LE, where_LED, quota_LED)
