from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hecate.parallel.cost_model import LayerCost
from hecate.parallel.placement import contiguous_owners
from hecate.parallel.planners import POLICIES, PlanInput
from hecate.parallel.topology import Link, Topology

plan_hecate = POLICIES["hecate"]


def plan_input(owner: list[int], loads: list[list[int]] | None, *, nodes: tuple[int, ...], degree: int, memory_slots: int) -> PlanInput:
    """A device of 1 FLOP/s, links of 1 byte/s without latency, experts of 1 byte: as many FLOPs as experts are hidden."""
    world = len(nodes)
    link = Link(1.0, 0.0)
    topology = Topology(nodes, (1.0,) * world, (1e9,) * world, link, link)
    loads_SE = None if loads is None else np.array(loads, dtype=np.float64)
    return PlanInput(np.array(owner), loads_SE, topology, LayerCost(1.0, degree), memory_slots)


def where(given_: PlanInput) -> list[list[int]]:
    """Ranks of each expert."""
    return [np.flatnonzero(row).tolist() for row in plan_hecate(given_).where_ED]


@st.composite
def inputs(draw: st.DrawFn) -> PlanInput:
    world, experts = draw(st.integers(1, 6)), draw(st.integers(1, 10))
    nodes = (0, *draw(st.lists(st.integers(0, 1), min_size=world - 1, max_size=world - 1)))
    if draw(st.booleans()):
        owner = contiguous_owners(experts, world).tolist()
    else:
        owner = draw(st.lists(st.integers(0, world - 1), min_size=experts, max_size=experts))
    row = st.lists(st.integers(0, 20), min_size=experts, max_size=experts)
    loads = draw(st.none() | st.lists(row, min_size=world, max_size=world))
    return plan_input(owner, loads, nodes=nodes, degree=draw(st.integers(0, 12)), memory_slots=draw(st.integers(0, 11)))


def hotness(given_: PlanInput) -> list[int]:
    """Experts, hottest first, ties by index."""
    experts = range(len(given_.owner_E))
    load = [0.0] * len(experts) if given_.loads_SE is None else given_.loads_SE.sum(axis=0).tolist()
    return sorted(experts, key=lambda e: (-load[e], e))


@pytest.mark.parametrize("policy", sorted(POLICIES))
@given(given_=inputs())
def test_every_policy_keeps_owners_and_is_deterministic(policy: str, given_: PlanInput) -> None:
    loads = None if given_.loads_SE is None else given_.loads_SE.copy()
    owner = given_.owner_E.copy()
    first, second = POLICIES[policy](given_), POLICIES[policy](given_)
    np.testing.assert_array_equal(first.where_ED, second.where_ED)
    np.testing.assert_array_equal(first.owner_E, owner)
    np.testing.assert_array_equal(given_.owner_E, owner)
    assert given_.owner_E.flags.writeable
    if loads is not None and given_.loads_SE is not None:
        np.testing.assert_array_equal(given_.loads_SE, loads)


@given(inputs())
def test_static_ep_makes_no_replica_and_full_makes_all(given_: PlanInput) -> None:
    assert (POLICIES["static_ep"](given_).where_ED.sum(axis=1) == 1).all()
    assert POLICIES["full"](given_).everywhere


@given(inputs())
def test_hecate_with_memory_for_the_overlap_degree(given_: PlanInput) -> None:
    degree = min(int(given_.cost.non_moe_flops), len(given_.owner_E))
    if degree > given_.memory_slots:
        return
    hottest = set(hotness(given_)[:degree])
    for expert, row in enumerate(plan_hecate(given_).where_ED):
        if expert in hottest:
            assert row.all(), f"hot expert {expert} is not everywhere"
        else:
            assert np.flatnonzero(row).tolist() == [given_.owner_E[expert]], f"expert {expert} has replicas"


@given(inputs())
def test_hecate_never_gives_a_device_more_replicas_than_fit(given_: PlanInput) -> None:
    placement = plan_hecate(given_)
    world = given_.topology.world_size
    replicas_D = placement.where_ED.sum(axis=0) - np.bincount(given_.owner_E, minlength=world)
    assert (replicas_D <= given_.memory_slots).all()
    degree = min(int(given_.cost.non_moe_flops), len(given_.owner_E))
    cold = hotness(given_)[degree:]
    assert (placement.where_ED[cold].sum(axis=1) == 1).all(), "an expert beyond the overlap degree got a replica"


@given(inputs())
def test_hecate_without_loads_counts_every_expert_as_equally_hot(given_: PlanInput) -> None:
    world, experts = given_.topology.world_size, len(given_.owner_E)
    unknown = PlanInput(given_.owner_E, None, given_.topology, given_.cost, given_.memory_slots)
    equal = PlanInput(given_.owner_E, np.full((world, experts), 3.0), given_.topology, given_.cost, given_.memory_slots)
    np.testing.assert_array_equal(plan_hecate(unknown).where_ED, plan_hecate(equal).where_ED)


