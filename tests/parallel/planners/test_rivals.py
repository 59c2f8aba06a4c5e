"""The rivals' policies: cases computed by hand, properties of every policy, and published figures."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hecate.parallel.cluster.topology import Link, uniform_topology
from hecate.parallel.cost.cost_model import LayerCost
from hecate.parallel.planners import POLICIES, PlanInput
from hecate.parallel.planners.policies.echo import plan_echo
from hecate.parallel.planners.policies.eplb import plan_eplb
from hecate.parallel.planners.policies.fastermoe import plan_fastermoe
from hecate.parallel.planners.policies.flexmoe import plan_flexmoe
from hecate.parallel.planners.policies.laer import even_numbers, numbers_by_load, plan_laer
from hecate.parallel.planners.policies.llep import plan_llep
from hecate.parallel.planners.policies.smartmoe import plan_smartmoe
from hecate.parallel.planners.policies.static_ep import plan_static_ep
from hecate.parallel.planners.rivals.copy_places import CopyPlaces, place_copies
from hecate.parallel.planners.rivals.expert_packing import spare_copies
from hecate.parallel.values.placement import contiguous_owners
from testing.plain_flows import quotas_of
from tests.parallel.planners.rival_inputs import check, inputs, plan_input, quota, totals, where

RIVALS = ["echo", "eplb", "fastermoe", "flexmoe", "laer", "llep", "moonep", "smartmoe", "ultraep"]


# SmartMoE


@pytest.mark.parametrize("slots", [[1, 1], [2, 2]])
def test_smartmoe_moves_whole_experts(slots: list[int]) -> None:
    """Loads 6, 4 | 1, 1. Expert 0: device 1 has 2, its home 4 besides: it moves. 1: home has nothing else. 2: home has 6 + 1, device 0
    has 4: it moves. 3: home has 6, device 0 has 5, but its slot is taken, and with two slots its two places (E/D) are."""
    plan = plan_smartmoe(plan_input([0, 0, 1, 1], totals([6, 4, 1, 1], 2), slots))
    assert where(plan) == [[0, 1], [0], [0, 1], [1]]
    assert quota(plan) == [[0, 6], [4, 0], [1, 0], [0, 1]]


def test_smartmoe_rounds_the_number_of_experts_on_a_device_up() -> None:
    """Five on device 0, three a device: the hottest leaves, three of the others fill their home, and the last must leave, too."""
    plan = plan_smartmoe(plan_input([0] * 5, totals([5, 1, 1, 1, 1], 2), [5, 5]))
    assert where(plan) == [[0, 1], [0], [0], [0], [0, 1]]
    assert quota(plan) == [[0, 5], [1, 0], [1, 0], [1, 0], [0, 1]]


def test_smartmoe_moves_nothing_that_leaves_the_busiest_device_as_busy() -> None:
    """Expert 0 alone makes its device the busiest; to move one of the others to the idle device is of no use."""
    plan = plan_smartmoe(plan_input([0, 1, 1], totals([10, 3, 3], 3), [1, 1, 1]))
    assert where(plan) == [[0], [1], [1]]
    assert quota(plan) == [[10, 0, 0], [0, 3, 0], [0, 3, 0]]


# FasterMoE: devices of 1 FLOP/s and 3 FLOPs an assignment with backward


@pytest.mark.parametrize(
    ("expert_bytes", "row_bytes", "shadowed"),
    [
        # Expert 0 has 6 assignments of rank 0 and 4 of rank 1, expert 1 one of each. Busiest 10; expert 0 shadowed: 6 and 4 + 2; both: 7.
        (11.0, 0.0, True),  # 30 s against 18 + 11
        (12.0, 0.0, False),  # 18 + 12 is no less
        (19.0, 0.5, True),  # (3 + 4·0.5)·10 = 50 against 30 + 19
        (21.0, 0.5, False),
    ],
)
def test_fastermoe_shadows_what_pays(expert_bytes: float, row_bytes: float, shadowed: bool) -> None:
    cost = LayerCost(trainable_bytes=expert_bytes, assignment_flops=1.0, row_bytes=row_bytes)
    plan = plan_fastermoe(plan_input([0, 1], [[6, 1], [4, 1]], [2, 2], cost=cost))
    assert where(plan) == ([[0, 1], [1]] if shadowed else [[0], [1]])
    assert plan.quota_LED is None


@pytest.mark.parametrize(("slots", "both"), [([1, 1, 2], True), ([1, 1, 1], False), ([0, 1, 2], False)])
def test_fastermoe_looks_beyond_a_hot_expert_that_alone_does_not_help(slots: list[int], both: bool) -> None:
    """Experts 0 and 1 have 3 assignments of each rank. Busiest: 9; expert 0 shadowed: 9 + 3 on device 1; both shadowed: 6 everywhere."""
    plan = plan_fastermoe(plan_input([0, 1, 2], [[3, 3, 0]] * 3, slots))
    assert where(plan) == ([[0, 1, 2], [0, 1, 2], [2]] if both else [[0], [1], [2]])


# FlexMoE


def test_flexmoe_expands_while_it_helps() -> None:
    """Loads 9, 3, 0: expert 0 to the idle device: 4.5, 3, 4.5. To device 1 as well: 3, 6, 3, no better; nor is expert 1 on device 0."""
    plan = plan_flexmoe(plan_input([0, 1, 2], totals([9, 3, 0], 3), [1, 1, 1]))
    assert where(plan) == [[0, 2], [1], [2]]
    assert quota(plan) == [[4.5, 0, 4.5], [0, 3, 0], [0, 0, 0]]


@pytest.mark.parametrize(
    ("load", "world"),
    [
        ([8, 0], 4),  # the maximum falls to 4, but a device is idle before and after
        ([10, 10], 3),  # the maximum stays, but the idle device gets work
    ],
)
def test_flexmoe_needs_a_lower_maximum_or_a_lower_ratio(load: list[float], world: int) -> None:
    plan = plan_flexmoe(plan_input([0, 1], totals(load, world), [0] * (world - 1) + [1]))
    assert where(plan) == [[0, world - 1], [1]]


def test_flexmoe_shrinks_the_cold_for_the_hot() -> None:
    """Expert 2 is on device 1 and expert 1 on device 2; loads 9, 1, 0, so 9, 0.5, 0.5, no slot left for expert 0 but its own.

    Expert 2 gives up its slot to expert 0: 4.5, 5, 0.5. Expert 1 does: 3, 4, 3. Then there is a slot on device 0 for expert 1:
    3.5, 3.5, 3."""
    plan = plan_flexmoe(plan_input([0, 1, 2], totals([9, 1, 0], 3), [1, 1, 1], present=[[0], [1, 2], [1, 2]]))
    assert where(plan) == [[0, 1, 2], [0, 1], [2]]
    assert quota(plan) == [[3, 3, 3], [0.5, 0.5, 0], [0, 0, 0]]


def test_flexmoe_migrates_a_replica_to_make_room() -> None:
    """Loads 12, 2, 0; device 1 holds experts 0 and 2, device 2 expert 1: 7, 6, 1. Expert 2 is the coldest, but where it gives up its
    slot, expert 0 is already: expert 1 moves there, and expert 0 takes its slot on device 2: 5, 5, 4."""
    plan = plan_flexmoe(plan_input([0, 0, 2], totals([12, 2, 0], 3), [0, 2, 1], present=[[0, 1], [0, 2], [1, 2]]))
    assert where(plan) == [[0, 1, 2], [0, 1], [2]]
    assert quota(plan) == [[4, 4, 4], [1, 1, 0], [0, 0, 0]]


def test_flexmoe_does_not_take_frozen_parts_for_the_plan_before() -> None:
    """Expert 0 was shared by both devices; its frozen part is still at its owner only. And the other way round: nothing was shared."""
    shared = plan_input([0, 1], totals([8, 4], 2), [1, 1], present=[[0, 1], [1]])
    assert where(plan_flexmoe(shared)) == where(plan_flexmoe(replace(shared, resident_LED=shared.owned_LED)))
    alone = plan_input([0, 1, 2], totals([4, 4, 4], 3), [1, 1, 1])
    assert where(plan_flexmoe(replace(alone, resident_LED=np.ones((1, 3, 3), dtype=bool)))) == [[0], [1], [2]]


def test_flexmoe_starts_from_as_much_as_fits() -> None:
    """Both experts of device 0 are said to be on device 1, which has one slot: the hotter one, expert 1, stays. No change helps: the
    hottest per replica is on device 1 already."""
    plan = plan_flexmoe(plan_input([0, 0, 1], totals([2, 4, 6], 2), [0, 1], present=[[0, 1], [0, 1], [1]]))
    assert where(plan) == [[0], [0, 1], [1]]
    assert quota(plan) == [[2, 0], [2, 2], [0, 6]]


def test_flexmoe_changes_at_most_ten_replicas_of_what_is_there() -> None:
    """Twenty equal experts on device 0, one of them on device 1 as well, where each of the others would do better, too."""
    present = [[0, 1]] + [[0]] * 19
    plan = plan_flexmoe(plan_input([0] * 20, totals([1] * 20, 2), [0, 20], present=present))
    assert plan.where_LED.sum() == 20 + 1 + 10


def test_flexmoe_starts_from_full_places_where_there_are_owners_alone() -> None:
    """Ten changes of the owners' placement would leave 15 on device 0; with all experts on device 1, too, there is nothing to change."""
    plan = plan_flexmoe(plan_input([0] * 20, totals([1] * 20, 2), [0, 20], present=[[0]] * 20))
    assert plan.where_LED.all()


