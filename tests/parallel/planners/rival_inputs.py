"""Inputs of the rivals' policies, and what every plan must be."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from hecate.parallel.cluster.topology import Link, Topology
from hecate.parallel.cost.cost_model import LayerCost
from hecate.parallel.planners import Plan, PlanInput
from hecate.parallel.values.placement import contiguous_owners
from testing.plain_flows import quotas_of
from testing.unit_cases import layer_input, unit_topology


def plan_input(
    owner: list[int],
    loads: list[list[float]] | None,
    slots: list[int],
    *,
    nodes: tuple[int, ...] | None = None,
    present: list[list[int]] | None = None,
    **others: Any,
) -> PlanInput:
    """One layer. `loads`: a row a source rank. `present`: ranks of each expert in the plan before."""
    world = len(slots)
    present_LED = None if present is None else np.array([[[rank in ranks for rank in range(world)] for ranks in present]])
    return layer_input(owner, loads, slots, on=unit_topology(nodes or (0,) * world), present_LED=present_LED, **others)


def totals(loads: list[float], world: int) -> list[list[float]]:
    """All assignments at rank 0: policies that look at totals alone see `loads`."""
    return [loads] + [[0.0] * len(loads)] * (world - 1)


def where(plan: Plan) -> list[list[int]]:
    """Ranks of each expert."""
    return [np.flatnonzero(row).tolist() for row in plan.where_LED[0]]


def quota(plan: Plan) -> list[list[float]]:
    assert plan.quota_LED is not None
    return [[round(q, 9) for q in row] for row in plan.quota_LED[0].tolist()]


@st.composite
def inputs(draw: st.DrawFn) -> PlanInput:
    """Shapes, topology and slots are drawn one by one, the many numbers by a seed: drawing those takes longer than planning."""
    world, experts, layers = draw(st.integers(1, 6)), draw(st.integers(1, 9)), draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    nodes = (0, *sorted(rng.integers(0, 2, size=world - 1).tolist(), reverse=draw(st.booleans())))
    owner_LE = np.tile(contiguous_owners(experts, world), (layers, 1))
    if draw(st.booleans()):
        owner_LE = rng.integers(0, world, size=(layers, experts))
    loads_LED = None
    if draw(st.integers(0, 4)):
        # Thirds: means of iterations are fractions. Some entries, some experts, perhaps all, are without load.
        loads_LED = rng.integers(0, draw(st.sampled_from([1, 5, 5000])), size=(layers, experts, world), endpoint=True) / 3
        loads_LED *= (rng.random((layers, experts, world)) < 0.8) & (rng.random((layers, experts, 1)) < 0.8)
    fast, slow = Link(100.0, 0.01), Link(10.0, 0.1)
    return PlanInput(
        owner_LE,
        loads_LED,
        Topology(nodes, tuple(rng.choice([1e3, 3e3], size=world).tolist()), (1e9,) * world, fast, slow),
        LayerCost(trainable_bytes=draw(st.sampled_from([1.0, 50.0])), assignment_flops=1.0, row_bytes=1.0, non_moe_flops=2e3),
        rng.integers(0, draw(st.integers(1, experts + 1)), size=world, endpoint=True),
        rng.random((layers, experts, world)) < 0.5 if draw(st.booleans()) else None,
        draw(st.sampled_from([None, 1.0, 1.05, 1.5])),
    )


def check(given_: PlanInput, plan: Plan, *, within_slots: bool = True) -> np.ndarray:
    """Everything a plan must be; the loads of the ranks."""
    layers, experts, world = given_.num_layers, given_.num_experts, given_.world_size
    np.testing.assert_array_equal(plan.owner_LE, given_.owner_LE)
    assert plan.where_LED.shape == (layers, experts, world)
    assert plan.where_LED.dtype == np.bool_
    for layer in range(layers):
        for expert in range(experts):
            assert plan.where_LED[layer, expert, given_.owner_LE[layer, expert]], "no replica at the owner"
        for rank in range(world):
            held = set(np.flatnonzero(plan.where_LED[layer, :, rank])) - set(np.flatnonzero(given_.owner_LE[layer] == rank))
            assert not within_slots or len(held) <= given_.slots_D[rank], f"rank {rank} has no room for {held}"
    quota_LED = quotas_of(plan, given_.expected_LED, given_.topology)
    assert quota_LED.dtype == np.float64
    assert (quota_LED >= 0).all()
    assert (quota_LED[~plan.where_LED] == 0).all(), "assignments are sent where the expert is not"
    np.testing.assert_allclose(quota_LED.sum(-1), given_.expected_LED.sum(-1), rtol=1e-9, atol=1e-9)
    return np.asarray(quota_LED.sum(1))
