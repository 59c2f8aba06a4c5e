from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hecate.parallel.cluster.topology import Link, uniform_topology
from hecate.parallel.cost.cost_model import LayerCost
from hecate.parallel.loops import jit
from hecate.parallel.plan.after_router import best_after_router
from hecate.parallel.planners import Plan, PlanInput, new_split
from hecate.parallel.planners.new_split import split_anew
from hecate.parallel.planners.policies.auto import plan_auto
from testing.plain_flows import even_quota
from tests.parallel.planners.auto_inputs import KINDS, inputs, topology


@settings(deadline=None)
@given(inputs(), st.integers(0, 10**6))
def test_a_split_of_what_is_there_and_no_slower_than_topology_aware_dispatch(given_: PlanInput, seed: int) -> None:
    where_LED = given_.owned_LED | (np.random.default_rng(seed).random(given_.owned_LED.shape) < 0.4)
    plan = split_anew(given_, where_LED)
    assert plan.quota_LED is not None
    assert np.array_equal(plan.where_LED, where_LED)
    assert (plan.quota_LED >= -1e-9).all()
    assert not plan.quota_LED[~where_LED].any()
    np.testing.assert_allclose(plan.quota_LED.sum(-1), given_.expected_LED.sum(-1), rtol=1e-9, atol=1e-6)
    even = dataclasses.replace(plan, quota_LED=even_quota(where_LED, given_.expected_LED, given_.topology))
    assert (plan.seconds(given_).total <= even.seconds(given_).total * (1 + 1e-9)).all()


def test_small_changes_find_faster_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """On four ranks of two nodes, with half of all replicas: some layers get faster by a hundredth, and no replica comes or goes."""
    random, seconds = np.random.default_rng(3), []
    given_ = PlanInput(
        np.tile(np.arange(8) // 2, (6, 1)), random.lognormal(3, 2, (6, 8, 4)), topology((0, 0, 1, 1)), KINDS["full experts"], np.full(4, 8)
    )
    where_LED = given_.owned_LED | (random.random(given_.owned_LED.shape) < 0.5)
    with jit.plain_python():
        for improve in (new_split.improve, lambda *_: 0.0):
            monkeypatch.setattr(new_split, "improve", improve)
            plan = split_anew(given_, where_LED)
            assert np.array_equal(plan.where_LED, where_LED)
            seconds.append(plan.seconds(given_).total)
    assert (seconds[0] <= seconds[1]).all()
    assert (seconds[0] < 0.992 * seconds[1]).any()


def moved_tokens() -> tuple[PlanInput, PlanInput, Plan]:
    """Expert 0 on both ranks, made for tokens of rank 1; then all tokens are rank 0's, and a planner has no slots for replicas."""
    two = uniform_topology(1, 2, flops=1e12, memory=1e10, intra_node=Link(1e10, 0.0), inter_node=Link(1e10, 0.0))
    cost = LayerCost(trainable_bytes=1e6, row_bytes=1.0, assignment_flops=1e7)
    owner = np.array([[0, 1]])
    before = PlanInput(owner, np.array([[[0.0, 900.0], [0.0, 100.0]]]), two, cost, np.array([0, 0]))
    plan = Plan(owner, np.array([[[True, True], [False, True]]]), np.array([[[0.0, 900.0], [0.0, 100.0]]]))
    return before, dataclasses.replace(before, loads_LED=np.array([[[1000.0, 0.0], [0.0, 0.0]]])), plan


def test_tokens_are_split_anew_over_the_replicas_that_are_there() -> None:
    before, after, plan = moved_tokens()
    ((gain, found),) = best_after_router(plan_auto, after, [plan.layer(before, 0)], splits=True)
    assert gain > 0
    assert np.array_equal(found.placement.where_ED, plan.where_LED[0])
    assert found.quota_ED is not None
    np.testing.assert_allclose(found.quota_ED[0], [500.0, 500.0], rtol=0.06)


def test_without_new_splits_the_planner_alone_decides() -> None:
    before, after, plan = moved_tokens()
    ((_, found),) = best_after_router(plan_auto, after, [plan.layer(before, 0)], splits=False)
    assert not found.placement.where_ED[0, 1]


def test_nothing_is_gained_where_the_loads_are_those_that_were_planned() -> None:
    before, _, _ = moved_tokens()
    ((gain, _),) = best_after_router(plan_auto, before, [plan_auto(before).layer(before, 0)], splits=True)
    assert gain <= 0