def test_flexmoe_relieves_one_of_two_equally_busy_devices() -> None:
    """Expert 3 has the slot of device 2. The first change, on device 3, leaves device 1 as busy as it was, and device 2 idle."""
    plan = plan_flexmoe(plan_input([0, 1, 2, 3], totals([10, 10, 0, 0], 4), [0, 0, 1, 1], present=[[0], [1], [2], [2, 3]]))
    assert quota(plan)[:2] == [[5, 0, 0, 5], [0, 5, 5, 0]]


def test_flexmoe_may_leave_nothing_to_the_owner() -> None:
    """Both experts are device 0's, a slot each. With the slots alone: 7 | 9 | 7, then expert 1 takes device 0, too."""
    plan = plan_flexmoe(plan_input([0, 0], totals([7, 9], 3), [1, 1, 1]))
    assert quota(plan) == [[0, 0, 7], [4.5, 4.5, 0]]
    assert where(plan) == [[0, 2], [0, 1]]


@pytest.mark.parametrize(("world", "slots", "busiest"), [(4, 2, 20), (8, 1, 10), (8, 2, 12)])
def test_flexmoe_is_no_worse_than_in_the_artifact_of_laer(world: int, slots: int, busiest: float) -> None:
    """`busiest` is what the artifact's code ends with, which has no places beside its slots."""
    plan = plan_flexmoe(plan_input([0, 1, 2, 3], totals([40, 12, 8, 4], world), [slots] * world))
    assert np.array(quota(plan)).sum(0).max() <= busiest


