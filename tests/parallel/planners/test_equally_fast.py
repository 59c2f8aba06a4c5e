"""Of plans that are equally fast `auto` takes the one that moves fewer bytes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hecate.parallel.cost.cost_model import ExecutionMode, LayerCost
from hecate.parallel.planners import PlanInput
from hecate.parallel.planners.plan import Plan
from hecate.parallel.planners.policies import auto
from hecate.parallel.planners.policies.auto import plan_auto
from hecate.parallel.planners.replication import NODES, NODES_BUT_ONE
from hecate.parallel.values.placement import contiguous_owners
from testing.unit_cases import unit_topology

COST = LayerCost(trainable_bytes=8.0, frozen_bytes=4.0, top_k=1, row_bytes=1.0, assignment_flops=1.0, non_moe_flops=1e6)
"""attention hides every gather and every reduction"""
ANY_IMBALANCE = 1e9
"""a bound that every plan keeps: candidates are compared, none is left out, and nothing is searched for"""


@st.composite
def tied_inputs(draw: st.DrawFn) -> PlanInput:
    """Few assignments of whole numbers on equal devices, without latencies: many plans take the same time."""
    nodes = draw(st.sampled_from([(0, 0), (0, 0, 0), (0, 0, 1, 1)]))
    world, experts = len(nodes), draw(st.integers(2, 6))
    random = np.random.default_rng(draw(st.integers(0, 10**6)))
    loads = random.integers(0, 3, (1, experts, world)) * 8.0
    resident = draw(st.booleans())
    return PlanInput(
        contiguous_owners(experts, world)[None],
        loads,
        unit_topology(nodes),
        replace(COST, frozen_bytes=draw(st.sampled_from([0.0, 4.0])), row_bytes=draw(st.sampled_from([0.0, 1.0]))),
        np.full(world, draw(st.integers(0, experts))),
        resident_LED=random.random((1, experts, world)) < 0.3 if resident else None,
        max_imbalance=ANY_IMBALANCE,
        execution=ExecutionMode(rematerialize=draw(st.booleans())),
    )


def moved(plan: Plan, given_: PlanInput) -> float:
    """Bytes between ranks, by what the cost model says of each port."""
    priced, cost = plan.price(given_), given_.cost
    gathers = 2 if given_.execution.rematerialize else 1
    experts = float(priced.gathered.near_out_D.sum() + priced.gathered.far_out_D.sum())
    frozen = float(priced.gathered_frozen.near_out_D.sum() + priced.gathered_frozen.far_out_D.sum())
    rows = float(priced.rows.near[1].sum() + priced.rows.far[1].sum())
    return (
        experts * (gathers * cost.trainable_bytes + cost.reduced_bytes)
        + frozen * cost.frozen_bytes / cost.frozen_lifetime
        + 4 * cost.row_bytes * rows
    )


@settings(deadline=None, max_examples=40)
@given(tied_inputs())
def test_of_equally_fast_candidates_the_one_that_moves_less(given_: PlanInput) -> None:
    """Every candidate is made alone, and compared with what comes of all of them."""
    plan = plan_auto(given_)
    seconds, bytes_moved = float(plan.seconds(given_).total[0]), moved(plan, given_)
    for rule, slacks in auto.CANDIDATES:
        if rule in (NODES, NODES_BUT_ONE) and given_.topology.num_nodes == 1:
            continue
        for slack in (0.0, *slacks):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(auto, "CANDIDATES", ((rule, (slack,)),))
                patch.setattr(auto, "_RULES", np.array([rule]))
                patch.setattr(auto, "_SLACKS", np.array([(0.0, slack)]))
                alone = plan_auto(given_)
            taken = float(alone.seconds(given_).total[0])
            assert taken >= seconds * (1 - 1e-8)
            if taken <= seconds * (1 + 1e-10):
                assert bytes_moved <= moved(alone, given_) * (1 + 1e-6), (rule, slack)


@settings(deadline=None, max_examples=80)
@given(tied_inputs())
def test_no_replica_is_brought_for_nothing(given_: PlanInput) -> None:
    """Unless all are everywhere, so that ranks need not even ask each other."""
    plan = plan_auto(replace(given_, max_imbalance=None))
    assert plan.quota_LED is not None
    idle_LED = plan.where_LED & ~given_.owned_LED & (plan.quota_LED <= 1e-6)
    assert plan.where_LED.all() or not idle_LED.any()


def test_balanced_tokens_at_home_need_no_replica() -> None:
    """Each rank's tokens are of its own experts: everything everywhere would be as fast, and moves experts for nothing."""
    loads = np.zeros((1, 4, 2))
    loads[0, :2, 0] = loads[0, 2:, 1] = 8.0
    given_ = PlanInput(contiguous_owners(4, 2)[None], loads, unit_topology((0, 0)), COST, np.full(2, 4))
    assert np.array_equal(plan_auto(given_).where_LED, given_.owned_LED)
