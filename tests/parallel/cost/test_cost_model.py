"""The cost model's seconds, computed by hand on small machines."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from hecate.parallel.cluster.topology import Link, Topology
from hecate.parallel.cost.cost_loops import exposed_seconds
from hecate.parallel.cost.cost_model import HISTORY, ExecutionMode, LayerCost, Rows, overlap_degree, topology_numbers
from hecate.parallel.cost.cost_numbers import FAR_IN, FAR_OUT, NEAR_IN, NEAR_OUT, port_seconds, transfer_latency
from hecate.parallel.cost.flows import flows
from hecate.parallel.transfer.transfer_plan import plan_transfer
from hecate.parallel.values.layout import ChunkSize
from hecate.parallel.values.placement import Placement
from testing.plain_flows import even_quota, layer_seconds, rows_served
from testing.unit_cases import unit_topology
from tests.parallel.plain_cost_model import plain_layer_seconds

FAST = 1e30
"""a rate at which nothing takes any time"""
NO_LINK = Link(FAST, 0.0)


topology = partial(unit_topology, near=NO_LINK, far=NO_LINK, memory_bandwidth=FAST)


def seconds(
    machines: Topology,
    cost: LayerCost,
    *,
    owner: list[int],
    where: list[list[int]] | None = None,
    tokens: list[list[float]] | None = None,
    quota: list[list[float]] | None = None,
    resident: list[list[int]] | None = None,
    execution: ExecutionMode = HISTORY,
) -> dict[str, float]:
    """Of one layer; without `where` each expert is on its owner alone, without `tokens` there are none, without `quota` they stay."""
    owner_E = np.array(owner)
    world = machines.world_size
    where_ED = owner_E[:, None] == np.arange(world) if where is None else np.array(where, dtype=bool)
    loads_ED = np.zeros(where_ED.shape) if tokens is None else np.array(tokens, dtype=np.float64)
    quota_ED = loads_ED if quota is None else np.array(quota, dtype=np.float64)
    resident_ED = None if resident is None else np.array(resident, dtype=bool)
    found = layer_seconds(owner_E, where_ED, quota_ED, loads_ED, machines, cost, resident_ED=resident_ED, execution=execution)
    return {name: float(getattr(found, name)) for name in ("compute", "dispatch", "gather", "reduce", "exposed", "optimizer", "total")}


def test_computing_takes_as_long_as_the_slowest_device() -> None:
    """20 assignments at 10 FLOP/s, 15 at 5; one assignment is 1 FLOP forward, 2 backward, its row 2 forward, 1 · 2 backward: 7.

    140 FLOP in 14 s and 105 in 21 s; never 35 s, nor (20 + 15) · 7 / 15.
    """
    cost = LayerCost(trainable_bytes=0.0, assignment_flops=1.0, row_flops=2.0)
    machines = topology((0, 0), flops=(10.0, 5.0))
    assert seconds(machines, cost, owner=[0, 1], tokens=[[20, 0], [0, 15]])["compute"] == pytest.approx(21.0)
    # Five of rank 1's moved to rank 0: 25 · 7 / 10 and 10 · 7 / 5.
    moved = {"where": [[1, 0], [1, 1]], "tokens": [[20, 0], [0, 15]], "quota": [[20, 0], [5, 10]]}
    assert seconds(machines, cost, owner=[0, 1], **moved)["compute"] == pytest.approx(17.5)


def test_backward_over_forward_is_of_rows_and_assignments_apart() -> None:
    """10 assignments, 1 FLOP and 4 backward each; 10 rows, 3 FLOP and 2 · 3 backward each."""
    cost = LayerCost(trainable_bytes=0.0, assignment_flops=1.0, assignment_backward=4.0, row_flops=3.0, row_backward=2.0)
    assert seconds(topology((0,)), cost, owner=[0], tokens=[[10]])["compute"] == pytest.approx(10 * 5 + 10 * 9)


def test_rows_are_computed_once_whatever_number_of_their_experts_is_here() -> None:
    """Ten tokens with two assignments each, all here: 20 assignments of 1 + 2 FLOP, but 10 rows of 1 + 1."""
    cost = LayerCost(trainable_bytes=0.0, top_k=2, assignment_flops=1.0, row_flops=1.0)
    assert seconds(topology((0,)), cost, owner=[0, 0], tokens=[[12], [8]])["compute"] == pytest.approx(20 * 3 + 10 * 2)


ROW = LayerCost(trainable_bytes=0.0, row_bytes=10.0)
ALL_RANKS = [[1, 1, 1, 1]]


@pytest.mark.parametrize(
    ("machines", "tokens", "quota", "expected"),
    [
        # Nothing travels: no bytes, no latency.
        ({"near": Link(1.0, 0.5)}, [[5, 6, 7, 8]], [[5, 6, 7, 8]], 0.0),
        # Six rows from rank 0 to 1, 60 bytes at 100 and at 50 B/s: 1.2 s, four times; eight latencies of half a second.
        ({"near": Link(1.0, 0.5), "port_bandwidth": (100.0, 50.0, FAST, FAST)}, [[6, 0, 0, 0]], [[0, 6, 0, 0]], 4 * 1.2 + 4.0),
        # In both directions at once: six of one expert this way, four of another that way. The longer decides, not the sum.
        ({"port_bandwidth": (100.0, 50.0, FAST, FAST)}, [[6, 0, 0, 0], [0, 4, 0, 0]], [[0, 6, 0, 0], [4, 0, 0, 0]], 4 * 1.2),
        # Two pairs side by side: the slower decides.
        ({"port_bandwidth": (100.0, 50.0, 20.0, 20.0)}, [[6, 0, 3, 0]], [[0, 6, 0, 3]], 4 * 1.5),
        # Between nodes, through NICs of 30 and 60 B/s: 60 bytes in 2 s.
        ({"far": Link(FAST, 1.0), "nic_bandwidth": (30.0, FAST, 60.0, FAST)}, [[6, 0, 0, 0]], [[0, 0, 6, 0]], 4 * 2.0 + 8.0),
        # Two ranks share an uplink of 60 B/s: 120 bytes in 2 s, though each NIC would need no time.
        (
            {"far": Link(FAST, 1.0), "uplink_bandwidth": (60.0, FAST), "nic_bandwidth": (FAST,) * 4},
            [[6, 6, 0, 0]],
            [[0, 0, 6, 6]],
            4 * 2.0 + 8.0,
        ),
        # ... and it is full when it comes in, too.
        (
            {"far": Link(FAST, 1.0), "uplink_bandwidth": (FAST, 40.0), "nic_bandwidth": (FAST,) * 4},
            [[6, 6, 0, 0]],
            [[0, 0, 6, 6]],
            4 * 3.0 + 8.0,
        ),
        # Each of two ranks sends half through its own NIC of 30 B/s: 1 s, not 2.
        ({"far": Link(FAST, 1.0), "nic_bandwidth": (30.0, 30.0, FAST, FAST)}, [[3, 3, 0, 0]], [[0, 0, 6, 0]], 4 * 1.0 + 8.0),
        # Near traffic beside far: 60 bytes at 20 B/s hide the 30 at 60; the latency of an exchange between nodes covers both.
        (
            {"near": Link(FAST, 0.5), "far": Link(FAST, 1.0), "port_bandwidth": (20.0,) * 4, "nic_bandwidth": (60.0,) * 4},
            [[9, 0, 0, 0]],
            [[0, 6, 3, 0]],
            4 * 3.0 + 8.0,
        ),
        # An exchange inside the nodes waits longer, also if it is empty: rows for the other node make it no faster.
        ({"near": Link(FAST, 2.0), "far": Link(FAST, 1.0)}, [[9, 0, 0, 0]], [[0, 0, 9, 0]], 8 * 2.0),
    ],
)
def test_dispatch_by_hand(machines: dict[str, object], tokens: list[list[float]], quota: list[list[float]], expected: float) -> None:
    """Rows of 10 bytes, four ranks on two nodes, one assignment a token."""
    given_ = topology((0, 0, 1, 1), **machines)  # type: ignore[arg-type]
    found = seconds(given_, ROW, owner=[0] * len(tokens), where=ALL_RANKS * len(tokens), tokens=tokens, quota=quota)
    assert found["dispatch"] == pytest.approx(expected)


def test_ranks_of_a_node_need_not_be_adjacent() -> None:
    """Nodes {0, 2} and {1, 3}: 0 to 2 is near, 0 to 1 far."""
    machines = topology((0, 1, 0, 1), near=Link(100.0, 0.0), far=Link(10.0, 0.0))
    near = seconds(machines, ROW, owner=[0], where=ALL_RANKS, tokens=[[6, 0, 0, 0]], quota=[[0, 0, 6, 0]])
    far = seconds(machines, ROW, owner=[0], where=ALL_RANKS, tokens=[[6, 0, 0, 0]], quota=[[0, 6, 0, 0]])
    assert (near["dispatch"], far["dispatch"]) == pytest.approx((4 * 0.6, 4 * 6.0))


@pytest.mark.parametrize(
    ("nodes", "where", "tokens", "waits"),
    [
        ((0, 0), [[1, 1]], [[5, 5]], 0.0),  # everything everywhere: nobody need be asked
        ((0, 0), [[1, 1], [1, 0]], [[5, 5], [2, 0]], 8 * 0.5),  # every assignment stays, but the others cannot know that
        ((0, 0), [[1, 1], [1, 0]], [[0, 0], [0, 0]], 0.0),  # without tokens nothing happens
        ((0, 1), [[1, 1], [1, 0]], [[5, 5], [2, 0]], 8 * 3.0),
        ((0, 0, 1), [[1, 1, 1], [1, 0, 0]], [[5, 5, 5], [2, 0, 0]], 7 * 0.5 + 3.0),  # counts go to the other node, too
        ((0,), [[1], [1]], [[5], [5]], 0.0),
    ],
)
def test_asking_costs_latency_though_no_token_leaves(
    nodes: tuple[int, ...], where: list[list[int]], tokens: list[list[float]], waits: float
) -> None:
    given_ = topology(nodes, near=Link(1.0, 0.5), far=Link(1.0, 3.0))
    assert seconds(given_, ROW, owner=[0] * len(where), where=where, tokens=tokens)["dispatch"] == pytest.approx(waits)


def test_rows_inside_the_nodes_do_not_pay_the_latency_between_them_only_counts_do() -> None:
    """Thirds, which no float64 holds: ranks 0 and 4 have an assignment, three other ranks of their nodes serve it."""
    machines = topology((0, 0, 0, 0, 1, 1, 1, 1), near=Link(FAST, 0.5), far=Link(FAST, 100.0))
    where = np.array([[0, 1, 1, 1, 0, 1, 1, 1]] * 3, dtype=bool)
    tokens = np.array([[1.0, 0, 0, 0, 0.1, 0, 0, 0]] * 3)
    found = layer_seconds(np.array([1, 1, 1]), where, even_quota(where, tokens, machines), tokens, machines, ROW)
    assert float(found.dispatch) == pytest.approx(7 * 0.5 + 100.0)


def test_gather_and_reduce_inside_a_node_by_hand() -> None:
    """Rank 0 owns an expert of 8 bytes, gradients of 2, and sends two copies: 16 bytes at 4 B/s, 4 bytes back; 1/4 s of latency each."""
    cost = LayerCost(trainable_bytes=8.0, gradient_bytes=2.0)
    found = seconds(topology((0, 0, 0), near=Link(4.0, 0.25)), cost, owner=[0], where=[[1, 1, 1]])
    assert (found["gather"], found["reduce"]) == pytest.approx((4.25, 1.25))
    # Two owners side by side take as long as one.
    found = seconds(topology((0, 0, 0), near=Link(4.0, 0.25)), cost, owner=[0, 1], where=[[1, 1, 1], [1, 1, 1]])
    assert (found["gather"], found["reduce"]) == pytest.approx((4.25, 1.25))
    # One slow port holds all up: rank 2 takes one copy at 1 B/s.
    found = seconds(topology((0, 0, 0), near=Link(4.0, 0.0), port_bandwidth=(4.0, 4.0, 1.0)), cost, owner=[0], where=[[1, 1, 1]])
    assert (found["gather"], found["reduce"]) == pytest.approx((8.0, 2.0))


def test_gather_between_nodes_by_hand() -> None:
    """Rank 0's expert of 8 bytes on all of nodes {0}, {1, 2, 3}, {4}, at 2 B/s between nodes.

    Flat: 32 bytes leave in 16 s, and 3 s of latency. Over leaders, 16 bytes leave in 8 s and 3 s; then rank 1 hands 16 bytes on to 2 and 3
    inside its node, in 16 s at 1 B/s and in 1.6 s at 10 B/s, and half a second of latency. In thirds, which are handed on by all three at
    once, each sends two thirds of the expert: 5.33 s at 1 B/s. Gradients go flat just so. Over leaders, they go first inside the node,
    beside that of rank 4, which takes 4 s, with both latencies; then 8 bytes leave rank 1 in 4 s.
    """
    cost = LayerCost(trainable_bytes=8.0)
    slow, fast = (topology((0, 1, 1, 1, 2), near=Link(rate, 0.5), far=Link(2.0, 3.0)) for rate in (1.0, 10.0))
    everywhere = {"owner": [0], "where": [[1, 1, 1, 1, 1]]}
    over_leaders = ExecutionMode(route="two_level")
    for machines, execution, expected in (
        (slow, HISTORY, (16 + 3.0, 16 + 3.0)),
        (slow, over_leaders, (8 + 3 + 16 + 0.5, 16 + 3.5 + 4 + 3)),
        (fast, HISTORY, (8 + 3 + 1.6 + 0.5, 4 + 3.5 + 4 + 3)),
        (fast, over_leaders, (8 + 3 + 1.6 + 0.5, 4 + 3.5 + 4 + 3)),
    ):
        found = seconds(machines, cost, **everywhere, execution=execution)  # type: ignore[arg-type]
        assert (found["gather"], found["reduce"]) == pytest.approx(expected), execution
    cut = replace(cost, chunk_numel=12)
    assert seconds(slow, cut, **everywhere)["gather"] == pytest.approx(8 + 3 + 16 / 3 + 0.5)  # type: ignore[arg-type]
    machines = slow
    assert seconds(machines, cost, owner=[0], where=[[1, 1, 0, 0, 1]])["gather"] == pytest.approx(8 + 3.0)
    assert seconds(machines, cost, owner=[1], where=[[0, 1, 1, 0, 0]])["gather"] == pytest.approx(8 + 0.5)
    assert seconds(machines, cost, owner=[1])["gather"] == 0.0
    # A NIC slower than its node's uplink, and the other way round: ranks 1 and 2 of node 1 send an expert each to rank 0.
    both = {"owner": [1, 2], "where": [[1, 1, 0, 0, 0], [1, 0, 1, 0, 0]]}
    machines = topology((0, 1, 1, 1, 2), uplink_bandwidth=(FAST, 4.0, FAST), nic_bandwidth=(FAST, 1.0, 4.0, FAST, FAST))
    assert seconds(machines, cost, **both)["gather"] == pytest.approx(8.0)  # type: ignore[arg-type]
    machines = topology((0, 1, 1, 1, 2), uplink_bandwidth=(FAST, 4.0, FAST), nic_bandwidth=(FAST,) * 5)
    assert seconds(machines, cost, **both)["gather"] == pytest.approx(4.0)  # type: ignore[arg-type]


def test_a_lone_replica_of_a_node_returns_its_gradient_in_the_first_exchange() -> None:
    """Rank 0's experts of 8 bytes over leaders: expert 0 on both of node {1, 2}, expert 1 on rank 3 of node {3}; 1 B/s everywhere.

    Gather: two copies leave in 16 s, then 8 s inside. Gradients: 8 s inside beside those of rank 3, then 8 s from the leader.
    """
    found = seconds(
        topology((0, 1, 1, 2), near=Link(1.0, 0.5), far=Link(1.0, 3.0)),
        LayerCost(trainable_bytes=8.0),
        owner=[0, 0],
        where=[[1, 1, 1, 0], [1, 0, 0, 1]],
        execution=ExecutionMode(route="two_level"),
    )
    assert (found["gather"], found["reduce"]) == pytest.approx((16 + 3 + 8 + 0.5, 8 + 0.5 + 3 + 8 + 3))


def test_a_sliced_gather_is_priced_below_the_flat_one_where_it_pays_and_is_what_the_run_does() -> None:
    """Rank 0's expert of 12 bytes to three others, 1 B/s: flat 36 s; in thirds 12 s to the leaders and 8 s from each to the others."""
    machines = topology((0, 0, 0, 0), near=Link(1.0, 0.25))
    cost = LayerCost(trainable_bytes=12.0, chunk_numel=3)
    placed = {"owner": [0], "where": [[1, 1, 1, 1]]}
    found = seconds(machines, cost, **placed)  # type: ignore[arg-type]
    flat = seconds(machines, cost, **placed, execution=ExecutionMode(route="flat"))  # type: ignore[arg-type]
    assert (found["gather"], found["reduce"]) == pytest.approx((12 + 8 + 0.5,) * 2)
    assert (flat["gather"], flat["reduce"]) == pytest.approx((36.25, 36.25))
    placement = Placement(np.array([0]), np.ones((1, 4), dtype=bool))
    transfer = plan_transfer(placement, None, ChunkSize(3, 4), machines, rank=0)
    assert (transfer.chunks.route, transfer.chunks.slices) == ("sliced", 3)