# EPLB


@pytest.mark.parametrize(
    ("load", "spare", "most", "expected"),
    [
        ([12, 6, 1], 4, 8, [4, 2, 1]),  # 12; 6 before the other 6; 6; 4 before 3
        ([12, 6, 1], 4, 3, [3, 3, 1]),
        ([5, 0], 3, 8, [4, 1]),
        ([0, 0], 3, 8, [1, 1]),
        ([1, 1, 1], 2, 1, [1, 1, 1]),
    ],
)
def test_spare_copies_by_hand(load: list[float], spare: int, most: int, expected: list[int]) -> None:
    assert spare_copies(np.array([load], dtype=float), spare, most).tolist() == [expected]


@given(st.lists(st.integers(0, 50), min_size=1, max_size=8), st.integers(0, 20), st.integers(1, 6))
def test_spare_copies_are_those_handed_out_one_by_one(load: list[int], spare: int, most: int) -> None:
    copies = [1] * len(load)
    for _ in range(spare):
        open_ = [e for e in range(len(load)) if load[e] > 0 and copies[e] < most]
        if open_:
            copies[max(open_, key=lambda e: (load[e] / copies[e], -e))] += 1
    assert spare_copies(np.array([load], dtype=float), spare, most).tolist() == [copies]


def test_eplb_copies_the_hottest() -> None:
    """Loads 8, 2 | 1, 1: expert 0 gets the first spare, 4 a copy, and the slot of device 1. Then each device has 6."""
    plan = plan_eplb(plan_input([0, 0, 1, 1], totals([8, 2, 1, 1], 2), [1, 1]))
    assert where(plan) == [[0, 1], [0], [1], [1]]
    assert quota(plan) == [[4, 4], [2, 0], [0, 1], [0, 1]]


