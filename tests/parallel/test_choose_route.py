"""The choice between the flat, the two-level and the sliced route, for one layer and for several, computed by hand on simple topologies."""

from __future__ import annotations

import numpy as np
import pytest

from hecate.parallel.cluster.topology import Link, Topology
from hecate.parallel.transfer.transfer_plan import fastest_route, fuse_gathers
from hecate.parallel.values.layout import ChunkSize
from hecate.parallel.values.placement import Placement, everything_everywhere
from testing.unit_cases import unit_topology


def topology(near: Link) -> Topology:
    """Ranks 0 and 2 in a node, 1 and 3 in the other; 1 byte/s between them."""
    return unit_topology((0, 1, 0, 1), near=near)


def where(*ranks: int) -> np.ndarray:
    return np.isin(np.arange(4), ranks)[None]


def placed(*ranks: int) -> Placement:
    """One expert, of rank 0."""
    return Placement(np.array([0]), where(*ranks))


@pytest.mark.parametrize(
    ("near", "chosen"),
    [
        (Link(10.0, 0.0), "two_level"),  # flat 2 s; across 1 s, then inside 0.1 s
        (Link(1.0, 0.0), "flat"),  # 2 s and 1 + 1 s
        (Link(10.0, 0.8), "two_level"),  # 2 s and 1 + 0.1 + 0.8 s
        (Link(10.0, 0.9), "flat"),  # 2 s and 1 + 0.1 + 0.9 s
    ],
)
def test_one_expert_for_both_ranks_of_the_other_node(near: Link, chosen: str) -> None:
    assert fastest_route(placed(0, 1, 3), ChunkSize(1, 1), topology(near)) == chosen


def test_latency_counts_less_the_larger_the_chunk() -> None:
    near = Link(10.0, 0.95)
    assert fastest_route(placed(0, 1, 3), ChunkSize(1, 1), topology(near)) == "flat"
    assert fastest_route(placed(0, 1, 3), ChunkSize(1, 10), topology(near)) == "two_level"  # 20 s and 10 + 1 + 0.95 s


@pytest.mark.parametrize("ranks", [(0,), (0, 1), (0, 2), (0, 2, 3)])
def test_flat_where_no_leader_would_hand_anything_on(ranks: tuple[int, ...]) -> None:
    assert fastest_route(placed(*ranks), ChunkSize(1, 1), topology(Link(10.0, 0.0))) == "flat"


def test_flat_on_one_node_where_a_chunk_cannot_be_cut() -> None:
    one = one_node(1.0)
    assert fastest_route(placed(0, 1, 2, 3), ChunkSize(1, 1), one) == "flat"


def test_flat_where_the_busiest_port_is_no_better_off() -> None:
    """Expert 10 of rank 2 for both of the other node, over its NIC in 2 s or over leader 1 in 1.1 s; but rank 1 also gets ten others."""
    nodes = unit_topology((0, 1, 0, 1), near=Link(10.0, 0.0), uplink_bandwidth=(100.0,) * 2, nic_bandwidth=(1.0,) * 4)
    owners = np.array([0] * 10 + [2])
    experts = np.concatenate([np.repeat(where(0, 1), 10, axis=0), where(2, 1, 3)])
    assert fastest_route(Placement(owners, experts), ChunkSize(1, 1), nodes) == "flat"  # 11 s, and 11 + 0.1 s
    alone = np.array([[False] * 4] * 10 + [experts[-1].tolist()])
    alone[:10, 0] = True
    assert fastest_route(Placement(owners, alone), ChunkSize(1, 1), nodes) == "two_level"


def one_node(latency: float) -> Topology:
    return unit_topology((0,) * 4, near=Link(1.0, latency))


@pytest.mark.parametrize(
    ("numel", "latency", "chosen"),
    [
        (3, 0.0, "sliced"),  # flat 9 s; 3 to the leaders, then 2 from each
        (3, 3.9, "sliced"),  # 12.9 s and 3 + 2 + 7.8 s
        (3, 4.1, "flat"),
        (2, 0.0, "sliced"),  # 6 s; two leaders of half an expert: 2 s, then two copies of a half each, 2 s
        (2, 1.9, "sliced"),
        (2, 2.1, "flat"),
        (5, 0.0, "flat"),  # a prime number of elements
    ],
)
def test_one_hot_owner(numel: int, latency: float, chosen: str) -> None:
    assert fastest_route(placed(0, 1, 2, 3), ChunkSize(numel, 1), one_node(latency)) == chosen


def test_flat_where_all_ports_carry_the_same_anyway() -> None:
    for owners in (np.arange(4), np.arange(4).repeat(3)):
        assert fastest_route(everything_everywhere(owners, 4), ChunkSize(12, 1), one_node(0.0)) == "flat"


def test_slices_where_leaders_of_two_nodes_share_the_work() -> None:
    """Experts of rank 0 for both of the other node: 10 s across, then 5 s from one leader each, or from both at once."""
    even = Placement(np.array([0]), where(0, 1, 3))
    near = topology(Link(2.0, 0.0))
    assert fastest_route(even, ChunkSize(10, 1), near) == "sliced"  # flat 20, two-level 10 + 5, sliced 10 + 2.5 s
    assert fastest_route(even, ChunkSize(11, 1), near) == "two_level"


def test_two_ranks_have_nobody_to_hand_on_to() -> None:
    pair = unit_topology((0, 0))
    assert fastest_route(Placement(np.array([0]), np.ones((1, 2), dtype=bool)), ChunkSize(12, 1), pair) == "flat"


TO_ONE = placed(0, 1)


@pytest.mark.parametrize(
    ("layers", "latency", "runs"),
    [
        ([(TO_ONE, 5.0), (TO_ONE, 2.0), (TO_ONE, 3.0), (TO_ONE, 1.0)], 5.0, [[0, 1, 2], [3]]),  # 2 + 3 s join the 5 s
        ([(TO_ONE, 5.0), (TO_ONE, 6.0), (TO_ONE, 5.0)], 5.0, [[0], [1, 2]]),
        ([(TO_ONE, 5.0), (TO_ONE, 1.0)], 0.0, [[0], [1]]),  # no latency to be saved
        ([(TO_ONE, 5.0), (Placement(np.array([2]), where(2, 3)), 5.0)], 0.0, [[0, 1]]),  # through other ports at the same time
        ([(TO_ONE, 5.0)], 5.0, [[0]]),
        ([], 5.0, []),
    ],
)
def test_a_layer_joins_where_the_first_waits_one_latency_longer_at_most(
    layers: list[tuple[Placement, float]], latency: float, runs: list[list[int]]
) -> None:
    assert fuse_gathers(layers, one_node(latency)) == runs


def test_a_run_pays_the_latency_of_the_links_it_crosses() -> None:
    """Across there is no latency that could be saved; inside, 4 bytes take 0.4 s and the latency is 1 s."""
    nodes = topology(Link(10.0, 1.0))
    assert fuse_gathers([(placed(0, 1), 4.0)] * 2, nodes) == [[0], [1]]
    assert fuse_gathers([(placed(0, 2), 4.0)] * 2, nodes) == [[0, 1]]