def test_frozen_parts_travel_flat_whatever_route_the_trainable_ones_take() -> None:
    """40 frozen bytes to each of three, 120 in all, once in 20 steps."""
    machines, cost = topology((0, 0, 0, 0), near=Link(1.0, 0.0)), LayerCost(trainable_bytes=12.0, chunk_numel=3, frozen_bytes=40.0)
    assert seconds(machines, cost, owner=[0], where=[[1, 1, 1, 1]])["gather"] == pytest.approx(20 + 6)


@pytest.mark.parametrize(
    ("compute", "transfer", "slowdown", "expected"),
    [
        # Without slowdown only what outlasts the work is seen.
        (3.0, 5.0, 1.0, 2.0),
        (5.0, 3.0, 1.0, 0.0),
        (4.0, 4.0, 1.0, 0.0),
        # Both at two thirds of their speed: 3 s of work take 4.5 s, in which 3 of the 5 s of transfer are done: 6.5 s, 3.5 more than 3.
        (3.0, 5.0, 1.5, 3.5),
        (5.0, 3.0, 1.5, 1.5),
        (4.0, 4.0, 1.5, 2.0),
        # Nothing is gained: as if one came after the other.
        (3.0, 5.0, 2.0, 5.0),
        (5.0, 3.0, 2.0, 3.0),
        # Nothing to hide behind, and nothing to hide.
        (0.0, 5.0, 1.5, 5.0),
        (5.0, 0.0, 1.5, 0.0),
    ],
)
def test_exposed_seconds_by_hand(compute: float, transfer: float, slowdown: float, expected: float) -> None:
    assert exposed_seconds(compute, transfer, slowdown) == pytest.approx(expected)


