"""What travels through every port, and the leaders of the two-level route.

On the flat route of a gather each owner sends a copy to each replica. On the two-level route each owner sends one copy to each node that
needs the expert. A *leader* in that node receives it and sends it on inside the node, so the slow links carry an expert once per node.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hecate.parallel.cluster.topology import Topology


@dataclass(frozen=True, eq=False)
class PortBytes:
    """Traffic of each rank in units of one expert or one row, float64 [..., ranks] each."""

    near_out_D: np.ndarray
    near_in_D: np.ndarray
    far_out_D: np.ndarray
    far_in_D: np.ndarray

    def reversed(self) -> PortBytes:
        """The same traffic the other way round."""
        return PortBytes(self.near_in_D, self.near_out_D, self.far_in_D, self.far_out_D)


def leaders(far_wanted_ED: np.ndarray, topology: Topology) -> np.ndarray:
    """bool [..., experts, ranks]: the leaders. Of a node's ranks that need an expert from another node, one receives it and sends it on.

    It is the (expert modulo their number)-th of these ranks, so that the ranks of a node share the work.
    """
    experts = np.arange(far_wanted_ED.shape[-2])[:, None]
    result = np.zeros_like(far_wanted_ED)
    for node in range(topology.num_nodes):
        ranks = topology.ranks_of_node(node)
        wanted = far_wanted_ED[..., ranks]
        number = wanted.sum(-1, keepdims=True)
        turn = np.cumsum(wanted, -1) - 1
        result[..., ranks] = wanted & (turn == experts % np.maximum(number, 1))
    return result