def test_eplb_keeps_an_expert_in_one_node_where_that_is_better() -> None:
    """Ranks 0, 1 | 2, 3 own an expert each; loads 8, 8, 0, 0; two slots each.

    To nodes: expert 0 goes to node 1, which has less. Two spares in each node: both experts on both ranks of their node, 4 each.
    Globally: four spares, three copies each, 8/3 a copy; two of them meet on ranks 0 and 2: 16/3.
    """
    plan = plan_eplb(plan_input([0, 1, 2, 3], totals([8, 8, 0, 0], 4), [2] * 4, nodes=(0, 0, 1, 1)))
    assert where(plan) == [[0, 2, 3], [0, 1], [2], [3]]
    assert quota(plan) == [[0, 0, 4, 4], [4, 4, 0, 0], [0] * 4, [0] * 4]


def test_eplb_leaves_the_node_where_that_is_better() -> None:
    """Expert 0 has all the load: in its node two ranks share it; globally all do, with spares in three of the four slots."""
    plan = plan_eplb(plan_input([0, 1, 2, 3], totals([12, 0, 0, 0], 4), [1] * 4, nodes=(0, 0, 1, 1)))
    assert quota(plan)[0] == [3, 3, 3, 3]


def test_eplb_leaves_slots_for_moves_where_that_is_better() -> None:
    """Loads 4, 5 | 2, a slot each. Two spares: expert 1 takes the slot of device 1, and device 0 has 6.5. One: expert 0 moves there."""
    plan = plan_eplb(plan_input([0, 0, 1], totals([4, 5, 2], 2), [1, 1]))
    assert quota(plan) == [[0, 4], [5, 0], [0, 2]]


# LLEP


@pytest.mark.parametrize(
    ("max_imbalance", "spilled"),
    [(1.0, 4000), (1.5, 1000), (None, 3400), (2.0, 0)],  # under 6000, 9000, 6600, 12000
)
def test_llep_spills_what_exceeds_the_bound(max_imbalance: float | None, spilled: float) -> None:
    plan = plan_llep(plan_input([0, 1], totals([10000, 2000], 2), [1, 1], max_imbalance=max_imbalance))
    assert quota(plan) == [[10000 - spilled, spilled], [0, 2000]]
    assert where(plan) == [[0, 1] if spilled else [0], [1]]


def test_llep_counts_what_is_still_to_come() -> None:
    """6000 and 4000 at home on device 0, 6000 a device: expert 0 leaves room for expert 1, and one transfer does."""
    plan = plan_llep(plan_input([0, 0, 1], totals([6000, 4000, 2000], 2), [2, 2], max_imbalance=1.0))
    assert quota(plan) == [[2000, 4000], [4000, 0], [0, 2000]]


@pytest.mark.parametrize(
    ("load", "expected"),
    [
        ([20000, 9500, 9500], [13000, 3500, 3500]),  # as large as fits under 13000
        ([14000, 12600, 12400], [13000, 0, 1000]),  # 600 would fit on device 2: too small a chunk
        ([28, 6, 5], [13, 7, 8]),  # a small batch, chunks of an eighth of 13 at least
    ],
)
def test_llep_chunks(load: list[float], expected: list[float]) -> None:
    plan = plan_llep(plan_input([0, 1, 2], totals(load, 3), [1, 1, 1], max_imbalance=1.0))
    assert quota(plan)[0] == expected


# ECHO


def test_echo_spills_the_hottest_of_a_rank() -> None:
    """Loads 6, 4 | 1, 1, mean 6: device 0 keeps expert 1 and 2 of expert 0, device 1 has room for the other 4."""
    plan = plan_echo(plan_input([0, 0, 1, 1], totals([6, 4, 1, 1], 2), [1, 1]))
    assert quota(plan) == [[2, 4], [4, 0], [0, 1], [0, 1]]
    assert where(plan) == [[0, 1], [0], [1], [1]]


