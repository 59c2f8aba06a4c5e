"""The plans from which the search for small changes begins: each is a plan, and each rule does what its source says."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hecate.parallel.cluster.topology import Link, Topology, uniform_topology
from hecate.parallel.cost import cost_loops as loops
from hecate.parallel.cost.cost_model import topology_numbers
from hecate.parallel.loops.replica_lists import Replicas, no_replicas, only_owners
from hecate.parallel.planners import POLICIES, PlanInput
from hecate.parallel.planners.replication import expert_orders
from hecate.parallel.planners.search_starts import (
    BEST,
    HELD,
    STARTS,
    UNDER,
    fill_up,
    keep_under,
    spread_over_nodes,
    start_with,
)
from tests.parallel.planners.auto_inputs import inputs


def cluster(nodes: int, devices: int) -> Topology:
    return uniform_topology(nodes, devices, flops=1e12, memory=1e10, intra_node=Link(1e9, 0.0), inter_node=Link(1e9, 0.0))


def only(owner: np.ndarray, ranks: int) -> Replicas:
    replicas = no_replicas(len(owner), ranks)
    only_owners(replicas, owner)
    return replicas


def started(start: int, given_: PlanInput) -> Replicas:
    """The plan of the first layer."""
    numbers, owner = topology_numbers(given_.topology), given_.owner_LE[0]
    slots = np.minimum(given_.slots_D, given_.num_experts)
    loads = loops.layer_loads(np.ascontiguousarray(given_.expected_LED[0].T, dtype=np.float64), numbers)
    plan = no_replicas(given_.num_experts, given_.world_size)
    resident = np.zeros((0, 0), np.bool_) if given_.resident_LED is None else given_.resident_LED[0]
    start_with(start, owner, slots, resident, 2, expert_orders(owner, slots, loads, numbers), loads, numbers, plan)
    return plan


@settings(deadline=None)
@given(inputs(), st.integers(BEST + 1, STARTS - 1))
def test_each_is_a_plan(given_: PlanInput, start: int) -> None:
    plan = started(start, given_)
    where, owned = plan.has_ED, given_.owned_LED[0]
    assert (where | ~owned).all(), "an owner lost its replica"
    assert ((where & ~owned).sum(0) <= given_.slots_D).all()
    for e in range(len(where)):
        assert plan.rank_EC[e, : plan.count_E[e]].tolist() == np.flatnonzero(where[e]).tolist()
    quota, load = np.where(where, plan.quota_ED, 0.0), given_.expected_LED[0].sum(1)
    assert (quota >= -1e-6 * max(load.max(), 1.0)).all()
    assert quota.sum(1) == pytest.approx(load, abs=1e-6 * max(load.max(), 1.0))


def test_ranks_are_filled_up_to_their_share() -> None:
    """Worked example B of the reference on MoonEP: rank 0's expert has 40 of 64 assignments, and each rank serves 16 in the end."""
    n_SE = np.array([[11, 3, 1, 1], [10, 3, 2, 1], [9, 4, 2, 1], [10, 2, 3, 1]], dtype=np.float64)
    numbers, owner = topology_numbers(cluster(1, 4)), np.arange(4)
    replicas = only(owner, 4)
    fill_up(owner, np.ones(4, np.int64), loops.layer_loads(n_SE, numbers), numbers, replicas)
    assert replicas.quota_ED[0].tolist() == [16.0, 4.0, 8.0, 12.0]
    assert np.where(replicas.has_ED, replicas.quota_ED, 0.0).sum(0).tolist() == [16.0] * 4


def test_without_slots_nothing_is_filled_up() -> None:
    numbers, owner = topology_numbers(cluster(1, 2)), np.array([0, 1])
    replicas = only(owner, 2)
    fill_up(owner, np.zeros(2, np.int64), loops.layer_loads(np.array([[9.0, 1.0], [9.0, 1.0]]), numbers), numbers, replicas)
    assert replicas.quota_ED[[0, 1], [0, 1]].tolist() == [18.0, 2.0]
    assert replicas.count_E.tolist() == [1, 1]


@settings(deadline=None)
@given(inputs())
def test_nobody_is_busier_than_under_ultraep_where_devices_are_alike(given_: PlanInput) -> None:
    """UltraEP moves 1024 assignments at least, where its first tries fail, and looks for its bound in other steps."""
    ranks = given_.world_size
    alike = dataclasses.replace(given_.topology, flops=(1e12,) * ranks)
    given_ = dataclasses.replace(given_, topology=alike)
    whole = np.rint(given_.expected_LED)
    given_ = dataclasses.replace(given_, loads_LED=whole)
    plan, theirs = started(UNDER, given_), POLICIES["ultraep"](given_).quota_LED[0].sum(0)
    busy = np.where(plan.has_ED, plan.quota_ED, 0.0).sum(0)
    assert busy.max() <= 1.03 * theirs.max() + 1.0


