from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hecate.parallel.cost.cost_loops import SERVED
from hecate.parallel.cost.cost_model import LayerCost
from hecate.parallel.planners import POLICIES
from hecate.parallel.planners.plan import Plan, PlanInput
from hecate.parallel.planners.policies.full import plan_full
from hecate.parallel.planners.policies.hecate_paper import plan_hecate_paper
from hecate.parallel.planners.policies.static_ep import plan_static_ep
from hecate.parallel.values.placement import contiguous_owners
from testing.unit_cases import layer_input, layers_input, unit_topology


def plan_input(
    owner: list[int], loads: list[list[int]] | None, *, nodes: tuple[int, ...], degree: int, memory_slots: int | list[int]
) -> PlanInput:
    """One layer of experts of 1 byte, of which `degree` travel hidden. `loads`: a row a source rank."""
    return layer_input(owner, loads, memory_slots, on=unit_topology(nodes), cost=hiding(degree))


def hiding(degree: int) -> LayerCost:
    """As many FLOPs of attention as experts are to be hidden."""
    return LayerCost(trainable_bytes=1.0, non_moe_flops=degree)


def where(given_: PlanInput) -> list[list[int]]:
    """Ranks of each expert of the first layer."""
    return [np.flatnonzero(row).tolist() for row in plan_hecate_paper(given_).where_LED[0]]


@st.composite
def inputs(draw: st.DrawFn) -> PlanInput:
    world, experts, layers = draw(st.integers(1, 6)), draw(st.integers(1, 10)), draw(st.integers(1, 3))
    nodes = (0, *draw(st.lists(st.integers(0, 1), min_size=world - 1, max_size=world - 1)))
    anywhere = st.lists(st.integers(0, world - 1), min_size=experts, max_size=experts)
    owners = [contiguous_owners(experts, world).tolist() if draw(st.booleans()) else draw(anywhere) for _ in range(layers)]
    row = st.lists(st.integers(0, 20), min_size=experts, max_size=experts)
    table = st.lists(row, min_size=world, max_size=world)
    loads = draw(st.none() | st.lists(table, min_size=layers, max_size=layers))
    slots = draw(st.integers(0, 11) | st.lists(st.integers(0, 11), min_size=world, max_size=world))
    return layers_input(owners, loads, slots, on=unit_topology(nodes), cost=hiding(draw(st.integers(0, 12))))


def hotness(given_: PlanInput, layer: int) -> list[int]:
    """Experts of a layer, hottest first, ties by index."""
    experts = range(given_.owner_LE.shape[1])
    load = [0.0] * len(experts) if given_.loads_LED is None else given_.loads_LED[layer].sum(axis=1).tolist()
    return sorted(experts, key=lambda e: (-load[e], e))


def test_each_policy_is_found_by_its_name() -> None:
    assert {name: planner.__name__ for name, planner in POLICIES.items()} == {name: f"plan_{name}" for name in POLICIES}


@pytest.mark.parametrize("policy", sorted(POLICIES))
@given(given_=inputs())
def test_every_policy_keeps_owners_and_is_deterministic(policy: str, given_: PlanInput) -> None:
    loads = None if given_.loads_LED is None else given_.loads_LED.copy()
    owner, slots = given_.owner_LE.copy(), given_.slots_D.copy()
    first, second = POLICIES[policy](given_), POLICIES[policy](given_)
    np.testing.assert_array_equal(first.where_LED, second.where_LED)
    np.testing.assert_array_equal(first.owner_LE, owner)
    assert (first.quota_LED is None) == (second.quota_LED is None)
    if first.quota_LED is not None and second.quota_LED is not None:
        np.testing.assert_array_equal(first.quota_LED, second.quota_LED)
    np.testing.assert_array_equal(given_.owner_LE, owner)
    np.testing.assert_array_equal(given_.slots_D, slots)
    assert given_.owner_LE.flags.writeable
    if loads is not None and given_.loads_LED is not None:
        np.testing.assert_array_equal(given_.loads_LED, loads)