@pytest.mark.parametrize(("slots", "expected"), [(1, [6, 0, 4, 0]), (2, [5, 0, 4, 1]), (0, [10, 0, 0, 0])])
def test_echo_keeps_the_largest_chunks(slots: int, expected: list[float]) -> None:
    """Loads 10, 8, 1, 1, mean 5. Spills 5 and 3 over spares 4 and 4: expert 0's 4 on device 2 and 1 on device 3, expert 1's 3 on
    device 3."""
    plan = plan_echo(plan_input([0, 1, 2, 3], totals([10, 8, 1, 1], 4), [slots] * 4))
    assert quota(plan)[:2] == [expected, [0, 5, 0, 3] if slots else [0, 8, 0, 0]]


@pytest.mark.parametrize(
    ("policy", "owner", "load", "max_imbalance"),
    [
        ("echo", [0, 0, 0, 1, 1, 1], 0.3, None),
        ("llep", [0, 0, 1], 0.7, 4 / 3),  # a device has just what it may have
    ],
)
def test_no_expert_travels_for_a_rounding_error(policy: str, owner: list[int], load: float, max_imbalance: float | None) -> None:
    plan = POLICIES[policy](plan_input(owner, totals([load] * len(owner), 2), [3, 3], max_imbalance=max_imbalance))
    assert where(plan) == [[rank] for rank in owner]


# LAER-MoE. The numbers and places are what its own code gives for the same loads


def laer_places(load: list[float], slots: list[int], number: np.ndarray) -> list[list[int]]:
    """The experts of each device, without places at owners."""
    places = CopyPlaces(np.array(slots), np.arange(len(load)), at_owners=False)
    copies_ED = place_copies(number, np.array(load), places, np.zeros(len(slots), dtype=np.int64))
    return [np.repeat(np.arange(len(load)), copies_D).tolist() for copies_D in copies_ED.T]


def test_laer_numbers_and_places_of_two_copies_a_device() -> None:
    load = [40.0, 12.0, 8.0, 4.0]
    number = numbers_by_load(np.array(load), 8, 1)
    assert number.tolist() == [4, 2, 1, 1]
    assert laer_places(load, [2] * 4, number) == [[0, 2], [0, 1], [0, 1], [0, 3]]


def test_laer_numbers_and_places_of_fewer_experts_than_devices() -> None:
    load = [40000.0, 12000.0, 8000.0, 4000.0]
    assert laer_places(load, [1] * 8, numbers_by_load(np.array(load), 8, 1)) == [[0], [0], [0], [0], [2], [1], [1], [3]]
    number = numbers_by_load(np.array(load), 16, 1)
    held = laer_places(load, [2] * 8, number)
    assert held.count([0, 0]) == 2
    assert max(sum(load[e] / number[e] for e in experts) for experts in held) == pytest.approx(8000, rel=1e-3)
    assert laer_places([0.0] * 4, [1] * 8, even_numbers(np.zeros(4), 8)) == [[0], [0], [1], [1], [2], [2], [3], [3]]


def test_laer_gives_copies_to_all_nodes_at_a_time() -> None:
    """Two nodes, one copy in each from the start; of six more two go to expert 0, two again, and two to expert 1."""
    assert numbers_by_load(np.array([24.0, 10.0]), 10, 2).tolist() == [6, 4]
    assert numbers_by_load(np.array([24.0, 10.0]), 3, 2).tolist() == [2, 1]


@pytest.mark.parametrize(
    ("row_bytes", "expected"),
    [
        # Six copies by load: 4, 1, 1. Expert 0 has two on its owner, which count twice: each device has 6.
        (0.0, [[6, 3, 3], [0, 3, 0], [0, 0, 3]]),
        # Rank 0, where all tokens are, would send 12 of 18; with one copy of each it sends 6, and 4·6 + 3·12 is less than 4·12 + 3·6.
        (1.0, [[12, 0, 0], [0, 3, 0], [0, 0, 3]]),
    ],
)
def test_laer_takes_the_cheaper_candidate(row_bytes: float, expected: list[list[float]]) -> None:
    cost = LayerCost(trainable_bytes=1.0, assignment_flops=1.0, row_bytes=row_bytes)
    plan = plan_laer(plan_input([0, 1, 2], totals([12, 3, 3], 3), [1, 1, 1], cost=cost))
    assert quota(plan) == expected