def kept_under(load_E: list[float]) -> np.ndarray:
    """The quotas on four ranks with one slot each, of which the first owns two of the five experts; tokens are alike on all."""
    owner, numbers = np.array([0, 0, 1, 2, 3]), topology_numbers(cluster(1, 4))
    replicas = only(owner, 4)
    keep_under(owner, np.ones(4, np.int64), loops.layer_loads(np.tile(load_E, (4, 1)) / 4, numbers), numbers, replicas)
    return np.where(replicas.has_ED, replicas.quota_ED, 0.0)


def test_what_is_above_the_lowest_feasible_bound_goes_to_other_ranks() -> None:
    """Rank 0 has experts of 60 and 20 assignments, ranks 1 and 2 have 10 each: each rank serves 25 if expert 0 goes to all others."""
    quota_ED = kept_under([60.0, 20.0, 10.0, 10.0, 0.0])
    assert quota_ED.sum(0).tolist() == pytest.approx([25.0] * 4)
    assert quota_ED[0].tolist() == pytest.approx([5.0, 15.0, 15.0, 25.0])


def test_the_bound_is_no_lower_than_the_slots_allow() -> None:
    """As before with 50 and 30: the three slots are taken by 25, 15 and 10 of expert 0, if all shall have 25, and 5 of expert 1 stay."""
    quota_ED = kept_under([50.0, 30.0, 10.0, 10.0, 0.0])
    # With expert 0 at two other ranks these and the owner have 30 each; the search for the bound halves its distance seven times.
    assert 30.0 <= quota_ED.sum(0).max() <= 30.0 + (80.0 - 25.0) / 2**7


def test_no_copy_leaves_its_node() -> None:
    owner, numbers = np.arange(4), topology_numbers(cluster(2, 2))
    loads = loops.layer_loads(np.tile([40.0, 4.0, 2.0, 2.0], (4, 1)) / 4, numbers)
    replicas = only(owner, 4)
    keep_under(owner, np.full(4, 4), loads, numbers, replicas)
    assert np.where(replicas.has_ED, replicas.quota_ED, 0.0).sum(0).tolist() == pytest.approx([22.0, 22.0, 2.0, 2.0])
    assert not replicas.has_ED[:2, 2:].any()
    assert not replicas.has_ED[2:, :2].any()


def test_spare_copies_go_to_the_highest_load_per_copy_and_to_the_least_busy_ranks() -> None:
    """Four copies beside the owners': expert 0 (60) gets three, so that each serves 15, and then expert 1 (16) one."""
    owner, numbers = np.arange(4), topology_numbers(cluster(1, 4))
    loads = loops.layer_loads(np.tile([60.0, 16.0, 6.0, 4.0], (4, 1)) / 4, numbers)
    replicas = only(owner, 4)
    spread_over_nodes(True, owner, np.full(4, 2), loads, numbers, replicas)
    quota = np.where(replicas.has_ED, replicas.quota_ED, 0.0)
    assert quota[0].tolist() == pytest.approx([15.0] * 4)
    assert sorted(quota[1]) == pytest.approx([0.0, 0.0, 8.0, 8.0])
    assert quota[2:].sum(1).tolist() == pytest.approx([6.0, 4.0])


def test_where_slots_alone_count_every_rank_serves_as_many_copies() -> None:
    """One expert of rank 0 on four ranks with one slot each: with the owner's own place five copies, with slots alone one a rank."""
    owner, numbers = np.zeros(1, np.int64), topology_numbers(cluster(1, 4))
    loads = loops.layer_loads(np.full((4, 1), 10.0), numbers)
    replicas = only(owner, 4)
    spread_over_nodes(False, owner, np.ones(4, np.int64), loads, numbers, replicas)
    assert replicas.quota_ED[0].tolist() == [10.0] * 4


def test_copies_go_to_the_nodes_with_fewest_and_serve_these() -> None:
    """Expert 0 (80) has a copy in each of two nodes, of which the node's own tokens are served: 20 of node 0, 60 of node 1."""
    owner, numbers = np.array([0, 1]), topology_numbers(cluster(2, 2))
    n_SE = np.array([[10.0, 1.0], [10.0, 1.0], [30.0, 1.0], [30.0, 1.0]])
    replicas = only(owner, 4)
    spread_over_nodes(True, owner, np.array([0, 0, 2, 2]), loops.layer_loads(n_SE, numbers), numbers, replicas)
    quota = np.where(replicas.has_ED, replicas.quota_ED, 0.0)
    assert [quota[0, :2].sum(), quota[0, 2:].sum()] == [20.0, 60.0]
    assert [quota[1, :2].sum(), quota[1, 2:].sum()] == [2.0, 2.0]


def test_what_ranks_hold_is_a_plan_as_far_as_slots_go() -> None:
    """Rank 1 holds the frozen parts of both experts of rank 0, and has one slot: it keeps the hotter one."""
    owner, numbers = np.array([0, 0]), topology_numbers(cluster(1, 2))
    loads = loops.layer_loads(np.array([[5.0, 9.0], [5.0, 9.0]]), numbers)
    slots, resident, plan = np.ones(2, np.int64), np.ones((2, 2), np.bool_), no_replicas(2, 2)
    start_with(HELD, owner, slots, resident, 2, expert_orders(owner, slots, loads, numbers), loads, numbers, plan)
    assert plan.has_ED.tolist() == [[True, False], [True, True]]
