"""From what was measured to a topology: pure functions of seconds and bytes."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median, median_low

from hecate.parallel.topology import Link, Topology

ALIKE = 0.1
"""equal devices whose figures differ by less than this share are taken for equally fast: plans should not follow noise"""


@dataclass(frozen=True)
class Flow:
    """One direction of an exchange between two ranks."""

    source: int
    destination: int
    link: Link


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """What all ranks found out together."""

    node_of_rank: tuple[int, ...]
    kind_of_rank: tuple[str, ...]
    """name of each rank's device"""
    flops: tuple[float, ...]
    memory: tuple[float, ...]
    memory_bandwidth: tuple[float, ...]
    near: Sequence[Flow]
    """ranks of a node, every pair both ways"""
    alone: Sequence[Flow]
    """ranks of two nodes, one pair of these nodes at a time"""
    together: Sequence[Sequence[Flow]]
    """rounds in which all ranks of two nodes exchange at once"""
    overlap_slowdown: float = 1.0


def nodes_of_hosts(hosts: Sequence[str]) -> tuple[int, ...]:
    """Node of each rank: one for each host name, numbered by their first rank."""
    order = list(dict.fromkeys(hosts))
    return tuple(order.index(host) for host in hosts)


def fit_link(small_bytes: float, small_seconds: float, large_bytes: float, large_seconds: float) -> Link:
    """The link on which messages of two sizes take latency + bytes / bandwidth."""
    if large_seconds > small_seconds:
        bandwidth = (large_bytes - small_bytes) / (large_seconds - small_seconds)
    else:  # too noisy, or too fast, to tell
        bandwidth = large_bytes / large_seconds
    return Link(bandwidth, max(0.0, small_seconds - small_bytes / bandwidth))


def fit_overlap(compute: float, transfer: float, both: float) -> float:
    """Topology.overlap_slowdown, from the seconds of some work, of a transfer, and of the two at the same time.

    Where they overlap, min(compute, transfer) seconds of it, both are slowed down: both = max + (slowdown - 1) · min.
    """
    return min(2.0, max(1.0, 1 + (both - max(compute, transfer)) / min(compute, transfer)))


def port_rates(flows: Iterable[Flow]) -> dict[int, float]:
    """bytes/s of the port of each rank that took part.

    A flow is as fast as the slower of its two ports, so a port is as fast as the fastest flow through it; both directions count,
    and the slower one is the port's.
    """
    out: dict[int, float] = {}
    into: dict[int, float] = {}
    for flow in flows:
        out[flow.source] = max(out.get(flow.source, 0.0), flow.link.bandwidth)
        into[flow.destination] = max(into.get(flow.destination, 0.0), flow.link.bandwidth)
    return {rank: min(out[rank], into[rank]) for rank in sorted(out)}


def uplink_rates(rounds: Iterable[Sequence[Flow]], node_of_rank: Sequence[int]) -> dict[int, float]:
    """bytes/s of each node's uplink, from rounds in which all its ranks sent equal messages to ranks of other nodes.

    In a round two nodes exchange all their messages in the time of the slowest one. Of the rounds of two nodes the median counts;
    then a node's uplink is as fast as the fastest other node showed it to be, as with ports.
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
    """The topology that explains the measurements, in figures of two or three digits."""
    node_of_rank, kinds = found.node_of_rank, found.kind_of_rank
    nodes = range(max(node_of_rank) + 1)
    memory_bandwidth = settle(found.memory_bandwidth, kinds)
    inter: Link | None = None
    uplink: tuple[float, ...] = ()
    nic: tuple[float, ...] = ()
    if len(nodes) > 1:
        nics, uplinks = port_rates(found.alone), uplink_rates(found.together, node_of_rank)
        for rank, rate in nics.items():  # what one rank gets through goes through its node's uplink
            uplinks[node_of_rank[rank]] = max(uplinks[node_of_rank[rank]], rate)
        uplink = settle([uplinks[node] for node in nodes], [_kinds_of_node(found, node) for node in nodes])
        nic = settle([nics[rank] for rank in range(len(kinds))], kinds)
        own = [uplink[node] for node in node_of_rank]
        nic = tuple(limit if rate > (1 - ALIKE) * limit else rate for rate, limit in zip(nic, own, strict=True))
        inter = Link(median_low(uplink), _latency(found.alone))
    ports = port_rates(found.near)
    port_of = dict(zip(ports, settle(list(ports.values()), [kinds[rank] for rank in ports]), strict=True))
    if ports:
        intra = Link(median_low(port_of.values()), _latency(found.near))
    else:  # no two ranks share a node: nothing will ever travel over this link
        intra = inter or Link(memory_bandwidth[0], 0.0)
    return Topology(
        node_of_rank,
        flops=settle(found.flops, kinds),
        memory=tuple(_rounded_down(value) for value in found.memory),
        intra_node=intra,
        inter_node=inter or intra,
        port_bandwidth=tuple(port_of.get(rank, intra.bandwidth) for rank in range(len(kinds))),
        uplink_bandwidth=uplink,
        nic_bandwidth=nic,
        memory_bandwidth=memory_bandwidth,
        overlap_slowdown=round(found.overlap_slowdown, 2),
    )


def settle(values: Sequence[float], kinds: Sequence[Hashable]) -> tuple[float, ...]:
    """Give all of one kind their median, but for those that differ from it by more than `ALIKE`; three digits of each."""
    middle = {kind: median(v for v, k in zip(values, kinds, strict=True) if k == kind) for kind in dict.fromkeys(kinds)}
    return tuple(_rounded(middle[k] if abs(v - middle[k]) <= ALIKE * middle[k] else v) for v, k in zip(values, kinds, strict=True))


def _kinds_of_node(found: Measurements, node: int) -> tuple[str, ...]:
    return tuple(kind for kind, n in zip(found.kind_of_rank, found.node_of_rank, strict=True) if n == node)


def _latency(flows: Sequence[Flow]) -> float:
    return _rounded(median(flow.link.latency for flow in flows))


def _rounded(value: float) -> float:
    return float(f"{value:.2e}")


def _rounded_down(value: float) -> float:
    """To two digits: memory that is not there must not be planned with."""
    exponent = math.floor(math.log10(value)) - 1
    return float(f"{math.floor(value / 10.0**exponent)}e{exponent}")