@pytest.mark.parametrize("policy", sorted(POLICIES))
@given(given_=inputs())
def test_every_plan_can_be_carried_out(policy: str, given_: PlanInput) -> None:
    """A replica at each owner; quotas that serve each expert's load where it is and nowhere else."""
    plan = POLICIES[policy](given_)
    layers, experts = given_.owner_LE.shape
    world = given_.topology.world_size
    assert plan.where_LED.shape == (layers, experts, world)
    assert plan.where_LED.dtype == np.bool_
    for layer, expert in np.ndindex(layers, experts):
        where_D = plan.where_LED[layer, expert]
        assert where_D[given_.owner_LE[layer, expert]]
        if plan.quota_LED is not None:
            load = float(world) if given_.loads_LED is None else given_.loads_LED[layer, expert].sum()
            quota_D = plan.quota_LED[layer, expert]
            assert quota_D.min() >= 0
            assert not quota_D[~where_D].any(), "tokens are sent where their expert is not"
            np.testing.assert_allclose(quota_D.sum(), load, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("policy", ["full", "hecate_paper", "static_ep"])
@given(given_=inputs())
def test_policies_without_quotas_leave_tokens_to_topology_aware_dispatch(policy: str, given_: PlanInput) -> None:
    assert POLICIES[policy](given_).quota_LED is None


@given(inputs())
def test_hecate_plans_each_layer_by_itself(given_: PlanInput) -> None:
    together = plan_hecate_paper(given_).where_LED
    for layer in range(len(together)):
        loads = None if given_.loads_LED is None else given_.loads_LED[layer : layer + 1]
        alone = PlanInput(given_.owner_LE[layer : layer + 1], loads, given_.topology, given_.cost, given_.slots_D)
        np.testing.assert_array_equal(plan_hecate_paper(alone).where_LED[0], together[layer])


@given(inputs())
def test_static_ep_makes_no_replica_and_full_makes_all(given_: PlanInput) -> None:
    static = plan_static_ep(given_)
    assert (static.where_LED.sum(axis=2) == 1).all()
    full = plan_full(given_)
    assert full.where_LED.all()


@given(inputs())
def test_hecate_with_memory_for_the_overlap_degree(given_: PlanInput) -> None:
    degree = min(int(given_.cost.non_moe_flops), given_.owner_LE.shape[1])
    if degree > min(given_.slots_D):
        return
    for layer, where_ED in enumerate(plan_hecate_paper(given_).where_LED):
        hottest = set(hotness(given_, layer)[:degree])
        for expert, row in enumerate(where_ED):
            if expert in hottest:
                assert row.all(), f"hot expert {expert} is not everywhere"
            else:
                assert np.flatnonzero(row).tolist() == [given_.owner_LE[layer, expert]], f"expert {expert} has replicas"


@given(inputs())
def test_hecate_never_gives_a_device_more_replicas_than_fit(given_: PlanInput) -> None:
    world = given_.topology.world_size
    degree = min(int(given_.cost.non_moe_flops), given_.owner_LE.shape[1])
    for layer, where_ED in enumerate(plan_hecate_paper(given_).where_LED):
        replicas_D = where_ED.sum(axis=0) - np.bincount(given_.owner_LE[layer], minlength=world)
        assert (replicas_D <= given_.slots_D).all()
        cold = hotness(given_, layer)[degree:]
        assert (where_ED[cold].sum(axis=1) == 1).all(), "an expert beyond the overlap degree got a replica"


@given(inputs())
def test_hecate_without_loads_counts_every_expert_as_equally_hot(given_: PlanInput) -> None:
    (layers, experts), world = given_.owner_LE.shape, given_.topology.world_size
    unknown = PlanInput(given_.owner_LE, None, given_.topology, given_.cost, given_.slots_D)
    equal = PlanInput(given_.owner_LE, np.full((layers, experts, world), 3.0), given_.topology, given_.cost, given_.slots_D)
    np.testing.assert_array_equal(plan_hecate_paper(unknown).where_LED, plan_hecate_paper(equal).where_LED)


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


def test_devices_with_more_room_take_more() -> None:
    """Rank 0 owns four equal experts; t = 4; rooms 9, 0, 1, 3, so m = 0 on the fullest: experts 0 to 3 get a copy each, by free slots.

    Expert 0: rank 3 (three free), 1: rank 3 (two), 2: rank 2 and 3 have one each, the lower; 3: rank 3. Nothing is left.
    """
    given_ = plan_input([0, 0, 0, 0], [[1, 1, 1, 1]] * 4, nodes=(0, 0, 0, 0), degree=4, memory_slots=[9, 0, 1, 3])
    assert where(given_) == [[0, 3], [0, 3], [0, 2], [0, 3]]


def test_loads_before_any_are_known_are_ones() -> None:
    loads = [[[1, 2, 3], [4, 5, 6]], [[7, 8, 9], [10, 11, 12]]]
    known = layers_input([[0, 1, 0], [1, 1, 0]], loads, 0, on=unit_topology((0, 0)))
    assert known.expected_LED.tolist() == [[[1, 4], [2, 5], [3, 6]], [[7, 10], [8, 11], [9, 12]]]
    unknown = layers_input([[0, 1, 0], [1, 1, 0]], None, 0, on=unit_topology((0, 0)))
    assert unknown.expected_LED.tolist() == [[[1, 1]] * 3] * 2
    assert known.owned_LED.tolist() == [[[1, 0], [0, 1], [1, 0]], [[0, 1], [0, 1], [1, 0]]]


def test_a_plan_without_quotas_serves_by_topology_aware_dispatch() -> None:
    """An expert of rank 0 with copies on 0 and 1 of one node, rank 2 elsewhere: 5 and 7 stay, the 4 of rank 2 go half and half."""
    given_ = plan_input([0], [[5], [7], [4]], nodes=(0, 0, 1), degree=0, memory_slots=0)
    where_LED, loads_LED = np.array([[[True, True, False]]]), given_.expected_LED
    even = Plan(given_.owner_LE, where_LED)
    assert even.traffic(loads_LED, loads_LED, given_.topology)[:, SERVED].tolist() == [[7, 9, 0]]
    own = Plan(given_.owner_LE, where_LED, np.array([[[0.0, 16.0, 0.0]]]))
    assert own.traffic(loads_LED, loads_LED, given_.topology)[:, SERVED].tolist() == [[0, 16, 0]]


def test_the_seconds_of_a_plan_are_those_of_its_own_quotas() -> None:
    """As above, a second an assignment forward and two backward, and a copy of 1 byte at 1 byte/s each way; rows are free.

    Evenly the busiest rank serves 9 assignments, 27 s; with all of them at rank 1, 48 s. No non-MoE work hides the copy: 2 s.
    The owner's optimizer reads the byte of gradient at a byte for 150 FLOPs: 150 s.
    """
    free = plan_input([0], [[5], [7], [4]], nodes=(0, 0, 1), degree=0, memory_slots=0)
    cost = LayerCost(trainable_bytes=1.0, assignment_flops=1.0)
    given_ = PlanInput(free.owner_LE, free.loads_LED, free.topology, cost, free.slots_D)
    where_LED = np.array([[[True, True, False]]])
    assert Plan(given_.owner_LE, where_LED).seconds(given_).total.tolist() == [179.0]
    assert Plan(given_.owner_LE, where_LED, np.array([[[0.0, 16.0, 0.0]]])).seconds(given_).total.tolist() == [200.0]