def test_laer_keeps_a_copy_in_each_node() -> None:
    """Ranks 0, 1 | 2, 3, experts on ranks 0 and 2, a slot each: the second copies go to the idle ranks of the other nodes."""
    plan = plan_laer(plan_input([0, 2], [[1, 1]] * 4, [1] * 4, nodes=(0, 0, 1, 1)))
    assert quota(plan) == [[2, 0, 0, 2], [0, 2, 2, 0]]


def test_a_copy_at_its_owner_takes_no_slot() -> None:
    """Expert 0 has two copies, one at home; then expert 1 finds no slot but has its own place."""
    places = CopyPlaces(np.array([0, 1]), np.array([0, 1]), at_owners=True)
    copies_ED = place_copies(np.array([2, 1]), np.array([8.0, 1.0]), places, np.zeros(2, dtype=np.int64))
    assert copies_ED.tolist() == [[1, 1], [0, 1]]


# What every policy keeps to


@pytest.mark.parametrize("policy", sorted(POLICIES))
@given(given_=inputs())
def test_every_policy_returns_a_plan_that_can_be_carried_out(policy: str, given_: PlanInput) -> None:
    check(given_, POLICIES[policy](given_), within_slots=policy != "full")


@pytest.mark.parametrize("policy", sorted(POLICIES))
@given(given_=inputs())
def test_every_policy_is_a_pure_function(policy: str, given_: PlanInput) -> None:
    arrays = ("owner_LE", "loads_LED", "slots_D", "resident_LED", "present_LED")
    before = {name: None if getattr(given_, name) is None else getattr(given_, name).copy() for name in arrays}
    first, second = POLICIES[policy](given_), POLICIES[policy](given_)
    np.testing.assert_array_equal(first.where_LED, second.where_LED)
    np.testing.assert_array_equal(
        quotas_of(first, given_.expected_LED, given_.topology), quotas_of(second, given_.expected_LED, given_.topology)
    )
    for name, array in before.items():
        np.testing.assert_array_equal(getattr(given_, name), array, err_msg=f"{name} was changed")