@pytest.mark.parametrize(("slowdown", "expected"), [(1.0, 2 + 4), (1.5, 3.5 + 7), (2.0, 5 + 10)])
def test_attention_hides_gathers_forward_and_reductions_backward(slowdown: float, expected: float) -> None:
    """A gather of 5 s behind 3 s of attention, a reduction of 10 s behind its backward pass of 6 s; on the slowest device."""
    cost = LayerCost(trainable_bytes=5.0, gradient_bytes=10.0, non_moe_flops=6.0)
    machines = topology((0, 0), flops=(2.0, 5.0), near=Link(1.0, 0.0), overlap_slowdown=slowdown)
    found = seconds(machines, cost, owner=[0], where=[[1, 1]])
    assert (found["gather"], found["reduce"]) == pytest.approx((5.0, 10.0))
    assert found["exposed"] == pytest.approx(expected)
    assert found["total"] == pytest.approx(expected)


def test_the_backward_pass_of_a_frozen_attention_hides_less() -> None:
    """A reduction of 10 s behind a backward pass that takes 3 s, as long as the forward pass."""
    cost = LayerCost(trainable_bytes=0.0, gradient_bytes=10.0, non_moe_flops=6.0, non_moe_backward=1.0)
    machines = topology((0, 0), flops=(2.0, 5.0), near=Link(1.0, 0.0))
    assert seconds(machines, cost, owner=[0], where=[[1, 1]])["exposed"] == pytest.approx(10 - 3)


