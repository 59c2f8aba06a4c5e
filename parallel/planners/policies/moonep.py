"""Filling every rank to the same number of assignments (MoonEP, Moonshot AI)."""

from __future__ import annotations

from functools import partial

from hecate.parallel.planners.plan import PlanInput, Policy
from hecate.parallel.planners.rivals.source_split import SourceSplit, SplitPlan
from hecate.parallel.planners.rivals.whole_loads import Moves, plan_whole_loads


def plan_moonep(given: PlanInput) -> SplitPlan:
    """Ranks below the mean are filled to it, each whole by one other rank, with the largest of that rank's experts.

    The rule is MoonEP's (its Triton port, commit 43ac94c, quotas). The rank with the most above the mean fills the one with the most
    below it, even if it then falls below the mean itself and is filled by another. A rank gives its own experts only, the one with the
    most assignments left to the receiver that lacks most. Ties go to the lowest index. The owner may keep nothing of an expert. An expert's
    assignments, in the order of the source ranks, are dealt to its ranks in their order, without regard to where they are.

    What differs from MoonEP:
    - Its budget is as many foreign experts as a rank owns, which always suffices, and what does not fit there it reads over the link while
      it computes. Here a rank keeps as many foreign experts as it has slots, those with the most assignments (of equals the higher
      index), and their owners keep the others' assignments.
    - Sources may have different numbers of tokens, and ranks may own any number of experts. The mean is rounded up.

    For exact loads; the fractions of expected ones are rounded to whole assignments. Devices count as equally fast, and nodes as one.
    """
    plan = plan_whole_loads(given, partial(_moved, slots_D=given.slots_D.tolist()))
    assert plan.quota_LED is not None
    split = SourceSplit("in_order", plan.quota_LED.cumsum(-1) - plan.quota_LED)
    return SplitPlan(plan.owner_LE, plan.where_LED, plan.quota_LED, source_split=split)


def _moved(whole_E: list[int], owner_E: list[int], slots_D: list[int]) -> Moves:
    moved: Moves = {}
    for home, wanted_D in enumerate(_receivers(whole_E, owner_E, len(slots_D))):
        left = {expert: whole_E[expert] for expert, owner in enumerate(owner_E) if owner == home}
        while max(wanted_D) > 0:
            rank = wanted_D.index(max(wanted_D))
            expert = max(left, key=left.__getitem__)  # the first of equals
            taken = min(left[expert], wanted_D[rank])
            moved[expert, rank] = taken
            left[expert] -= taken
            wanted_D[rank] -= taken
    fits: Moves = {}
    free_D = slots_D.copy()
    for (expert, rank), taken in sorted(moved.items(), key=lambda item: (-item[1], -item[0][0])):
        if free_D[rank] > 0:
            fits[expert, rank] = taken
            free_D[rank] -= 1
    return fits


def _receivers(whole_E: list[int], owner_E: list[int], world: int) -> list[list[int]]:
    """[homes][receivers]: how many assignments each rank gives to each other one."""
    above_D = [0] * world
    for load, owner in zip(whole_E, owner_E, strict=True):
        above_D[owner] += load
    mean = -(-sum(whole_E) // world)
    above_D = [load - mean for load in above_D]
    given_DD = [[0] * world for _ in range(world)]
    while max(above_D) > 0:
        home, receiver = above_D.index(max(above_D)), above_D.index(min(above_D))
        given_DD[home][receiver] = -above_D[receiver]
        above_D[home] += above_D[receiver]
        above_D[receiver] = 0
    return given_DD


POLICY = Policy(plan_moonep, own_split=True, collective="flat")  # its ranks read experts where they lie
