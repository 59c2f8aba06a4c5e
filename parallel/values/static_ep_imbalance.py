"""What static expert parallelism would have made of recorded loads: the comparison that says what a placement policy has gained."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from hecate.parallel.values.loads import imbalance
from hecate.parallel.values.placement import contiguous_owners
from hecate.parallel.values.units import Unit


def static_ep_served(loads_EG: np.ndarray, shard_size: int) -> np.ndarray:
    """Return how many assignments each rank would compute if experts never moved, int64 [groups · shard_size].

    In each sharding group the experts are dealt in blocks of neighbours to the group's ranks, as many to each rank as to any other within
    one, and every assignment goes to the rank that holds its expert. With fewer experts than ranks some ranks have nothing to do.

    Args:
        loads_EG: int64 [experts, groups]: the assignments that the ranks of each sharding group have sent to each expert of one layer.
        shard_size: the number of ranks of a sharding group.
    """
    experts, groups = loads_EG.shape
    served_SG = np.zeros((shard_size, groups), dtype=np.int64)
    np.add.at(served_SG, contiguous_owners(experts, shard_size), loads_EG)
    return served_SG.T.reshape(-1)


def static_ep_imbalance(loads: Mapping[Unit, np.ndarray], shard_size: int) -> float:
    """Return the largest over the mean load of the ranks under static expert parallelism, averaged over the units; 1 is perfect.

    Args:
        loads: of a step, per unit int64 [experts, ranks of the job].
        shard_size: the number of ranks of a sharding group, which are neighbours.
    """
    skews = [imbalance(static_ep_served(loads_ED.reshape(len(loads_ED), -1, shard_size).sum(2), shard_size)) for loads_ED in loads.values()]
    return float(np.mean(skews)) if skews else 1.0
