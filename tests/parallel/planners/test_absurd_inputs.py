"""Inputs without sense, or at its limits: every planner and the simulator return a plan or report what is wrong."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest

from hecate.errors import UserError
from hecate.parallel.cluster.topology import Link
from hecate.parallel.cost.cost_model import LayerCost
from hecate.parallel.planners import POLICIES, PlanInput
from hecate.parallel.simulate.simulated_step import Setting
from hecate.parallel.simulate.simulator import simulate, slots_in_memory
from hecate.parallel.values.placement import contiguous_owners
from testing.plain_flows import quotas_of
from tests.parallel.planners.auto_inputs import KINDS, topology

COST = KINDS["full experts"]
OWNERS, PAIR = contiguous_owners(3, 2)[None], topology((0, 0))


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("nodes", [(0,), (0, 0, 0), (0, 1), (0, 1, 1)])
@pytest.mark.parametrize("cost", [COST, replace(COST, trainable_bytes=1e30, state_bytes=1e31), LayerCost(trainable_bytes=0.0)])
def test_every_planner_gives_a_plan_where_there_is_little_to_plan(policy: str, nodes: tuple[int, ...], cost: LayerCost) -> None:
    """No tokens, one token, one expert of all tokens; one device; no slots; an expert larger than any memory; one that weighs nothing."""
    place, experts = topology(nodes), 4
    fitting = slots_in_memory(place, cost, num_layers=1, num_experts=experts)
    assert cost.trainable_bytes < 1e30 or not fitting.any()
    one = np.zeros((1, experts, len(nodes)))
    one[0, -1, 0] = 1.0
    for loads in (None, 0 * one, one, 1e15 * one):
        for slots in (np.zeros(len(nodes), dtype=np.int64), fitting):
            given = PlanInput(contiguous_owners(experts, len(nodes))[None], loads, place, cost, slots)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                plan = POLICIES[policy](given)
                total = plan.seconds(given).total
            assert (plan.where_LED | ~given.owned_LED).all()
            assert np.isfinite(total).all()
            quota_LED = quotas_of(plan, given.expected_LED, place)
            assert not quota_LED[~plan.where_LED].any()
            np.testing.assert_allclose(quota_LED.sum(-1), given.expected_LED.sum(-1))


@pytest.mark.parametrize(
    ("loads", "slots", "message"),
    [
        (np.full((1, 3, 2), np.nan), [1, 1], "loads must be finite and >= 0, got numbers from nan"),
        (np.full((1, 3, 2), np.inf), [1, 1], "loads must be finite"),
        (np.full((1, 3, 2), -1.0), [1, 1], "got numbers from -1.0 to -1.0"),
        (np.ones((1, 2, 3)), [1, 1], r"shape \(1, 3, 2\), got \(1, 2, 3\)"),
        (np.ones((2, 3, 2)), [1, 1], r"shape \(1, 3, 2\), got \(2, 3, 2\)"),
        (None, [1, -1], "slots_D must be 2 numbers >= 0"),
        (None, [1], "slots_D must be 2 numbers >= 0"),
    ],
)
def test_what_cannot_be_planned_is_refused(loads: np.ndarray | None, slots: list[int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        PlanInput(OWNERS, loads, PAIR, COST, np.array(slots))


@pytest.mark.parametrize(
    "changes", [{"trainable_bytes": -1.0}, {"row_bytes": np.nan}, {"assignment_flops": np.inf}, {"top_k": 0}, {"frozen_lifetime": 0.0}]
)
def test_a_cost_that_is_none_is_refused(changes: dict[str, float]) -> None:
    with pytest.raises(UserError, match=f"layer cost: .*{next(iter(changes))}"):
        replace(COST, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("bandwidth", [0.0, -1.0, np.nan, np.inf])
def test_links_that_carry_nothing_are_refused(bandwidth: float) -> None:
    with pytest.raises(UserError, match="bandwidth must be a positive number"):
        Link(bandwidth, 0.0)
    for name in ("port_bandwidth", "nic_bandwidth"):
        with pytest.raises(UserError, match=f"every {name} must be positive and finite"):
            replace(PAIR, **{name: (1.0, bandwidth)})  # type: ignore[arg-type]


@pytest.mark.parametrize("nodes", [(0,), (0, 0), (0, 1)])
def test_the_simulator_bears_steps_without_tokens(nodes: tuple[int, ...]) -> None:
    place = topology(nodes)
    slots = slots_in_memory(place, COST, num_layers=1, num_experts=3)
    rows = simulate(np.zeros((3, 1, 3, len(nodes)), dtype=np.int64), POLICIES, Setting(topology=place, cost=COST, slots_D=slots))
    for row in rows:
        assert (row.seconds.compute, row.seconds.dispatch, row.imbalance) == (0, 0, 1)
        assert np.isfinite(row.step_seconds)


@pytest.mark.parametrize("load", [-1.0, np.nan])
def test_the_simulator_refuses_loads_that_are_none(load: float) -> None:
    with pytest.raises(UserError, match="loads must be finite and >= 0"):
        simulate(np.full((3, 1, 3, 2), load), POLICIES, Setting(topology=PAIR, cost=COST, slots_D=np.ones(2, dtype=np.int64)))
