"""Expert parallelism: no replicas, tokens travel."""

from hecate.parallel.planners.plan import Plan, PlanInput, Policy


def plan_static_ep(given: PlanInput) -> Plan:
    """Every expert on its owner alone."""
    return Plan(given.owner_LE, given.owned_LED)


POLICY = Policy(plan_static_ep)
