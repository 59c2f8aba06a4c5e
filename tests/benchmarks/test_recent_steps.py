"""Plans judged by what they would have cost in the last steps: two ranks, one FLOP and one byte a second."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.recent_steps import cheapest_over, seconds_over
from hecate.parallel.cost.cost_model import LayerCost
from hecate.parallel.planners import Plan, PlanInput
from testing.unit_cases import unit_topology

NODE = unit_topology((0, 0), memory_bandwidth=1.0)
COST = LayerCost(trainable_bytes=4.0, assignment_flops=1.0)
"""an assignment takes one second forward and two backward; an expert and its gradient travel in four seconds each"""
OWNERS = np.array([[0, 1]])
PREDICTED_LED = np.array([[[8.0, 8.0], [0.0, 0.0]]])
"""all tokens of both ranks choose expert 0"""
GIVEN = PlanInput(OWNERS, PREDICTED_LED, NODE, COST, np.full(2, 2))
SHARED = Plan(OWNERS, np.array([[[True, True], [False, True]]]), np.array([[[8.0, 8.0], [0.0, 0.0]]]))
"""expert 0 on both ranks, each of which serves its own"""
AT_HOME = Plan(OWNERS, np.array([[[True, False], [False, True]]]), np.array([[[16.0, 0.0], [0.0, 0.0]]]))
AS_PREDICTED, OTHERWISE = PREDICTED_LED, np.array([[[8.0, 0.0], [0.0, 8.0]]])
"""one rank's tokens choose the other expert"""


def test_seconds_by_hand() -> None:
    """The busiest rank computes for 24 or 48 s, an expert and its gradient travel for 8, and the optimizer takes 4."""
    steps = np.stack([AS_PREDICTED, OTHERWISE])
    assert seconds_over(SHARED, GIVEN, steps)[:, 0].tolist() == pytest.approx([24 + 8 + 4, 24 + 8 + 4])
    assert seconds_over(AT_HOME, GIVEN, steps)[:, 0].tolist() == pytest.approx([48 + 4, 24 + 4])


def test_the_plan_that_is_best_for_the_prediction_need_not_be_best_over_the_steps() -> None:
    """The prediction came true in one step of four. A second layer in which it did in three keeps its plan."""
    shared, at_home = (
        Plan(np.tile(OWNERS, (2, 1)), np.tile(one.where_LED, (2, 1, 1)), np.tile(one.quota_LED, (2, 1, 1)))  # type: ignore[arg-type]
        for one in (SHARED, AT_HOME)
    )
    given = PlanInput(np.tile(OWNERS, (2, 1)), np.tile(PREDICTED_LED, (2, 1, 1)), NODE, COST, np.full(2, 2))
    assert (shared.seconds(given).total < at_home.seconds(given).total).all()
    came = [(AS_PREDICTED, OTHERWISE), *[(OTHERWISE, AS_PREDICTED)] * 3]
    steps = np.stack([np.concatenate(one) for one in came])
    found = cheapest_over([shared, at_home], given, steps)
    assert found.where_LED.tolist() == [AT_HOME.where_LED[0].tolist(), SHARED.where_LED[0].tolist()]
    assert found.quota_LED is not None
    assert found.quota_LED.tolist() == [AT_HOME.quota_LED[0].tolist(), SHARED.quota_LED[0].tolist()]  # type: ignore[index]