def test_rematerialization_gathers_again_before_the_backward_pass() -> None:
    """As above without slowdown: 2 s forward; 10 + 5 s behind 6 s backward."""
    cost = LayerCost(trainable_bytes=5.0, gradient_bytes=10.0, non_moe_flops=6.0)
    machines = topology((0, 0), flops=(2.0, 5.0), near=Link(1.0, 0.0))
    assert seconds(machines, cost, owner=[0], where=[[1, 1]], execution=ExecutionMode(rematerialize=True))["exposed"] == pytest.approx(
        2 + 9
    )


@pytest.mark.parametrize(("prefetch", "exposed"), [(1, 5.25 + 5), (2, 2.25 + 5)])
def test_units_of_a_layer_share_the_latency_of_their_message_and_need_it_at_the_layers_beginning(prefetch: int, exposed: float) -> None:
    """A gather of 5 s and a quarter of 1 s of latency, which 3 s of work hide only where it starts a layer early.

    Of a reduction, which travels alone, of 10 + 1 s 6 s of the backward pass hide all but 5.
    """
    cost = LayerCost(trainable_bytes=5.0, gradient_bytes=10.0, non_moe_flops=6.0, hidden_from=2, message_share=0.25)
    machines = topology((0, 0), flops=(2.0, 5.0), near=Link(1.0, 1.0))
    execution = ExecutionMode(prefetch=prefetch)
    found = seconds(machines, cost, owner=[0], where=[[1, 1]], execution=execution)
    assert (found["gather"], found["reduce"]) == pytest.approx((5.25, 11.0))
    assert found["exposed"] == pytest.approx(exposed)
    where_ED, none_ED = np.ones((1, 2), dtype=bool), np.zeros((1, 2))
    plain = plain_layer_seconds(np.array([0]), where_ED, none_ED, none_ED, machines, cost, execution=execution)
    assert float(plain.exposed) == pytest.approx(exposed)


