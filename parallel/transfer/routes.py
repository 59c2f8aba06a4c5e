"""The routes of the two collectives over the chunks of experts: which copy goes from which rank to which, in each exchange.

Flat: each owner sends a copy to each replica. Two-level: each owner sends one copy to each node that needs the expert, to a *leader* in
that node, which sends it on. Sliced: the same with every chunk cut into slices, each with a leader of its own. A SparseAllGather sends
along the moves; a SparseReduceScatter sends against them. `hecate.parallel.cost.route_loops` counts the same moves to price them.

Shapes: E experts, D ranks, M chunks that one rank sends or receives.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from hecate.parallel.cluster.topology import Topology
from hecate.parallel.cost.flows import node_index, node_membership
from hecate.parallel.cost.gather_bytes import PortBytes, leaders
from hecate.parallel.values.placement import Placement


@dataclass(frozen=True, eq=False)
class PeerChunks:
    """The chunks that one rank sends, or receives, in one exchange: by peer, then by expert, ascending."""

    expert_M: np.ndarray
    """int64: the expert of each chunk"""
    count_D: list[int]
    """the number of chunks for, or from, each peer"""

    @cached_property
    def pieces(self) -> list[tuple[int, slice]]:
        """The peers with any chunks, ascending, and where theirs are among the M."""
        ends = np.cumsum(self.count_D).tolist()
        return [(peer, slice(end - count, end)) for peer, (end, count) in enumerate(zip(ends, self.count_D, strict=True)) if count]


@dataclass(frozen=True, eq=False)
class Moves:
    """The copies of one exchange."""

    source_ED: np.ndarray
    """int64 [experts, ranks]: the rank from which a rank gets an expert in this exchange; -1: it gets none"""

    def sent(self, rank: int) -> PeerChunks:
        peer_M, expert_M = np.nonzero((self.source_ED == rank).T)
        return PeerChunks(expert_M, np.bincount(peer_M, minlength=self.source_ED.shape[1]).tolist())

    def received(self, rank: int) -> PeerChunks:
        source_E = self.source_ED[:, rank]
        experts = np.flatnonzero(source_E >= 0)
        source_M = source_E[experts]
        return PeerChunks(experts[np.argsort(source_M, kind="stable")], np.bincount(source_M, minlength=self.source_ED.shape[1]).tolist())

    def ports(self, topology: Topology) -> PortBytes:
        """Copies through each port, along the moves."""
        node_D = node_index(topology)
        expert_M, target_M = np.nonzero(self.source_ED >= 0)
        source_M = self.source_ED[expert_M, target_M]
        near_M = node_D[source_M] == node_D[target_M]
        of_port = (source_M[near_M], target_M[near_M], source_M[~near_M], target_M[~near_M])
        return PortBytes(*(np.bincount(rank_M, minlength=topology.world_size).astype(float) for rank_M in of_port))


def flat_moves(placement: Placement) -> Moves:
    """Each owner sends a copy to each replica."""
    needed_ED = placement.where_ED & ~_own(placement)
    return Moves(np.where(needed_ED, placement.owner_E[:, None], -1))


@dataclass(frozen=True, eq=False)
class TwoLevelMoves:
    """A collective over leaders, each way in two exchanges, the second after the first."""

    gather: tuple[Moves, Moves]
    """first from the owners to the leaders and to all that no leader serves, then from the leaders to the others of their nodes"""
    reduce: tuple[Moves, Moves]
    """against these: first inside the nodes and, where a node has one replica only, straight to the owner; then leaders' sums to owners"""


def two_level_moves(placement: Placement, topology: Topology, *, at_home: bool = False) -> TwoLevelMoves:
    """Each owner sends one copy to each other node that needs the expert, to its leader, which sends it on (see `leaders`).

    Args:
        at_home: in the owner's own node, too, a leader receives and sends on; otherwise the owner serves its node itself.
    """
    assert placement.world_size == topology.world_size, (placement.world_size, topology.world_size)
    node_D = node_index(topology)
    owner_E1 = placement.owner_E[:, None]
    needed_ED = placement.where_ED & ~_own(placement)
    led_ED = needed_ED if at_home else needed_ED & (node_D[owner_E1] != node_D)
    leader_ED = leaders(led_ED, topology)
    by_node = np.argsort(node_D, kind="stable")
    starts = np.searchsorted(node_D[by_node], np.arange(topology.num_nodes))
    leader_of_EN = np.maximum.reduceat(np.where(leader_ED, np.arange(topology.world_size), -1)[:, by_node], starts, axis=1)
    copies_EN = np.add.reduceat(led_ED[:, by_node].astype(np.int64), starts, axis=1)
    inside_ED = led_ED & ~leader_ED
    direct_ED = needed_ED & ~led_ED
    source_ED = np.where(inside_ED, leader_of_EN[:, node_D], owner_E1)

    def moves(chosen_ED: np.ndarray) -> Moves:
        return Moves(np.where(chosen_ED, source_ED, -1))

    alone_ED = leader_ED & (copies_EN[:, node_D] == 1)
    return TwoLevelMoves(
        gather=(moves(direct_ED | leader_ED), moves(inside_ED)),
        reduce=(moves(direct_ED | inside_ED | alone_ED), moves(leader_ED & ~alone_ED)),
    )


def sliced_moves(placement: Placement, topology: Topology, slices: int) -> tuple[Placement, TwoLevelMoves]:
    """An owner sends each slice once to each node that needs the expert, its own included: to the leader of that slice in the node.

    So its port carries a replicated expert once a node, and the ranks that need it share the work of sending it on. Between nodes the bytes
    are those of the two-level route.

    Returns:
        The placement of the slices, of which those of expert e are e · slices, e · slices + 1, ..., and their moves.
    """
    of_slices = Placement(placement.owner_E.repeat(slices), placement.where_ED.repeat(slices, axis=0))
    return of_slices, two_level_moves(of_slices, topology, at_home=True)


def most_wanting(placement: Placement, topology: Topology) -> int:
    """The most ranks of one node that need one expert of another rank; with one at most, a leader has nobody to send on to."""
    needed_EN = (placement.where_ED & ~_own(placement)) @ node_membership(topology)
    return int(needed_EN.max(initial=0))


def slices_of(chunk_numel: int, most: int) -> int:
    """Into how many equal slices a chunk is cut for at most so many leaders; 1: it cannot be cut."""
    return max(number for number in range(1, max(most, 1) + 1) if chunk_numel % number == 0)


def _own(placement: Placement) -> np.ndarray:
    return placement.owner_E[:, None] == np.arange(placement.world_size)
