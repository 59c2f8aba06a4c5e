"""Sharding groups side by side: each is simulated alone, and what comes together is the slowest's time and everybody's bytes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from hecate.apps.foresee.sharding_groups import ep_group_sizes, simulate_groups, sum_over_groups, with_sum
from hecate.parallel.cluster.mesh import make_mesh
from hecate.parallel.cluster.topology import Link, Topology, uniform_topology
from hecate.parallel.cost.cost_model import LayerCost
from hecate.parallel.simulate.simulated_step import StepBytes, StepSeconds
from hecate.parallel.simulate.simulator import Simulated

COST = LayerCost(trainable_bytes=1.0, non_moe_flops=6.0)


def topology(nodes: tuple[int, ...], flops: tuple[float, ...] | None = None) -> Topology:
    world = len(nodes)
    return Topology(nodes, flops or (1.0,) * world, (1e9,) * world, Link(10.0, 0.25), Link(4.0, 0.5))


def simulated(compute: float, imbalance: float, uplink: float, ranks: int) -> Simulated:
    return Simulated(
        policy="auto",
        seconds=StepSeconds(attention=0.0, compute=compute, dispatch=0.0, gather=0.0, reduce=0.0, exposed=0.0, optimizer=0.0, reshard=0.0),
        bytes=StepBytes(near=compute, far=1.0, busiest_port=compute / 2, busiest_uplink=uplink),
        first_steps=2,
        first_seconds=3 * compute,
        first_bytes=7.0,
        imbalance=imbalance,
        replica_bytes_D=(compute,) * ranks,
        replicas_D=(1.0,) * ranks,
        frozen_parts_D=(2.0,) * ranks,
        served_tokens_D=(uplink,) * ranks,
        most_tokens_D=(uplink,) * ranks,
        planner_ms_per_layer=1 / compute,
    )


@pytest.mark.parametrize(("nodes", "uplink"), [((0, 0, 1, 1), 5.0), ((0, 1, 0, 1), 8.0)])
def test_two_groups_are_as_slow_as_the_slower_and_send_what_both_send(nodes: tuple[int, ...], uplink: float) -> None:
    """Ranks 0 and 1 are slow and need 10 s where 5 would do if each had its share; ranks 2 and 3 are three times as fast and need 4 s.

    All four together would share the work in (5 · 2 + 4 · 6) / 8 = 4.25 s. Attention takes the slow group 6 s, and so the fast one, whose
    devices do 18 FLOPs in that time. On nodes of their own the groups' uplinks are two; else they may meet in one.
    """
    on, mesh = topology(nodes, (1.0, 1.0, 3.0, 3.0)), make_mesh(4, 2)
    loads = np.arange(4 * 3 * 4).reshape(4, 1, 3, 4)
    seen = []

    def simulate(loads_KLED: np.ndarray, part: Topology, cost: LayerCost) -> list[Simulated]:
        seen.append((loads_KLED.tolist(), part.flops, cost.non_moe_flops))
        return [simulated(10.0, 2.0, 3.0, 2) if part.flops[0] == 1.0 else simulated(4.0, 1.0, 5.0, 2)]

    (both,) = simulate_groups(loads, on, COST, mesh, simulate)
    assert seen == [(loads[..., :2].tolist(), (1.0, 1.0), 6.0), (loads[..., 2:].tolist(), (3.0, 3.0), 18.0)]
    assert both.seconds.compute == 10.0
    assert both.imbalance == pytest.approx(10 / 4.25)
    assert both.bytes == StepBytes(near=14.0, far=2.0, busiest_port=5.0, busiest_uplink=uplink)
    assert (both.first_steps, both.first_seconds, both.first_bytes) == (2, 30.0, 14.0)
    added = with_sum(both, 0.5, StepBytes(near=1.0, far=2.0, busiest_port=0.0, busiest_uplink=0.0))
    assert (added.first_seconds, added.first_bytes) == (31.0, 20.0)
    assert both.replica_bytes_D == (10.0, 10.0, 4.0, 4.0)
    assert both.served_tokens_D == (3.0, 3.0, 5.0, 5.0)
    assert both.planner_ms_per_layer == 1 / 4


def test_one_group_is_simulated_as_it_is() -> None:
    one = simulated(10.0, 2.0, 3.0, 2)
    on = topology((0, 0))
    assert simulate_groups(np.zeros((1, 1, 1, 2)), on, COST, make_mesh(2), lambda _loads, part, cost: [one] if part is on else []) == [one]


def test_the_sum_of_gradients_over_two_groups() -> None:
    """With two groups each owner sends as many bytes as it owns. Over nodes both owners' 12 bytes leave at 4 bytes/s, and each of two
    messages waits half a second; inside nodes the larger owner's 8 bytes take 0.8 s at 10 bytes/s."""
    owned_D = np.array([8.0, 4.0, 8.0, 4.0])
    seconds, moved = sum_over_groups(owned_D, 2, topology((0, 0, 1, 1)), make_mesh(4, 2))
    assert seconds == 3.0 + 2 * 0.5
    assert moved == StepBytes(near=0.0, far=24.0, busiest_port=0.0, busiest_uplink=12.0)
    seconds, moved = sum_over_groups(owned_D, 2, topology((0, 1, 0, 1)), make_mesh(4, 2))
    assert seconds == pytest.approx(0.8 + 2 * 0.25)
    assert moved == StepBytes(near=24.0, far=0.0, busiest_port=8.0, busiest_uplink=0.0)


def test_the_sum_of_gradients_in_a_ring_of_three() -> None:
    """Each of three sends two thirds of its 6 bytes twice; a slow NIC counts."""
    on = replace(topology((0, 1, 2)), nic_bandwidth=(4.0, 2.0, 4.0))
    seconds, moved = sum_over_groups(np.full(3, 6.0), 1, on, make_mesh(3, 1))
    assert seconds == pytest.approx(8 / 2 + 0.5)
    assert moved.far == pytest.approx(24.0)


def test_one_group_sums_nothing() -> None:
    assert sum_over_groups(np.full(2, 6.0), 3, topology((0, 0)), make_mesh(2)) == (
        0.0,
        StepBytes(near=0.0, far=0.0, busiest_port=0.0, busiest_uplink=0.0),
    )


@pytest.mark.parametrize(
    ("nodes", "each", "experts", "sizes"),
    [(4, 8, 64, [32, 8]), (4, 8, 8, [8]), (4, 8, 6, [4]), (1, 8, 64, [8]), (2, 6, 4, [4, 3]), (1, 1, 4, [1])],
)
def test_sizes_of_groups_for_expert_parallelism(nodes: int, each: int, experts: int, sizes: list[int]) -> None:
    """No more ranks than experts, in one node or not; they divide the ranks. Groups of 4 of two nodes of 6 are not all in one node."""
    place = uniform_topology(nodes, each, flops=1.0, memory=1.0, intra_node=Link(1.0, 0.0))
    assert ep_group_sizes(place, experts) == sizes