def test_the_optimizer_by_hand() -> None:
    """Gradients of 4 bytes read, 3 of state read and written: 10 an expert. Three at 10 B/s, one at 20 B/s, one at 2 B/s."""
    cost = LayerCost(trainable_bytes=100.0, gradient_bytes=4.0, state_bytes=3.0)
    machines = topology((0, 0, 0), memory_bandwidth=(10.0, 20.0, 2.0))
    assert seconds(machines, cost, owner=[0, 0, 0, 1])["optimizer"] == pytest.approx(3.0)
    assert seconds(machines, cost, owner=[0, 0, 0, 1])["total"] == pytest.approx(3.0)
    assert seconds(machines, cost, owner=[0, 0, 0, 1, 2])["optimizer"] == pytest.approx(5.0)
    assert seconds(machines, cost, owner=[0, 0, 0], where=[[1, 1, 1]] * 3)["optimizer"] == pytest.approx(3.0), "replicas have no state"


def test_frozen_bytes_are_paid_over_their_lifetime_and_once() -> None:
    """An expert of 6 + 40 bytes on ranks 0, 1 and 2 of one node, 2 B/s: 12 bytes in 6 s, and 80 in 40 s once in 20 steps: 2 s a step."""
    cost = LayerCost(trainable_bytes=6.0, frozen_bytes=40.0)
    machines = topology((0, 0, 0), near=Link(2.0, 0.0))
    placed = {"owner": [0], "where": [[1, 1, 1]]}
    assert seconds(machines, cost, **placed)["gather"] == pytest.approx(6 + 2)  # type: ignore[arg-type]
    assert seconds(machines, replace(cost, frozen_lifetime=80.0), **placed)["gather"] == pytest.approx(6 + 0.5)  # type: ignore[arg-type]
    for resident, expected in (([[1, 0, 0]], 8.0), ([[1, 1, 0]], 7.0), ([[0, 1, 0]], 7.0), ([[1, 1, 1]], 6.0), ([[0, 1, 1]], 6.0)):
        assert seconds(machines, cost, **placed, resident=resident)["gather"] == pytest.approx(expected), resident  # type: ignore[arg-type]
    assert seconds(machines, cost, **placed)["reduce"] == pytest.approx(6.0), "frozen parts have no gradient"  # type: ignore[arg-type]


