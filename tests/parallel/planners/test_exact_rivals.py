"""MoonEP and UltraEP: what their own code gives for the same loads, and what their rules promise."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given

from hecate.parallel.planners import PlanInput
from hecate.parallel.planners.policies.moonep import plan_moonep
from hecate.parallel.planners.policies.ultraep import plan_ultraep
from hecate.parallel.planners.rivals.whole_loads import plan_whole_loads
from testing.plain_flows import quotas_of
from tests.parallel.planners.rival_inputs import check, inputs, plan_input, quota, totals

# Worked out by the systems' own code (MoonEP 43ac94c, UltraEP 94cab09): experts, owners and a row of assignments a source rank.
TWO_EACH = ([0, 0, 1, 1], [[6, 2, 1, 1], [4, 2, 2, 2]])
ONE_EACH = ([0, 1, 2, 3], [[11, 3, 1, 1], [10, 3, 2, 1], [9, 4, 2, 1], [10, 2, 3, 1]])
FEWER_THAN_RANKS = ([0, 1, 2, 3], [[5000, 2000, 1000, 0], [5000, 1000, 1000, 1000]] * 4)


def test_moonep_of_two_experts_a_rank() -> None:
    owner, loads = TWO_EACH
    assert quota(plan_moonep(plan_input(owner, loads, [2, 2]))) == [[6, 4], [4, 0], [0, 3], [0, 3]]


def test_moonep_fills_each_rank_from_one_other() -> None:
    owner, loads = ONE_EACH
    assert quota(plan_moonep(plan_input(owner, loads, [1] * 4))) == [[16, 4, 8, 12], [0, 12, 0, 0], [0, 0, 8, 0], [0, 0, 0, 4]]


def test_moonep_of_ranks_that_own_nothing() -> None:
    owner, loads = FEWER_THAN_RANKS
    e0, e1, e2, e3 = quota(plan_moonep(plan_input(owner, loads, [1] * 8)))
    assert e0 == [8000, 0, 0, 0, 8000, 8000, 8000, 8000]
    assert e1 == [0, 8000, 0, 4000, 0, 0, 0, 0]
    assert e2 == [0, 0, 8000, 0, 0, 0, 0, 0]
    assert e3 == [0, 0, 0, 4000, 0, 0, 0, 0]


def test_moonep_overfills_from_a_rank_that_is_then_filled_by_another() -> None:
    """Above the mean by 2, -6, 4: rank 2 fills rank 1 whole and lacks 2 then, which rank 0 gives."""
    plan = plan_moonep(plan_input([0, 1, 2], totals([12, 4, 14], 3), [1, 1, 1]))
    assert quota(plan) == [[10, 0, 2], [0, 4, 0], [0, 6, 8]]


def test_moonep_leaves_at_home_what_finds_no_slot() -> None:
    """Rank 1 lacks 6: expert 0 gives 5, expert 1 one. With one slot the larger one stays, and of equals the higher expert."""
    owner, loads = [0, 0, 0, 1], totals([5, 4, 4, 1], 2)
    assert quota(plan_moonep(plan_input(owner, loads, [0, 2]))) == [[0, 5], [3, 1], [4, 0], [0, 1]]
    assert quota(plan_moonep(plan_input(owner, loads, [0, 1]))) == [[0, 5], [4, 0], [4, 0], [0, 1]]
    tied = plan_moonep(plan_input([0, 0, 0, 0], totals([4, 4, 4, 4], 2), [0, 1]))
    assert quota(tied) == [[4, 0], [0, 4], [4, 0], [4, 0]]


@given(given_=inputs())
def test_moonep_with_room_gives_no_rank_more_than_the_mean(given_: PlanInput) -> None:
    """Exactly, for whole loads. No rank needs more foreign experts than the rank with the most owns, as each is filled by one other."""
    owned = max(np.bincount(owner_E).max() for owner_E in given_.owner_LE)
    whole_LED = np.rint(given_.expected_LED)
    given_ = replace(given_, loads_LED=whole_LED, slots_D=np.full(given_.world_size, owned))
    mean_L = np.ceil(whole_LED.sum((-1, -2)) / given_.world_size)
    assert (check(given_, plan_moonep(given_)).max(-1) <= mean_L * (1 + 1e-9)).all()


def test_ultraep_of_two_experts_a_rank() -> None:
    """Mean 10, bound 11."""
    owner, loads = TWO_EACH
    assert quota(plan_ultraep(plan_input(owner, loads, [1, 1]))) == [[7, 3], [4, 0], [0, 3], [0, 3]]


@pytest.mark.parametrize("slots", [1, 2])
def test_ultraep_gives_to_the_rank_with_the_most_room(slots: int) -> None:
    """Mean 16, bound 17: 23 to move; ranks 1, 2, 3 have room for 5, 9, 13. Rank 1 is passed over while a third or a half is more."""
    owner, loads = ONE_EACH
    assert quota(plan_ultraep(plan_input(owner, loads, [slots] * 4)))[0] == [17, 1, 9, 13]


def test_ultraep_of_ranks_that_own_nothing() -> None:
    owner, loads = FEWER_THAN_RANKS
    e0, e1, *others = quota(plan_ultraep(plan_input(owner, loads, [1] * 8)))
    assert e0 == [8080, 0, 0, 0, 8080, 8080, 8080, 7680]
    assert e1 == [0, 8080, 0, 3920, 0, 0, 0, 0]
    assert others == [[0, 0, 8000, 0, 0, 0, 0, 0], [0, 0, 0, 4000, 0, 0, 0, 0]]


def test_ultraep_searches_for_the_lowest_bound_where_slots_are_few() -> None:
    """Four experts of 3000 and one slot, which takes all but one assignment of an expert: 9001 is the lowest bound."""
    plan = plan_ultraep(plan_input([0, 0, 0, 0], totals([3000] * 4, 2), [1, 1]))
    assert quota(plan) == [[1, 2999], [3000, 0], [3000, 0], [3000, 0]]


def test_ultraep_moves_no_small_share_where_it_searches() -> None:
    """Twelve experts of 1000: no copy would take over 1024."""
    plan = plan_ultraep(plan_input([0] * 12, totals([1000] * 12, 2), [1, 1]))
    assert plan.where_LED.sum() == 12


@given(given_=inputs())
def test_ultraep_stays_in_the_node_and_keeps_something_at_home(given_: PlanInput) -> None:
    plan = plan_ultraep(given_)
    check(given_, plan)
    node_D = np.asarray(given_.topology.node_of_rank)
    assert not (plan.where_LED & (node_D[given_.owner_LE][..., None] != node_D)).any()
    kept_LE = np.take_along_axis(quotas_of(plan, given_.expected_LED, given_.topology), given_.owner_LE[..., None], axis=2)[..., 0]
    assert (kept_LE[given_.expected_LED.sum(-1) > 0] > 0).all()


def test_quotas_of_expected_loads_are_stretched_from_whole_ones() -> None:
    """3.6 is planned as 4, of which 3 move; 0.4 as nothing."""
    given_ = plan_input([0, 1], totals([3.6, 0.4], 2), [1, 1])
    seen: list[list[int]] = []

    def three_of_the_first(whole_E: list[int], owner_E: list[int]) -> dict[tuple[int, int], int]:
        seen.extend([whole_E, owner_E])
        return {(0, 1): 3}

    assert quota(plan_whole_loads(given_, three_of_the_first)) == [[0.9, 2.7], [0, 0.4]]
    assert seen == [[4, 0], [0, 1]]
