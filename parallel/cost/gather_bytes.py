"""Counts the experts that a SparseAllGather sends through every port. A SparseReduceScatter takes the same way back.

On the flat route each owner sends a copy to each replica. On the two-level route each owner sends one copy to each node that needs the
expert. A *leader* in that node receives it and sends it on inside the node, so the slow links carry an expert once per node.
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


def gather_ports(owner_E: np.ndarray, where_ED: np.ndarray, topology: Topology, *, two_level: bool = True) -> PortBytes:
    """Experts through each port. With one node both ways are the same.

    Args:
        owner_E: int64 [..., experts].
        where_ED: bool [..., experts, ranks]; true at the owners.
    """
    ranks = np.arange(where_ED.shape[-1])
    node_D = np.asarray(topology.node_of_rank)
    own_ED = owner_E[..., None] == ranks
    wanted_ED = where_ED & ~own_ED
    if topology.num_nodes == 1:
        out_ED = own_ED * wanted_ED.sum(-1, keepdims=True)
        zero = np.zeros(where_ED.shape[:-2] + ranks.shape)
        return PortBytes(out_ED.sum(-2).astype(float), wanted_ED.sum(-2).astype(float), zero, zero)
    member_DN = np.eye(topology.num_nodes)[node_D]
    home_ED = node_D[owner_E][..., None] == node_D
    near_wanted_ED, far_wanted_ED = wanted_ED & home_ED, wanted_ED & ~home_ED
    near_out_ED = own_ED * near_wanted_ED.sum(-1, keepdims=True)
    if not two_level:
        far_out_ED = own_ED * far_wanted_ED.sum(-1, keepdims=True)
        return PortBytes(*(a.sum(-2).astype(float) for a in (near_out_ED, near_wanted_ED, far_out_ED, far_wanted_ED)))
    leader_ED = leaders(far_wanted_ED, topology)
    copies_ED = (far_wanted_ED @ member_DN)[..., node_D]
    far_out_ED = own_ED * leader_ED.sum(-1, keepdims=True)
    near_out_ED = near_out_ED + leader_ED * (copies_ED - 1)
    near_in_ED = near_wanted_ED | (far_wanted_ED & ~leader_ED)
    return PortBytes(*(np.asarray(a).sum(-2).astype(float) for a in (near_out_ED, near_in_ED, far_out_ED, leader_ED)))


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