def test_frozen_parts_are_not_gathered_again_before_the_backward_pass() -> None:
    """As above with nothing to hide behind: 6 + 2 s forward, 6 + 6 s backward."""
    cost = LayerCost(trainable_bytes=6.0, frozen_bytes=40.0)
    found = seconds(
        topology((0, 0, 0), near=Link(2.0, 0.0)), cost, owner=[0], where=[[1, 1, 1]], execution=ExecutionMode(rematerialize=True)
    )
    assert found["exposed"] == pytest.approx(20.0)


def test_frozen_parts_that_stay_where_no_replica_is_wanted_are_not_moved() -> None:
    cost = LayerCost(trainable_bytes=6.0, frozen_bytes=40.0)
    found = seconds(topology((0, 0), near=Link(1.0, 0.0)), cost, owner=[0], resident=[[1, 1]])
    assert (found["gather"], found["reduce"]) == (0.0, 0.0)


def test_bytes_of_an_expert() -> None:
    """10 to bring, 4 back, 60 frozen: 10 + 60 / 20 a step, 74 of memory. Gradients are as large as parameters unless told."""
    cost = LayerCost(trainable_bytes=10.0, gradient_bytes=4.0, frozen_bytes=60.0, state_bytes=1000.0)
    assert (cost.expert_bytes, cost.reduced_bytes, cost.replica_bytes) == (13.0, 4.0, 74.0)
    cost = LayerCost(trainable_bytes=10.0)
    assert (cost.expert_bytes, cost.reduced_bytes, cost.replica_bytes) == (10.0, 10.0, 20.0)


