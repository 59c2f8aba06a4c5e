"""Which copy of an expert goes from which rank to which, in each exchange of a collective.

A SparseAllGather sends along the moves; a SparseReduceScatter sends against them. `hecate.parallel.gather_bytes` counts the same moves.

Shapes: E experts, D ranks, M copies that one rank sends or receives.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from hecate.parallel.flows import node_index
from hecate.parallel.gather_bytes import leaders
from hecate.parallel.placement import Placement
from hecate.parallel.topology import Topology


@dataclass(frozen=True, eq=False)
class Run:
    """The copies that one rank sends, or receives, in one exchange: by peer, then by expert, ascending."""

    expert_M: np.ndarray
    """int64"""
    count_D: list[int]
    """copies for, or from, each peer"""

    @cached_property
    def pieces(self) -> list[tuple[int, slice]]:
        """The peers with any copies, ascending, and where theirs are among the M."""
        ends = np.cumsum(self.count_D).tolist()
        return [(peer, slice(end - count, end)) for peer, (end, count) in enumerate(zip(ends, self.count_D, strict=True)) if count]


@dataclass(frozen=True, eq=False)
class Moves:
    """The copies of one exchange."""

    source_ED: np.ndarray
    """int64 [experts, ranks]: the rank from which a rank gets an expert; -1: it gets none, or not now"""

    @property
    def any(self) -> bool:
        return bool((self.source_ED >= 0).any())

    def sent(self, rank: int) -> Run:
        peer_M, expert_M = np.nonzero((self.source_ED == rank).T)
        return Run(expert_M, np.bincount(peer_M, minlength=self.source_ED.shape[1]).tolist())

    def received(self, rank: int) -> Run:
        source_E = self.source_ED[:, rank]
        experts = np.flatnonzero(source_E >= 0)
        source_M = source_E[experts]
        return Run(experts[np.argsort(source_M, kind="stable")], np.bincount(source_M, minlength=self.source_ED.shape[1]).tolist())


def flat_moves(placement: Placement) -> Moves:
    """Each owner sends a copy to each replica."""
    wanted_ED = placement.where_ED & ~_own(placement)
    return Moves(np.where(wanted_ED, placement.owner_E[:, None], -1))


@dataclass(frozen=True, eq=False)
class TwoLevelMoves:
    """A two-level collective, each way in two exchanges, the second after the first."""

    gather: tuple[Moves, Moves]
    """first inside the owner's node and across to the leaders, then from the leaders to the others of their nodes"""
    reduce: tuple[Moves, Moves]
    """first inside the nodes and, where a node has one replica only, across to the owner; then the leaders' sums across to the owners"""


def two_level_moves(placement: Placement, topology: Topology) -> TwoLevelMoves:
    """Each owner sends one copy to each other node that wants the expert, to its leader, which hands it on (see `leaders`)."""
    assert placement.world_size == topology.world_size, (placement.world_size, topology.world_size)
    node_D = node_index(topology)
    owner_E1 = placement.owner_E[:, None]
    home_ED = node_D[owner_E1] == node_D
    wanted_ED = placement.where_ED & ~_own(placement)
    far_ED = wanted_ED & ~home_ED
    leader_ED = leaders(far_ED, topology)
    by_node = np.argsort(node_D, kind="stable")
    starts = np.searchsorted(node_D[by_node], np.arange(topology.num_nodes))
    leader_of_EN = np.maximum.reduceat(np.where(leader_ED, np.arange(topology.world_size), -1)[:, by_node], starts, axis=1)
    copies_EN = np.add.reduceat(far_ED[:, by_node].astype(np.int64), starts, axis=1)
    inside_ED = far_ED & ~leader_ED
    direct_ED = wanted_ED & home_ED
    source_ED = np.where(inside_ED, leader_of_EN[:, node_D], owner_E1)

    def moves(chosen_ED: np.ndarray) -> Moves:
        return Moves(np.where(chosen_ED, source_ED, -1))

    alone_ED = leader_ED & (copies_EN[:, node_D] == 1)
    return TwoLevelMoves(
        gather=(moves(direct_ED | leader_ED), moves(inside_ED)),
        reduce=(moves(direct_ED | inside_ED | alone_ED), moves(leader_ED & ~alone_ED)),
    )


def _own(placement: Placement) -> np.ndarray:
    return placement.owner_E[:, None] == np.arange(placement.world_size)
