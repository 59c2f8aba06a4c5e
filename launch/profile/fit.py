"""Compute a topology from measured seconds and bytes. All functions are pure."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median, median_low

from hecate.parallel.cluster.topology import Link, Topology

ALIKE = 0.1
"""devices of one kind whose speeds differ by less than this share count as equally fast, so that plans do not follow noise"""


@dataclass(frozen=True)
class Flow:
    """One direction of an exchange between two ranks."""

    source: int
    destination: int
    link: Link


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """The measurements of all ranks. Tuples are indexed by rank."""

    node_of_rank: tuple[int, ...]
    kind_of_rank: tuple[str, ...]
    """the name of each rank's device"""
    flops: tuple[float, ...]
    """each rank's FLOP/s"""
    memory: tuple[float, ...]
    """each rank's free memory in bytes"""
    memory_bandwidth: tuple[float, ...]
    """each rank's memory bandwidth in bytes/s"""
    near: Sequence[Flow]
    """both directions between every two ranks of the same node"""
    alone: Sequence[Flow]
    """flows between ranks of two nodes while no other ranks of these nodes exchange"""
    all_at_once: Sequence[Sequence[Flow]]
    """the flows of each round in which all ranks of two nodes exchange at the same time"""
    overlap_slowdown: float = 1.0
    """see `Topology.overlap_slowdown`"""


def fit_link(small_bytes: float, small_seconds: float, large_bytes: float, large_seconds: float) -> Link:
    """Return the link that explains the seconds of a small and a large message as latency + bytes / bandwidth."""
    if large_seconds > small_seconds:
        bandwidth = (large_bytes - small_bytes) / (large_seconds - small_seconds)
    else:  # noise exceeds the difference between the two sizes
        bandwidth = large_bytes / large_seconds
    return Link(bandwidth, max(0.0, small_seconds - small_bytes / bandwidth))


def fit_overlap(compute: float, transfer: float, both: float) -> float:
    """Return `Topology.overlap_slowdown`, between 1 and 2.

    While the two overlap, for min(compute, transfer) seconds, both are slowed down: both = max + (slowdown - 1) · min.

    Args:
        compute: seconds of some computation alone.
        transfer: seconds of a transfer alone.
        both: seconds of the two started at once.
    """
    return min(2.0, max(1.0, 1 + (both - max(compute, transfer)) / min(compute, transfer)))


def port_rates(flows: Iterable[Flow]) -> dict[int, float]:
    """Return the port bandwidth, in bytes/s, of each rank that occurs in `flows`.

    A flow is as fast as the slower of its two ports, so a port's rate in one direction is that of its fastest flow. The port's
    bandwidth is the lower of its two directions' rates.
    """
    out: dict[int, float] = {}
    into: dict[int, float] = {}
    for flow in flows:
        out[flow.source] = max(out.get(flow.source, 0.0), flow.link.bandwidth)
        into[flow.destination] = max(into.get(flow.destination, 0.0), flow.link.bandwidth)
    return {rank: min(out[rank], into[rank]) for rank in sorted(out)}


def uplink_rates(rounds: Iterable[Sequence[Flow]], node_of_rank: Sequence[int]) -> dict[int, float]:
    """Return the uplink bandwidth of each node, in bytes/s.

    In each round all ranks of a node send messages of equal size to ranks of another node. A round's rate between two nodes is the
    number of messages times the rate of the slowest one, and the median over the rounds of these two nodes counts. A node's uplink is
    then found from its rates to all other nodes, as `port_rates` finds a port's.
    """
    seen: dict[tuple[int, int], list[float]] = {}
    for flows in rounds:
        between: dict[tuple[int, int], list[float]] = {}
        for flow in flows:
            between.setdefault((node_of_rank[flow.source], node_of_rank[flow.destination]), []).append(flow.link.bandwidth)
        for nodes, rates in between.items():
            seen.setdefault(nodes, []).append(len(rates) * min(rates))
    return port_rates(Flow(source, destination, Link(median(rates), 0.0)) for (source, destination), rates in seen.items())


def topology_from(found: Measurements) -> Topology:
    """Return the topology that explains the measurements, with numbers rounded to two or three digits."""
    node_of_rank, kinds = found.node_of_rank, found.kind_of_rank
    nodes = range(max(node_of_rank) + 1)
    memory_bandwidth = median_per_kind(found.memory_bandwidth, kinds)
    inter: Link | None = None
    uplink: tuple[float, ...] = ()
    nic: tuple[float, ...] = ()
    if len(nodes) > 1:
        nics, uplinks = port_rates(found.alone), uplink_rates(found.all_at_once, node_of_rank)
        for rank, rate in nics.items():  # one rank's traffic passes its node's uplink, which is at least as fast
            uplinks[node_of_rank[rank]] = max(uplinks[node_of_rank[rank]], rate)
        uplink = median_per_kind([uplinks[node] for node in nodes], [_kinds_of_node(found, node) for node in nodes])
        nic = median_per_kind([nics[rank] for rank in range(len(kinds))], kinds)
        own = [uplink[node] for node in node_of_rank]
        nic = tuple(limit if rate > (1 - ALIKE) * limit else rate for rate, limit in zip(nic, own, strict=True))
        inter = Link(median_low(uplink), _latency(found.alone))
    ports = port_rates(found.near)
    port_of = dict(zip(ports, median_per_kind(list(ports.values()), [kinds[rank] for rank in ports]), strict=True))
    if ports:
        intra = Link(median_low(port_of.values()), _latency(found.near))
    else:  # no two ranks share a node, so this link is never used
        intra = inter or Link(memory_bandwidth[0], 0.0)
    return Topology(
        node_of_rank,
        flops=median_per_kind(found.flops, kinds),
        memory=tuple(_rounded_down(value) for value in found.memory),
        intra_node=intra,
        inter_node=inter or intra,
        port_bandwidth=tuple(port_of.get(rank, intra.bandwidth) for rank in range(len(kinds))),
        uplink_bandwidth=uplink,
        nic_bandwidth=nic,
        memory_bandwidth=memory_bandwidth,
        overlap_slowdown=round(found.overlap_slowdown, 2),
    )


def median_per_kind(values: Sequence[float], kinds: Sequence[Hashable]) -> tuple[float, ...]:
    """Replace each value by the median of its kind unless it differs from that by more than `ALIKE`, and round to three digits."""
    middle = {kind: median(v for v, k in zip(values, kinds, strict=True) if k == kind) for kind in dict.fromkeys(kinds)}
    return tuple(_rounded(middle[k] if abs(v - middle[k]) <= ALIKE * middle[k] else v) for v, k in zip(values, kinds, strict=True))


def _kinds_of_node(found: Measurements, node: int) -> tuple[str, ...]:
    return tuple(kind for kind, n in zip(found.kind_of_rank, found.node_of_rank, strict=True) if n == node)


def _latency(flows: Sequence[Flow]) -> float:
    return _rounded(median(flow.link.latency for flow in flows))


def _rounded(value: float) -> float:
    return float(f"{value:.2e}")


def _rounded_down(value: float) -> float:
    """Round down to two digits, because a plan must not use memory that does not exist."""
    exponent = math.floor(math.log10(value)) - 1
    return float(f"{math.floor(value / 10.0**exponent)}e{exponent}")