def rows(tokens: list[list[float]], quota: list[list[float]], top_k: int, nodes: tuple[int, ...]) -> Rows:
    loads_ED = np.array(tokens, dtype=np.float64)
    flow = flows(loads_ED, np.array(quota, dtype=np.float64), topology(nodes))
    return rows_served(flow, loads_ED, LayerCost(trainable_bytes=0.0, top_k=top_k), topology(nodes))


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_tokens_with_all_their_assignments_here_are_one_row_each(top_k: int) -> None:
    """12 and 20 tokens, each with k assignments, of two experts that are both here."""
    assignments = [[5.0 * top_k, 20.0 * top_k], [7.0 * top_k, 0.0]]
    found = rows(assignments, assignments, top_k, (0, 1))
    assert found.computed_D.tolist() == pytest.approx([12.0, 20.0])
    assert not any(np.any(part) for part in (*found.near, *found.far))


@pytest.mark.parametrize("nodes", [(0, 0), (0, 1)])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_tokens_with_all_their_assignments_elsewhere_are_one_row_each(top_k: int, nodes: tuple[int, ...]) -> None:
    """All assignments of rank 0's 12 tokens are served by rank 1."""
    found = rows([[12.0 * top_k, 0.0]], [[0.0, 12.0 * top_k]], top_k, nodes)
    assert found.computed_D.tolist() == pytest.approx([0.0, 12.0])
    sent, received = found.near if nodes == (0, 0) else found.far
    assert sent.tolist() == pytest.approx([12.0, 0.0])
    assert received.tolist() == pytest.approx([0.0, 12.0])


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_one_assignment_is_one_row(top_k: int) -> None:
    """Of a million tokens: drawn independently, a second assignment of the same token is a rare chance."""
    found = rows([[1e6 * top_k, 0.0]], [[1e6 * top_k - 1, 1.0]], top_k, (0, 0))
    for one in (found.computed_D[1], found.near[0][0], found.near[1][1]):
        assert float(one) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("share", [0.0, 0.25, 0.6, 1.0])
def test_distinct_rows_are_the_tokens_with_an_assignment_here(top_k: int, share: float) -> None:
    """Every pattern of k assignments, here or not, with its probability."""
    wanted = 0.0
    for pattern in itertools.product((True, False), repeat=top_k):
        chance = float(np.prod([share if here else 1 - share for here in pattern]))
        wanted += 40 * chance if any(pattern) else 0.0
    assignments = 40.0 * top_k
    found = rows([[assignments, 0.0]], [[assignments * (1 - share), assignments * share]], top_k, (0, 0))
    assert float(found.computed_D[1]) == pytest.approx(wanted, rel=1e-9, abs=1e-9)


