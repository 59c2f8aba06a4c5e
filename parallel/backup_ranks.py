"""Choose each rank's backup rank, which holds the backups of its experts."""

from __future__ import annotations

import numpy as np

from hecate.parallel.topology import Topology


def backup_ranks(topology: Topology) -> np.ndarray:
    """Return the backup rank of each rank, int64 [ranks].

    It is on another node if there are several, so that the backups survive the loss of a node. Each rank in turn gets the candidate
    that is the backup rank of the fewest ranks so far; ties go to the next rank in cyclic order. A single rank is its own backup rank,
    which means that there is no backup.
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
