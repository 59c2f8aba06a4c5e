"""Topologies computed from hand-made measurements."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hecate.launch.profile.fit import (
    Flow,
    Measurements,
    fit_link,
    fit_overlap,
    median_per_kind,
    port_rates,
    topology_from,
    uplink_rates,
)
from hecate.launch.profile.schedule import Rounds, alone_rounds, far_rounds, near_rounds
from hecate.parallel.cluster.topology import Link, Topology
from hecate.parallel.cost.cost_loops import exposed_seconds


def test_a_link_from_two_messages() -> None:
    # 1 ms + bytes / 1 MB/s
    link = fit_link(1000, 0.002, 1_000_000, 1.001)
    assert link.bandwidth == pytest.approx(1e6)
    assert link.latency == pytest.approx(1e-3)


def test_a_link_too_fast_to_tell_its_latency() -> None:
    # The line through both points starts below zero.
    assert fit_link(1000, 0.001, 2000, 0.003) == Link(500_000.0, 0.0)


def test_a_link_whose_large_message_was_no_slower() -> None:
    link = fit_link(1000, 0.002, 1_000_000, 0.001)
    assert link.bandwidth == pytest.approx(1e9)
    assert link.latency == pytest.approx(0.002 - 1e-6)


@pytest.mark.parametrize(
    ("compute", "transfer", "both", "slowdown"),
    [(3, 2, 3, 1.0), (3, 2, 4, 1.5), (2, 3, 4, 1.5), (3, 2, 5, 2.0), (3, 2, 2.9, 1.0), (3, 2, 9, 2.0)],
)
def test_overlap(compute: float, transfer: float, both: float, slowdown: float) -> None:
    assert fit_overlap(compute, transfer, both) == pytest.approx(slowdown)
    if 1 < slowdown < 2:
        assert compute + exposed_seconds(compute, transfer, slowdown) == pytest.approx(both), "not what the cost model means by it"


def flow(source: int, destination: int, bandwidth: float, latency: float = 0.0) -> Flow:
    return Flow(source, destination, Link(bandwidth, latency))


def test_ports_behind_the_flows_they_bound() -> None:
    """Ports of 10, 10, 4 and 7: a flow is as fast as the slower of its two, and no port is blamed for another's."""
    port = [10.0, 10.0, 4.0, 7.0]
    flows = [flow(a, b, min(port[a], port[b])) for a in range(4) for b in range(4) if a != b]
    assert port_rates(flows) == {0: 10.0, 1: 10.0, 2: 4.0, 3: 7.0}


def test_the_slower_direction_is_the_ports() -> None:
    flows = [flow(0, 1, 5.0), flow(0, 2, 5.0), flow(1, 0, 9.0), flow(1, 2, 8.0), flow(2, 0, 9.0), flow(2, 1, 9.0)]
    assert port_rates(flows) == {0: 5.0, 1: 9.0, 2: 8.0}


def test_an_uplink_is_what_all_ranks_together_get_through() -> None:
    """Nodes {0, 1} and {2, 3}: per round the pairs' number times the slowest of them; the median of the rounds."""
    rounds = [
        [flow(0, 2, 3.0), flow(2, 0, 3.0), flow(1, 3, 4.0), flow(3, 1, 5.0)],
        [flow(0, 3, 5.0), flow(3, 0, 5.0), flow(1, 2, 5.0), flow(2, 1, 5.0)],
        [flow(0, 2, 4.0), flow(2, 0, 2.0), flow(1, 3, 4.0), flow(3, 1, 5.0)],
    ]
    # out of node 0: 6, 10, 8; out of node 1: 6, 10, 4
    assert uplink_rates(rounds, (0, 0, 1, 1)) == {0: 6.0, 1: 6.0}


def test_a_fast_node_is_not_blamed_for_a_slow_one() -> None:
    rounds = [[flow(0, 1, 3.0), flow(1, 0, 3.0)], [flow(0, 2, 10.0), flow(2, 0, 10.0)], [flow(1, 2, 3.0), flow(2, 1, 3.0)]]
    assert uplink_rates(rounds, (0, 1, 2)) == {0: 10.0, 1: 3.0, 2: 10.0}


def test_equal_devices_get_equal_figures() -> None:
    assert median_per_kind([100.0, 104.0, 97.0, 60.0], ["gpu"] * 4) == (98.5, 98.5, 98.5, 60.0)
    assert median_per_kind([100.0, 104.0, 50.0], ["fast", "fast", "slow"]) == (102.0, 102.0, 50.0)
    assert median_per_kind([1234.0, 98765.0], ["a", "b"]) == (1230.0, 98800.0)


