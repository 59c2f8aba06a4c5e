"""Seconds and bytes of one layer. What planners decide by."""

from __future__ import annotations

from dataclasses import dataclass

from hecate.parallel.topology import Topology


@dataclass(frozen=True)
class LayerCost:
    """What a planner must know of a layer besides its loads."""

    expert_bytes: float
    """bytes of one expert that a SparseAllGather moves (its trainable chunk, and its frozen part where it is not resident)"""
    non_moe_flops: float
    """FLOPs of the non-MoE compute that hides the transfer, forward, on one rank"""


def overlap_degree(cost: LayerCost, topology: Topology) -> int:
    """How many experts can travel to a rank hidden behind the non-MoE compute: t = T_nonMoE · bw / expert_bytes (Hecate §3.2).

    The slowest device has the most time to hide behind, but the job waits for the fastest link's slowest peer: T is taken on the
    fastest device and bw on the slowest link, so that t never promises more than every rank can hide.
    """
    seconds = cost.non_moe_flops / max(topology.flops)
    hidden = seconds - topology.slowest_link.latency
    if hidden <= 0:
        return 0
    return int(hidden * topology.slowest_link.bandwidth / cost.expert_bytes)
