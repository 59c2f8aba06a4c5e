from __future__ import annotations

import pytest

from hecate.errors import UserError
from hecate.parallel.cluster.topology import Link, Topology, local_topology, nodes_of_hosts, uniform_topology


def test_topology_values_are_checked() -> None:
    link = Link(1.0, 0.0)
    with pytest.raises(UserError, match="at least one device"):
        Topology((), (), (), link, link)
    with pytest.raises(UserError, match="2 ranks, but 1 rates"):
        Topology((0, 0), (1.0,), (1.0, 1.0), link, link)
    with pytest.raises(UserError, match="without gaps"):
        Topology((0, 2), (1.0, 1.0), (1.0, 1.0), link, link)
    for bandwidth, latency in ((0.0, 0.0), (float("inf"), 0.0), (float("nan"), 0.0), (1.0, -1.0), (1.0, float("inf"))):
        with pytest.raises(UserError, match="link"):
            Link(bandwidth, latency)


def test_same_node_with_ranks_out_of_order() -> None:
    link = Link(1.0, 0.0)
    topology = Topology((0, 1, 0), (1.0,) * 3, (1.0,) * 3, link, link)
    assert topology.same_node().tolist() == [[True, False, True], [False, True, False], [True, False, True]]
    assert topology.ranks_of_node(0) == [0, 2]


def test_uniform_topology_fills_node_0_first() -> None:
    topology = uniform_topology(2, 3, flops=5.0, memory=7.0, intra_node=Link(9.0, 0.0), inter_node=Link(2.0, 1.0))
    assert topology.node_of_rank == (0, 0, 0, 1, 1, 1)
    assert topology.flops == (5.0,) * 6
    assert topology.memory == (7.0,) * 6
    assert topology.slowest_link == Link(2.0, 1.0)
    assert uniform_topology(2, 1, flops=1.0, memory=1.0, intra_node=Link(9.0, 0.0)).inter_node == Link(9.0, 0.0)


@pytest.mark.parametrize("cuda", [False, True])
def test_local_topology_is_one_node(cuda: bool) -> None:
    topology = local_topology(3, cuda=cuda)
    assert topology.node_of_rank == (0, 0, 0)


def test_nodes_are_numbered_by_their_first_rank() -> None:
    assert nodes_of_hosts(["b", "a", "b", "c", "a"]) == (0, 1, 0, 2, 1)
