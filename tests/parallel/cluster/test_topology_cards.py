"""Topologies of jobs that nothing has measured, from the values that ranks say about themselves."""

from __future__ import annotations

import pytest

from hecate.parallel.cluster.topology import local_topology
from hecate.parallel.cluster.topology_cards import CARDS, RankDevice, topology_of_devices
from hecate.parallel.cluster.topology_file import parse_topology, topology_text

H100, A100, L4 = "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB", "NVIDIA L4"


def test_ranks_on_one_cpu_machine_are_planned_for_in_round_numbers() -> None:
    seen = topology_of_devices([RankDevice("here")] * 3)
    assert seen.topology == local_topology(3, cuda=False)
    assert seen.notes == ()


def test_cpu_ranks_of_two_machines_are_two_nodes() -> None:
    seen = topology_of_devices([RankDevice("left"), RankDevice("right"), RankDevice("left")])
    assert seen.topology.node_of_rank == (0, 1, 0)
    assert seen.topology.flops == local_topology(3, cuda=False).flops
    (note,) = seen.notes
    assert "2 nodes are not measured" in note


def test_two_nodes_of_h100() -> None:
    """By hand: 989 TFLOP/s, 3.35 TB/s and 450 GB/s times 0.6, 0.9 and two thirds; eight adapters of 400 Gbit/s a node."""
    seen = topology_of_devices([RankDevice(node, H100, 85e9) for node in ("one", "two") for _ in range(8)])
    topology = seen.topology
    assert topology.node_of_rank == (0,) * 8 + (1,) * 8
    assert topology.flops == pytest.approx([5.934e14] * 16)
    assert topology.memory == (85e9,) * 16
    assert topology.memory_bandwidth == pytest.approx([3.015e12] * 16)
    assert topology.port_bandwidth == pytest.approx([3e11] * 16)
    assert topology.uplink_bandwidth == (4e11, 4e11)
    assert topology.nic_bandwidth == (5e10,) * 16
    assert topology.inter_node.bandwidth == 5e10
    assert topology.inter_node.latency > topology.intra_node.latency
    whole, between = seen.notes
    assert whole == f"topology: 16 x {H100} on 2 nodes"
    assert "links between the 2 nodes are not measured; plans take them for 400 GB/s a node" in between


def test_one_node_has_no_links_that_need_a_note() -> None:
    assert topology_of_devices([RankDevice("here", H100)] * 8).notes == (f"topology: 8 x {H100} on 1 node",)


def test_cards_of_several_kinds_keep_their_own_figures() -> None:
    """The nodes of configs/topologies/mixed.yaml, in another order of ranks."""
    cards = [(H100, "a"), (L4, "c"), (A100, "b"), (L4, "c"), (A100, "b"), (H100, "a")]
    topology = topology_of_devices([RankDevice(node, card) for card, node in cards]).topology
    assert topology.node_of_rank == (0, 1, 2, 1, 2, 0)
    assert topology.flops == pytest.approx([5.934e14, 7.26e13, 1.872e14, 7.26e13, 1.872e14, 5.934e14])
    assert topology.memory == (80e9, 24e9, 80e9, 24e9, 80e9, 80e9), "memory that nobody has read is the advertised one"
    assert topology.port_bandwidth == pytest.approx([3e11, 2.133e10, 2e11, 2.133e10, 2e11, 3e11], rel=1e-3)
    assert topology.uplink_bandwidth == (1e11, 1.25e10, 5e10)
    assert topology.nic_bandwidth == (5e10, 1.25e10, 2.5e10, 1.25e10, 2.5e10, 5e10)
    assert topology.intra_node.bandwidth == min(topology.port_bandwidth)
    assert topology.inter_node.bandwidth == 1.25e10
    assert parse_topology(topology_text(topology), "text") == topology


def test_an_unknown_card_is_reported() -> None:
    slice_of_one = f"{H100} MIG 1g.10gb"
    seen = topology_of_devices(
        [RankDevice("here", slice_of_one, 10e9), RankDevice("here", H100, 80e9), RankDevice("here", slice_of_one, 10e9)]
    )
    assert seen.topology.flops[0] == local_topology(1, cuda=True).flops[0]
    assert seen.topology.memory == (10e9, 80e9, 10e9)
    _, note = seen.notes
    assert note.startswith(f"topology: auto does not know the card '{slice_of_one}'; plans take it for one of 400 TFLOP/s and 200 GB/s")
    assert "hecate profile" in note
    assert "memory" not in note, "the devices have said it"
    _, of_plan = topology_of_devices([RankDevice("here", "Card of tomorrow")]).notes
    assert "with 80 GB of memory;" in of_plan


def test_unknown_cards_alone_are_planned_for_as_one_node_of_them() -> None:
    topology = topology_of_devices([RankDevice("here", "Card of tomorrow")] * 4).topology
    wanted = local_topology(4, cuda=True)
    assert (topology.flops, topology.memory, topology.port_bandwidth) == (wanted.flops, wanted.memory, wanted.port_bandwidth)
    assert topology.memory_bandwidth == wanted.memory_bandwidth


@pytest.mark.parametrize("name", CARDS)
def test_the_table_has_no_slips_of_the_pen(name: str) -> None:
    """The ratios that all cards of these generations share: one byte for 100 to 500 FLOPs, links below the memory, 20 to 200 GB."""
    card = CARDS[name]
    assert 100 <= card.bf16_flops / card.memory_bandwidth <= 500 or name == "GeForce RTX 3090"
    assert 24e9 <= card.memory <= 200e9
    assert card.link <= card.memory_bandwidth / 4
    assert card.nic is None or card.nic <= card.link
