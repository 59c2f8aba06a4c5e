"""Which rank keeps the second copy of a rank's experts."""

from __future__ import annotations

import numpy as np

from hecate.parallel.topology import Topology


def backup_ranks(topology: Topology) -> np.ndarray:
    """int64 [ranks]: of each rank another one, on another node where there is one, so that a node's loss leaves a copy.

    Ranks in turn take the candidate with the fewest wards so far; ties: the next one after them, round and round. Alone, a rank is its
    own backup rank: there is no copy.
    """
    world = topology.world_size
    near = topology.same_node()
    wards = [0] * world
    backup_rank_D = np.zeros(world, dtype=np.int64)
    for rank in range(world):
        others = [r for r in range(world) if not near[rank, r]] or [r for r in range(world) if r != rank] or [rank]
        chosen = min(others, key=lambda r: (wards[r], (r - rank) % world))
        wards[chosen] += 1
        backup_rank_D[rank] = chosen
    return backup_rank_D