def test_the_hottest_go_everywhere_and_ties_go_by_index() -> None:
    """Totals 3, 5, 3, 5, 0 of two sources; t = 3, m = 3: experts 1 and 3, then 0 before 2."""
    given_ = plan_input([0, 0, 1, 1, 1], [[3, 0, 1, 5, 0], [0, 5, 2, 0, 0]], nodes=(0, 0), degree=3, memory_slots=3)
    assert where(given_) == [[0, 1], [0, 1], [1], [0, 1], [1]]


def test_copies_spread_over_the_nodes_first() -> None:
    """Ranks 0, 1 | 2, 3 own one expert each; a slot on each; t = 4 > m = 1; loads 4, 4, 0, 0.

    Dealt one by one to the highest load per replica: 4 4 → 0; 2 4 → 1; 2 2 → 0; 1.3 2 → 1: two copies each.
    Expert 0, on rank 0: node 1 has none, rank 2. Then each node has one copy, node 0 has more free slots: rank 1.
    Expert 1, on rank 1: slots are left on 0 and 3; node 1 has no copy, rank 3. Then rank 0.
    """
    given_ = plan_input([0, 1, 2, 3], [[4, 4, 0, 0]] + [[0] * 4] * 3, nodes=(0, 0, 1, 1), degree=4, memory_slots=1)
    assert where(given_) == [[0, 1, 2], [0, 1, 3], [2], [3]]


def test_a_node_without_a_copy_goes_before_one_with_more_free_slots() -> None:
    """Ranks 0, 1, 2 | 3, all four equal experts at rank 0, a slot and so a copy each: expert 0 to rank 3, then 1 and 2; none is left."""
    given_ = plan_input([0, 0, 0, 0], [[1, 1, 1, 1]] * 4, nodes=(0, 0, 0, 1), degree=4, memory_slots=1)
    assert where(given_) == [[0, 3], [0, 1], [0, 2], [0]]


def test_the_hottest_expert_takes_most_slots() -> None:
    """As above, loads 100, 1, 1, 1: three copies for expert 0, which is then everywhere, and the fourth for expert 1 by index."""
    given_ = plan_input([0, 1, 2, 3], [[100, 1, 1, 1]] + [[0] * 4] * 3, nodes=(0, 0, 1, 1), degree=4, memory_slots=1)
    assert where(given_) == [[0, 1, 2, 3], [0, 1], [2], [3]]


def test_only_experts_within_the_overlap_degree_get_slots() -> None:
    """t = 2 > m = 1, loads 1, 9, 8, 0 on two ranks: a copy each for experts 1 and 2, nothing for 0."""
    given_ = plan_input([0, 0, 1, 1], [[1, 9, 8, 0], [0, 0, 0, 0]], nodes=(0, 0), degree=2, memory_slots=1)
    assert where(given_) == [[0], [0, 1], [0, 1], [1]]


def test_ranks_of_a_node_need_not_be_adjacent() -> None:
    """Nodes {0, 2} and {1, 3}, expert 0 at rank 0, t = 1 > m = 0 gives nothing; with m = 1 it is everywhere."""
    assert where(plan_input([0], [[1]] * 4, nodes=(0, 1, 0, 1), degree=1, memory_slots=0)) == [[0]]
    assert where(plan_input([0], [[1]] * 4, nodes=(0, 1, 0, 1), degree=1, memory_slots=1)) == [[0, 1, 2, 3]]
    # Three experts of rank 0, loads 5, 5, 5, a slot on each of four devices (rank 0's own is of no use to them), t = 3 > m = 1:
    # a copy each by index. Node {1, 3} has no copy yet: rank 1, then 3; the third finds only rank 2 free.
    given_ = plan_input([0, 0, 0], [[5, 5, 5]] + [[0] * 3] * 3, nodes=(0, 1, 0, 1), degree=3, memory_slots=1)
    assert where(given_) == [[0, 1], [0, 3], [0, 2]]


def test_no_loads_at_all_stay_within_the_slots() -> None:
    given_ = plan_input([0, 1], [[0, 0], [0, 0]], nodes=(0, 0), degree=1, memory_slots=1)
    assert where(given_) == [[0, 1], [1]]


@pytest.mark.parametrize(("degree", "memory_slots"), [(0, 4), (4, 0), (0, 0)])
def test_nothing_travels_without_time_or_room(degree: int, memory_slots: int) -> None:
    given_ = plan_input([0, 1, 1], [[7, 1, 2], [7, 1, 2]], nodes=(0, 0), degree=degree, memory_slots=memory_slots)
    assert where(given_) == [[0], [1], [1]]
