"""Which devices have become slower, or faster, than the plan takes them to be. Pure functions of reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

from hecate.parallel.topology import Topology

CHANGED = 1.4
"""ratio of real to planned speed, among the devices, from which on (either way) a plan no longer fits"""
WINDOWS = 2
"""reports in a row that must agree: one may have met an evaluation, or a neighbour's burst"""


MIN_SECONDS = 0.1
"""of dense work of each rank that make a window; shorter ones tell more of the operating system than of the device"""


@dataclass(frozen=True)
class Pace:
    """What one rank reports: time spent in dense work that waits for nobody."""

    tokens: int = 0
    seconds: float = 0.0

    def __add__(self, other: Pace) -> Pace:
        return Pace(self.tokens + other.tokens, self.seconds + other.seconds)


def relative_speeds(paces: Mapping[int, Pace], topology: Topology) -> dict[int, float]:
    """Of each rank the speed it has over the speed the topology gives it, the middle rank's taken for 1.

    Only ratios count: the topology's FLOP/s were measured on a large matmul, which no layer reaches.
    """
    raw = {rank: pace.tokens / pace.seconds / topology.flops[rank] for rank, pace in paces.items() if pace.seconds > 0 and pace.tokens}
    if not raw:
        return {}
    # With two devices there is no middle: the faster one is the measure, so that a slow one is what stands out.
    middle = max(raw.values()) if len(raw) == 2 else median(raw.values())
    return {rank: value / middle for rank, value in raw.items()}


def changed_ranks(windows: Sequence[Mapping[int, float]]) -> dict[int, float]:
    """The ranks whose relative speed has left the plan in each of the last `WINDOWS` reports, with the median over these."""
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
    """The topology with the FLOP/s of some ranks multiplied."""
    return replace(topology, flops=tuple(rate * factors.get(rank, 1.0) for rank, rate in enumerate(topology.flops)))


def without_ranks(topology: Topology, kept: Sequence[int]) -> Topology:
    """The topology of some of its ranks, renumbered in the order given; nodes that have none of them are gone."""
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