@pytest.mark.parametrize("policy", RIVALS)
@given(given_=inputs())
def test_layers_do_not_depend_on_each_other(policy: str, given_: PlanInput) -> None:
    together = POLICIES[policy](given_)
    for layer in range(given_.num_layers):
        part = slice(layer, layer + 1)
        alone = POLICIES[policy](
            replace(
                given_,
                owner_LE=given_.owner_LE[part],
                loads_LED=None if given_.loads_LED is None else given_.loads_LED[part],
                resident_LED=None if given_.resident_LED is None else given_.resident_LED[part],
                present_LED=None if given_.present_LED is None else given_.present_LED[part],
            )
        )
        np.testing.assert_array_equal(together.where_LED[part], alone.where_LED)
        if together.quota_LED is not None and alone.quota_LED is not None:
            np.testing.assert_allclose(together.quota_LED[part], alone.quota_LED, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("policy", ["echo", "llep", "smartmoe", "ultraep"])
@given(given_=inputs())
def test_no_device_ends_up_busier_than_the_busiest_was(policy: str, given_: PlanInput) -> None:
    static_LD, planned_LD = check(given_, plan_static_ep(given_)), check(given_, POLICIES[policy](given_))
    assert (planned_LD.max(-1) <= static_LD.max(-1) * (1 + 1e-9)).all()


@given(given_=inputs())
def test_llep_and_echo_with_room_for_everything(given_: PlanInput) -> None:
    """LLEP keeps to its bound but for the last chunk, an eighth of it at most; ECHO balances exactly."""
    given_ = replace(given_, slots_D=np.full(given_.world_size, given_.num_experts))
    bound = 1.1 if given_.max_imbalance is None else given_.max_imbalance
    mean_L = given_.expected_LED.sum((-1, -2)) / given_.world_size
    assert (check(given_, plan_llep(given_)).max(-1) <= mean_L * bound * 1.125 * (1 + 1e-9)).all()
    np.testing.assert_allclose(check(given_, plan_echo(given_)).max(-1), mean_L, rtol=1e-6)


@pytest.mark.parametrize("policy", RIVALS)
@pytest.mark.parametrize(("experts", "world"), [(4, 1), (2, 5), (7, 3), (1, 1)])
def test_absurd_inputs(policy: str, experts: int, world: int) -> None:
    """No tokens, one device, fewer experts than devices, no slots, more slots than experts."""
    owner = contiguous_owners(experts, world).tolist()
    for loads in (None, [[0.0] * experts] * world, [[7.0] + [0.0] * (experts - 1)] * world):
        for slots in (0, 1, experts + 3):
            given_ = plan_input(owner, loads, [slots] * world)
            plan = POLICIES[policy](given_)
            check(given_, plan)
            if world == 1 or slots == 0 or (loads is not None and not np.any(loads)):
                assert (plan.where_LED.sum(-1) == 1).all(), "a replica of no use"


# No straw men: 256 experts, 32 devices in one node, lognormal(1) loads


@pytest.fixture(scope="module")
def skewed() -> PlanInput:
    """Ten layers of 8192 tokens with 8 assignments on each rank; FasterMoE's own constants for devices and links."""
    experts, world, layers = 256, 32, 10
    rng = np.random.default_rng(0)
    popularity_LE = rng.lognormal(size=(layers, experts))
    popularity_LE /= popularity_LE.sum(-1, keepdims=True)
    loads_LED = np.stack([rng.multinomial(8192 * 8, popularity_E, size=world).T for popularity_E in popularity_LE]).astype(float)
    topology = uniform_topology(1, world, flops=11.5e12, memory=1e11, intra_node=Link(50e9 / 8, 0.0))
    cost = LayerCost(trainable_bytes=4 * 2048**2 * 4, assignment_flops=8 * 2048**2, row_bytes=2048 * 4)
    return PlanInput(np.tile(contiguous_owners(experts, world), (layers, 1)), loads_LED, topology, cost, np.zeros(world, dtype=np.int64))


@pytest.mark.parametrize(
    ("policy", "slots", "max_imbalance", "low", "high"),
    [
        # Elsewhere, on other draws: 2.36, 1.38, 1.71, 1.005 to 1.13, 1.005 to 1.04, 1.30, 1.02, 1.000, 1.10.
        ("static_ep", 0, None, 2.0, 2.6),
        ("smartmoe", 2, None, 1.1, 1.45),
        ("fastermoe", 4, None, 1.3, 1.8),
        ("eplb", 2, None, 1.0, 1.06),
        ("laer", 2, None, 1.0, 1.06),
        ("flexmoe", 2, None, 1.0, 1.1),
        ("echo", 1, None, 1.0, 1.35),
        ("echo", 2, None, 1.0, 1.03),
        ("llep", 8, 1.0, 1.0, 1.005),
        ("llep", 2, 1.1, 1.05, 1.105),
    ],
)
def test_rivals_balance_as_well_as_published(
    skewed: PlanInput, policy: str, slots: int, max_imbalance: float | None, low: float, high: float
) -> None:
    given_ = replace(skewed, slots_D=np.full(skewed.world_size, slots), max_imbalance=max_imbalance)
    loads_LD = check(given_, POLICIES[policy](given_))
    assert low <= (loads_LD.max(-1) / loads_LD.mean(-1)).mean() <= high


def test_llep_needs_as_few_transfers_as_published(skewed: PlanInput) -> None:
    """Elsewhere 34 for a bound of 1.0 and 15 for 1.1."""
    given_ = replace(skewed, slots_D=np.full(skewed.world_size, 8))
    for max_imbalance, most in ((1.0, 40), (1.1, 18)):
        plan = plan_llep(replace(given_, max_imbalance=max_imbalance))
        assert plan.where_LED.sum() / given_.num_layers - given_.num_experts <= most
