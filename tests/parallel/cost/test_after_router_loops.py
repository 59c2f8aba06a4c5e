"""Traffic and seconds of plans under loads that they were not made for: the loops of `hecate.parallel.cost.flow_loops` and
`hecate.parallel.cost.after_router_loops` against plain numpy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hecate.parallel.plan.after_router import after_router, one_layer
from hecate.parallel.planners import LayerPlan, Plan, PlanInput
from hecate.parallel.values.placement import Placement
from testing.plain_flows import executed_flows, flow_traffic, seconds_from_router
from tests.parallel.planners.auto_inputs import inputs


@st.composite
def executed(draw: st.DrawFn) -> tuple[PlanInput, Plan, np.ndarray]:
    """(input under the true loads, a plan, the loads that it was made for); many loads are zero, and some plans have no quotas."""
    given_, random = draw(inputs()), np.random.default_rng(draw(st.integers(0, 10**6)))
    shape = given_.owned_LED.shape
    planned_LED = random.integers(0, 500, shape) * (random.random(shape) < draw(st.sampled_from([0.3, 1.0]))) * 1.0
    if draw(st.booleans()):
        planned_LED = given_.expected_LED
    where_LED = given_.owned_LED | (random.random(shape) < draw(st.sampled_from([0.2, 0.6, 1.0])))
    share_LED = where_LED * random.random(shape) * (random.random(shape) < 0.7) + where_LED * 1e-3
    quota_LED = planned_LED.sum(-1, keepdims=True) * share_LED / share_LED.sum(-1, keepdims=True)
    plan = Plan(given_.owner_LE, where_LED, quota_LED if draw(st.booleans()) else None)
    return replace(given_, loads_LED=given_.expected_LED), plan, planned_LED


@given(executed())
def test_traffic_is_the_sum_of_all_flows(case: tuple[PlanInput, Plan, np.ndarray]) -> None:
    given_, plan, planned_LED = case
    flow = executed_flows(plan.where_LED, plan.quota_LED, planned_LED, given_.expected_LED, given_.topology)
    wanted_LXD = flow_traffic(flow, given_.expected_LED)
    np.testing.assert_allclose(plan.traffic(planned_LED, given_.expected_LED, given_.topology), wanted_LXD, rtol=1e-9, atol=1e-6)


@given(executed(), st.floats(0, 1), st.floats(0.5, 1.5))
def test_seconds_after_the_router_are_those_of_the_flows(case: tuple[PlanInput, Plan, np.ndarray], kept: float, share: float) -> None:
    given_, plan, planned_LED = case
    made_for = replace(given_, loads_LED=planned_LED)
    for layer in range(given_.num_layers):
        alone, one = one_layer(given_, layer, given_.expected_LED[layer]), plan.layer(made_for, layer)
        there_ED = given_.owned_LED[layer] | (np.random.default_rng(layer).random(plan.where_LED[layer].shape) < kept)
        there = LayerPlan(Placement(given_.owner_LE[layer].copy(), there_ED.copy()), one.loads_ED, None)
        for present, present_ED in ((None, plan.where_LED[layer]), (there, there_ED)):
            wanted = seconds_from_router(alone, one, present_ED)
            assert after_router(alone, one, present) == pytest.approx(wanted, rel=1e-9, abs=1e-15)
            found = after_router(alone, one, present, enough=share * wanted)
            if share > 1:
                assert found == pytest.approx(wanted, rel=1e-9, abs=1e-15)
            else:
                assert share * wanted * (1 - 1e-9) - 1e-15 <= found <= wanted * (1 + 1e-9) + 1e-15, "a bound from below, and enough"