def flows_over(rounds: Rounds, truth: Topology) -> list[list[Flow]]:
    """What the pairs of each round would see on `truth`: ports inside a node; NICs and a fair share of the uplinks between nodes."""
    found = []
    for pairs in rounds:
        flows = []
        for a, b in pairs:
            node_a, node_b = truth.node_of_rank[a], truth.node_of_rank[b]
            if node_a == node_b:
                rate, latency = min(truth.port_bandwidth[a], truth.port_bandwidth[b]), truth.intra_node.latency
            else:
                sharing = len(pairs) if truth.num_nodes == 2 else sum(truth.node_of_rank[c] == node_a for pair in pairs for c in pair)
                share = min(truth.uplink_bandwidth[node_a], truth.uplink_bandwidth[node_b]) / sharing
                rate, latency = min(truth.nic_bandwidth[a], truth.nic_bandwidth[b], share), truth.inter_node.latency
            flows += [flow(a, b, rate, latency), flow(b, a, rate, latency)]
        found.append(flows)
    return found


def measured_on(truth: Topology, kinds: tuple[str, ...]) -> Measurements:
    nodes = [truth.ranks_of_node(node) for node in range(truth.num_nodes)]
    return Measurements(
        node_of_rank=truth.node_of_rank,
        kind_of_rank=kinds,
        flops=truth.flops,
        memory=truth.memory,
        memory_bandwidth=truth.memory_bandwidth,
        near=[f for flows in flows_over(near_rounds(nodes), truth) for f in flows],
        alone=[f for flows in flows_over(alone_rounds(nodes), truth) for f in flows],
        all_at_once=flows_over(far_rounds(nodes), truth),
        overlap_slowdown=truth.overlap_slowdown,
    )


def test_a_mixed_cluster_is_found_as_it_is() -> None:
    """Three nodes, of which two can show their uplinks to each other; one with a NIC for each rank; ranks dealt in turn."""
    truth = Topology(
        node_of_rank=(0, 1, 2, 0, 1, 2),
        flops=(4e14, 4e14, 7e13, 4e14, 4e14, 7e13),
        memory=(8e10, 8e10, 2.4e10, 8e10, 8e10, 2.4e10),
        intra_node=Link(3e11, 1e-5),
        inter_node=Link(5e10, 2e-5),
        port_bandwidth=(3e11, 3e11, 2e10, 3e11, 3e11, 2e10),
        uplink_bandwidth=(5e10, 5e10, 1.2e10),
        nic_bandwidth=(2.5e10, 5e10, 1.2e10, 2.5e10, 5e10, 1.2e10),
        memory_bandwidth=(3e12, 3e12, 2.5e11, 3e12, 3e12, 2.5e11),
        overlap_slowdown=1.25,
    )
    # Node 1's ranks can only be seen through node 0's NICs of 2.5e10: that is what they get.
    found = topology_from(measured_on(truth, ("nic", "big", "small", "nic", "big", "small")))
    assert found.nic_bandwidth == (2.5e10, 2.5e10, 1.2e10, 2.5e10, 2.5e10, 1.2e10)
    for name in ("node_of_rank", "flops", "memory", "port_bandwidth", "uplink_bandwidth", "memory_bandwidth", "overlap_slowdown"):
        assert getattr(found, name) == getattr(truth, name), name
    assert (found.intra_node, found.inter_node) == (truth.intra_node, truth.inter_node)


def test_one_node() -> None:
    truth = Topology((0, 0, 0), (6e10,) * 3, (8e9,) * 3, Link(1e9, 2e-4), Link(1e9, 2e-4), overlap_slowdown=2.0)
    assert topology_from(measured_on(truth, ("cpu",) * 3)) == truth


def test_nodes_of_one_rank_have_no_link_inside() -> None:
    truth = Topology((0, 1), (6e10,) * 2, (8e9,) * 2, Link(1e8, 1e-3), Link(1e8, 1e-3))
    assert topology_from(measured_on(truth, ("cpu",) * 2)) == truth


def test_a_single_rank() -> None:
    truth = Topology((0,), (5e10,), (8e9,), Link(7e9, 0.0), Link(7e9, 0.0), memory_bandwidth=(7e9,))
    assert topology_from(measured_on(truth, ("cpu",))) == truth


def test_memory_is_rounded_down() -> None:
    truth = Topology((0, 0), (5e10,) * 2, (8.99e9, 1e10), Link(1e8, 1e-3), Link(1e8, 1e-3))
    assert topology_from(measured_on(truth, ("cpu",) * 2)).memory == (8.9e9, 1e10)


@pytest.mark.parametrize(("alone", "uplink", "nic"), [(1.04e8, 1.04e8, 1.04e8), (0.95e8, 1e8, 1e8), (0.8e8, 1e8, 0.8e8)])
def test_a_nic_about_as_fast_as_its_uplink_is_the_uplink(alone: float, uplink: float, nic: float) -> None:
    truth = Topology((0, 1), (5e10,) * 2, (8e9,) * 2, Link(1e8, 1e-3), Link(1e8, 1e-3))
    noisy = replace(measured_on(truth, ("cpu",) * 2), alone=[flow(0, 1, alone), flow(1, 0, alone)])
    topology = topology_from(noisy)
    assert topology.uplink_bandwidth == (uplink, uplink)
    assert topology.nic_bandwidth == (nic, nic)
