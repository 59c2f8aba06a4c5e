"""The experts that a gather sends through every port, counted in numpy: what the compiled loops and the routes are compared with."""

from __future__ import annotations

import numpy as np

from hecate.parallel.cluster.topology import Topology
from hecate.parallel.cost.gather_bytes import PortBytes, leaders


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
