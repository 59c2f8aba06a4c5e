"""Choose each rank's backup ranks, which hold the backups of its experts."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from hecate.parallel.cluster.topology import Topology


@lru_cache(maxsize=16)
def backup_ranks(topology: Topology, backups: int, tp_size: int = 1) -> np.ndarray:
    """Return the backup ranks of each rank, int64 [ranks, backups], read-only.

    A tensor group, of `tp_size` ranks, is lost as a whole, so each backup is in another one, and there are no more columns than those.

    They are on other nodes if there are any, each on another one while there are enough, so that a backup survives the loss of nodes. For
    the first backup, and then for the next, each rank in turn gets the candidate that is the backup rank of the fewest ranks so far; ties
    go to the next rank in cyclic order.
    """
    world = topology.world_size
    group = [rank // tp_size for rank in range(world)]
    nodes = topology.node_of_rank
    wards = [0] * world
    chosen: list[list[int]] = [[] for _ in range(world)]
    for _ in range(min(backups, world // tp_size - 1)):
        for rank, own in enumerate(chosen):
            taken = {group[rank], *(group[backup] for backup in own)}
            others = [other for other in range(world) if group[other] not in taken]
            used = {nodes[rank], *(nodes[backup] for backup in own)}
            away = [other for other in others if nodes[other] not in used] or [other for other in others if nodes[other] != nodes[rank]]
            best = min(away or others, key=lambda other, rank=rank: (wards[other], (other - rank) % world))  # type: ignore[misc]
            wards[best] += 1
            own.append(best)
    found = np.array(chosen, dtype=np.int64).reshape(world, -1)
    found.setflags(write=False)
    return found
