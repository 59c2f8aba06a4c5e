"""Least-loaded expert parallelism (LLEP, ICML 26)."""

from __future__ import annotations

import numpy as np

from hecate.parallel.planners.plan import PlanInput, Policy
from hecate.parallel.planners.rivals.source_split import SourceSplit, SplitPlan

MIN_CHUNK = 1024
"""the fewest assignments that are spilled: fewer do not pay for an expert's transfer"""


def plan_llep(given: PlanInput) -> SplitPlan:
    """What does not fit under `max_imbalance` (1.1 if None) times the mean spills from the owner to the least-loaded devices.

    Experts by load descending: the owner takes what fits beside its experts still to come; the rest goes in chunks to the devices with the
    least load, their own experts still to come included, each chunk as large as fits but no smaller than `MIN_CHUNK` or an eighth of the
    capacity, for small batches. What finds no slot stays at the owner. An expert's assignments lie in the order of their sources: the
    first are the owner's, then comes one chunk after the other (SalesforceAIResearch/LeastLoadedEP, 11730c8). For exact loads. Devices
    count as equally fast.
    """
    load_LE = given.expected_LED.sum(-1)
    factor = 1.1 if given.max_imbalance is None else given.max_imbalance
    quota_LED = given.owned_LED * load_LE[..., None]
    begin_LED = np.zeros_like(quota_LED)
    for layer, load_E in enumerate(load_LE):
        capacity = factor * load_E.sum() / given.world_size
        _spill(load_E, given.owner_LE[layer], capacity, given.slots_D.copy(), quota_LED[layer], begin_LED[layer])
    return SplitPlan(given.owner_LE, given.owned_LED | (quota_LED > 0), quota_LED, source_split=SourceSplit("in_order", begin_LED))


def _spill(
    load_E: np.ndarray, owner_E: np.ndarray, capacity: float, free_D: np.ndarray, quota_ED: np.ndarray, begin_ED: np.ndarray
) -> None:
    """Move what does not fit from the owners to other ranks, in `quota_ED`; `begin_ED` is filled with where each chunk begins."""
    effective_D = quota_ED.sum(0)
    min_chunk = min(MIN_CHUNK, capacity / 8)
    # Sums of fractions are not exact: without this a full device spills what is only rounding.
    rounding = 1e-9 * capacity
    for expert in np.argsort(-load_E, kind="stable"):
        owner = owner_E[expert]
        left = min(load_E[expert], effective_D[owner] - capacity)
        open_D, spilled = free_D > 0, 0.0
        while left > rounding and open_D.any():
            rank = np.where(open_D, effective_D, np.inf).argmin()
            chunk = min(left, max(capacity - effective_D[rank], min_chunk))
            if effective_D[rank] + chunk >= effective_D[owner]:
                break  # the owner is no busier than that; or it is the owner itself
            quota_ED[expert, rank], begin_ED[expert, rank] = chunk, spilled
            spilled += chunk
            quota_ED[expert, owner] = max(quota_ED[expert, owner] - chunk, 0.0)
            effective_D[rank] += chunk
            effective_D[owner] -= chunk
            left -= chunk
            open_D[rank] = False
            free_D[rank] -= 1
        begin_ED[expert, quota_ED[expert] > 0] += quota_ED[expert, owner]
        begin_ED[expert, owner] = 0.0


POLICY = Policy(plan_llep, own_split=True, collective="flat")  # its owners send their experts to each rank