def test_rows_by_hand() -> None:
    """Ten tokens of rank 0 with two assignments each: 15 assignments stay, 5 go to rank 1, of its node.

    A quarter of the assignments: 10 · (1 - (3/4)²) = 4.375 rows travel; 10 · (1 - (1/4)²) = 9.375 stay.
    """
    found = rows([[20.0, 0.0, 0.0]], [[15.0, 5.0, 0.0]], 2, (0, 0, 1))
    assert found.computed_D.tolist() == pytest.approx([9.375, 4.375, 0.0])
    assert found.near[0].tolist() == pytest.approx([4.375, 0.0, 0.0])
    assert found.near[1].tolist() == pytest.approx([0.0, 4.375, 0.0])


@pytest.mark.parametrize(
    ("nodes", "flops", "expected"),
    [
        # One node: 8e9 FLOP at 1e9 FLOP/s are 8 s, less 1 s of latency; 7 s · 100 B/s / 40 B = 17.5 experts.
        ((0, 0), (1e9, 1e9), 17),
        # The fastest device has the least time to hide behind: 4 s - 1 s; 3 · 100 / 40 = 7.5.
        ((0, 0), (1e9, 2e9), 7),
        # Two nodes, over the slow link: (8 - 2) s · 10 B/s / 40 B = 1.5.
        ((0, 1), (1e9, 1e9), 1),
    ],
)
def test_overlap_degree_by_hand(nodes: tuple[int, ...], flops: tuple[float, ...], expected: int) -> None:
    given_ = topology(nodes, flops=flops, near=Link(100.0, 1.0), far=Link(10.0, 2.0))
    assert overlap_degree(LayerCost(trainable_bytes=40.0, non_moe_flops=8e9), given_) == expected
    # The same 40 bytes, part of them of a frozen part paid over 20 steps.
    assert overlap_degree(LayerCost(trainable_bytes=30.0, frozen_bytes=200.0, non_moe_flops=8e9), given_) == expected


@pytest.mark.parametrize("non_moe_flops", [0.0, 0.5e9, 1e9])
def test_nothing_hides_behind_less_than_the_latency(non_moe_flops: float) -> None:
    given_ = topology((0,), flops=(1e9,), near=Link(1e12, 1.0), far=Link(1e12, 1.0))
    assert overlap_degree(LayerCost(trainable_bytes=1.0, non_moe_flops=non_moe_flops), given_) == 0


def test_any_number_of_experts_without_bytes_is_hidden() -> None:
    given_ = topology((0, 0), flops=(1e9, 1e9), near=Link(1.0, 1.0))
    assert overlap_degree(LayerCost(trainable_bytes=0.0, non_moe_flops=8e9), given_) > 10**6
    assert overlap_degree(LayerCost(trainable_bytes=0.0, non_moe_flops=0.5e9), given_) == 0


def test_the_busiest_port_nic_or_uplink_decides() -> None:
    """Two nodes of two ranks. Ports carry 10 a second, NICs 4, uplinks 2: ranks 0 and 1 send 3 each out: 3 seconds."""
    machines = topology_numbers(
        Topology(
            (0, 0, 1, 1), (1.0,) * 4, (1e9,) * 4, Link(10.0, 1.0), Link(2.0, 5.0),
            port_bandwidth=(10.0,) * 4, uplink_bandwidth=(2.0, 2.0), nic_bandwidth=(4.0,) * 4,
        )
    )  # fmt: skip
    ports = np.zeros((4, 4))
    ports[NEAR_OUT, 0] = ports[NEAR_IN, 1] = 20.0
    assert port_seconds(ports, machines) == 2.0
    assert transfer_latency(ports, machines) == 1.0
    ports[FAR_OUT, :2] = ports[FAR_IN, 2:] = 3.0
    assert port_seconds(ports, machines) == 3.0
    assert transfer_latency(ports, machines) == 6.0
