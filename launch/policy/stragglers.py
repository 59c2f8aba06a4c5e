"""Finds devices that are slower, or faster, than the plan assumes. Pure functions of what the ranks report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

from hecate.parallel.topology import Topology

CHANGED = 1.4
"""A device has changed if its real over its planned speed reaches this ratio, or falls to the ratio's inverse."""
WINDOWS = 2
"""How many windows in a row must agree. A single one may contain an evaluation, or a burst of work of another process."""
MIN_SECONDS = 0.1
"""Shortest window, in seconds of each rank's dense work. A shorter one would measure the operating system more than the device."""


@dataclass(frozen=True)
class DenseWork:
    """Work that one rank has done in its layers up to their experts, where it waits for no other rank."""

    tokens: int = 0
    seconds: float = 0.0

    def __add__(self, other: DenseWork) -> DenseWork:
        return DenseWork(self.tokens + other.tokens, self.seconds + other.seconds)


def relative_speeds(work: Mapping[int, DenseWork], topology: Topology) -> dict[int, float]:
    """Each rank's real over its planned speed, as a multiple of the median rank's.

    Only these multiples have a meaning. The topology's FLOP/s were measured on a large matmul, whose speed no layer reaches.

    Args:
        work: rank -> its work.
    """
    raw = {rank: done.tokens / done.seconds / topology.flops[rank] for rank, done in work.items() if done.seconds > 0 and done.tokens}
    if not raw:
        return {}
    # Of two devices the faster one takes the median's place, so that the slower one is found.
    middle = max(raw.values()) if len(raw) == 2 else median(raw.values())
    return {rank: value / middle for rank, value in raw.items()}


def changed_ranks(windows: Sequence[Mapping[int, float]]) -> dict[int, float]:
    """The ranks whose relative speed differed from the plan in each of the last `WINDOWS` windows, with the median of these speeds."""
    recent = windows[-WINDOWS:]
    if len(recent) < WINDOWS:
        return {}
    changed = {}
    for rank in set.intersection(*(set(window) for window in recent)):
        seen = [window[rank] for window in recent]
        if max(seen) <= 1 / CHANGED or min(seen) >= CHANGED:
            changed[rank] = median(seen)
    return dict(sorted(changed.items()))


def with_speeds(topology: Topology, factors: Mapping[int, float]) -> Topology:
    """The topology with the FLOP/s of some ranks multiplied by factors."""
    return replace(topology, flops=tuple(rate * factors.get(rank, 1.0) for rank, rate in enumerate(topology.flops)))


def without_ranks(topology: Topology, kept: Sequence[int]) -> Topology:
    """The topology of the ranks `kept`, renumbered in this order. Nodes without any of these ranks are left out."""
    nodes = sorted({topology.node_of_rank[rank] for rank in kept})

    def of_kept(values: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(values[rank] for rank in kept)

    return replace(
        topology,
        node_of_rank=tuple(nodes.index(topology.node_of_rank[rank]) for rank in kept),
        flops=of_kept(topology.flops),
        memory=of_kept(topology.memory),
        port_bandwidth=of_kept(topology.port_bandwidth),
        uplink_bandwidth=tuple(topology.uplink_bandwidth[node] for node in nodes),
        nic_bandwidth=of_kept(topology.nic_bandwidth),
        memory_bandwidth=of_kept(topology.memory_bandwidth),
    )
