"""Plans made after the router: the loads they are made from, and when a better plan is worth its transfers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from hecate.engine.step import by_rank, exchange_counts
from hecate.parallel.cluster.topology import Link, Topology
from hecate.parallel.cost.cost_model import ExecutionMode, LayerCost
from hecate.parallel.plan.after_router import after_router, calibration_gain, one_layer
from hecate.parallel.planners import LayerPlan, Plan, PlanInput
from hecate.parallel.values.placement import Placement, everything_everywhere, owners_only
from testing.ranks import run_ranks

OWNERS = np.array([0, 1])
TWO = Topology((0, 0), (1.0, 1.0), (1e9, 1e9), Link(1.0, 0.0), Link(1.0, 0.0))
"""two ranks of one FLOP and one byte a second"""
COST = LayerCost(trainable_bytes=10.0, gradient_bytes=8.0, assignment_flops=1.0)
"""an assignment takes one second forward and two backward"""
HOT_ED = np.array([[100.0, 0.0], [0.0, 0.0]])
"""all assignments are of expert 0, and on its owner"""


def layer(cost: LayerCost = COST, loads_ED: np.ndarray = HOT_ED) -> PlanInput:
    return PlanInput(OWNERS[None], loads_ED[None], TWO, cost, np.full(2, 2))


def at_home() -> LayerPlan:
    return LayerPlan(owners_only(OWNERS, 2), np.ones((2, 2)), None)


def shared() -> LayerPlan:
    """Expert 0 on both ranks, which serve half of its assignments each."""
    return LayerPlan(Placement(OWNERS.copy(), np.array([[True, True], [False, True]])), HOT_ED, np.array([[50.0, 50.0], [0.0, 0.0]]))


def gain_of(given: PlanInput, present: LayerPlan, better: LayerPlan) -> float:
    return calibration_gain(given, present, better, after_router(given, present))


@pytest.mark.parametrize(
    ("cost", "rematerialize", "gain"),
    [
        # 300 s on one rank become 150 on two; the expert comes, 10 s, and its gradient goes back, 8 s.
        (COST, False, 150 - 10 - 8),
        # It comes a second time before the backward pass.
        (COST, True, 150 - 10 - 18),
        # Twenty seconds of attention, backward forty, hide the gradient but not what travels after the router.
        (replace(COST, non_moe_flops=20.0), False, 150 - 10),
        # A frozen part travels once, and gets no gradient.
        (replace(COST, frozen_bytes=5.0), False, 150 - 15 - 8),
    ],
)
def test_gain_by_hand(cost: LayerCost, rematerialize: bool, gain: float) -> None:
    executed = ExecutionMode(plan="calibrated", rematerialize=rematerialize)
    assert gain_of(replace(layer(cost), execution=executed), at_home(), shared()) == pytest.approx(gain)


def test_what_is_there_already_costs_nothing() -> None:
    everywhere = LayerPlan(everything_everywhere(OWNERS, 2), np.ones((2, 2)), None)
    better = LayerPlan(everywhere.placement, HOT_ED, np.array([[50.0, 50.0], [0.0, 0.0]]))
    assert gain_of(layer(), everywhere, better) == pytest.approx(150)


def test_what_is_there_and_not_wanted_need_not_be_reduced() -> None:
    """Both experts' gradients go different ways, side by side: one expert fewer there is nothing gained."""
    everywhere = LayerPlan(everything_everywhere(OWNERS, 2), HOT_ED, np.array([[50.0, 50.0], [0.0, 0.0]]))
    assert gain_of(layer(), everywhere, shared()) == pytest.approx(0)
    assert gain_of(layer(), everywhere, at_home()) == pytest.approx(8 - 150)


def test_present_shares_meet_the_true_loads() -> None:
    """The plan at hand sent half of rank 0's assignments of expert 0 away; of twice as many it still does."""
    plan = LayerPlan(shared().placement, HOT_ED, np.array([[50.0, 50.0], [0.0, 0.0]]))
    assert plan.served(2 * HOT_ED, TWO).tolist() == [100, 100]
    assert plan.split(TWO, 0)[0].tolist() == [0.5, 0.5]
    assert plan.dispatches(TWO)
    assert not LayerPlan(everything_everywhere(OWNERS, 2), HOT_ED, None).dispatches(TWO)
    at_home_ED = np.where(HOT_ED > 0, HOT_ED, 0.0)
    assert not LayerPlan(everything_everywhere(OWNERS, 2), HOT_ED, at_home_ED).dispatches(TWO), "each rank serves its own"


def test_a_layer_among_several() -> None:
    both = PlanInput(
        np.array([[0, 1], [1, 0]]),
        np.ones((2, 2, 2)),
        TWO,
        COST,
        np.full(2, 2),
        resident_LED=np.arange(8).reshape(2, 2, 2) % 3 == 0,
        present_LED=np.arange(8).reshape(2, 2, 2) % 2 == 0,
    )
    alone = one_layer(both, 1, np.array([[3, 4], [5, 6]]))
    assert alone.owner_LE.tolist() == [[1, 0]]
    assert alone.expected_LED.tolist() == [[[3, 4], [5, 6]]]
    assert alone.resident_LED is not None
    assert both.resident_LED is not None
    assert alone.resident_LED.tolist() == both.resident_LED[1:].tolist()
    assert alone.present_LED is not None
    assert both.present_LED is not None
    assert alone.present_LED.tolist() == both.present_LED[1:].tolist()
    assert (alone.cost, alone.slots_D.tolist()) == (COST, [2, 2])


def test_before_any_load_is_known_quotas_are_shares_of_one_assignment_each() -> None:
    given = PlanInput(OWNERS[None], None, TWO, COST, np.full(2, 2))
    quota_LED = np.array([[[0.0, 2.0], [1.0, 1.0]]])
    plan = Plan(given.owner_LE, np.ones((1, 2, 2), dtype=bool), quota_LED).layer(given, 0)
    assert plan.split(TWO, 0).tolist() == [[0, 1], [1, 0]]


def _exchanged(rank: int, world: int) -> list[list[int]]:
    group = dist.group.WORLD
    assert group is not None
    return by_rank(exchange_counts(torch.tensor([rank, 10 * rank]), group)).tolist()


def test_every_rank_gets_every_ranks_counts() -> None:
    assert run_ranks(3, _exchanged) == [[[0, 1, 2], [0, 10, 20]]] * 3
