"""The bytes that `benchmarks.planned_bytes` says experts take, by hand and against the transfer plans of all ranks."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.planned_bytes import gathered_numbers
from hecate.parallel.cost.cost_model import ExecutionMode, LayerCost, Route
from hecate.parallel.cost.flows import flows
from hecate.parallel.transfer.transfer_plan import ChunkPlan, plan_chunks_by
from hecate.parallel.values.layout import ChunkSize
from hecate.parallel.values.placement import Placement
from testing.plain_flows import even_quota, price_flow
from testing.unit_cases import unit_topology


@pytest.mark.parametrize(
    ("route", "expected"),
    [
        ("flat", [[0, 6, 6, 6, 6, 6], [0] * 6, [0] * 6, [0] * 6, [0] * 6, [0] * 6]),
        ("two_level", [[0, 6, 6, 6, 0, 0], [0] * 6, [0] * 6, [0, 0, 0, 0, 6, 6], [0] * 6, [0] * 6]),
        # Three slices of two numbers each, for as many leaders in node 1, and for two in node 0: of these rank 1 has slices 0 and 2.
        (
            "sliced",
            [[0, 4, 2, 2, 2, 2], [0, 0, 4, 0, 0, 0], [0, 2, 0, 0, 0, 0], [0, 0, 0, 0, 2, 2], [0, 0, 0, 2, 0, 2], [0, 0, 0, 2, 2, 0]],
        ),
    ],
)
def test_by_hand(route: Route, expected: list[list[int]]) -> None:
    """Six numbers of rank 0 for all six ranks of two nodes of three."""
    found = gathered_numbers(route, np.array([0]), np.ones((1, 6), dtype=bool), 6, (0, 0, 0, 1, 1, 1))
    assert found.tolist() == expected


@settings(max_examples=50)
@given(st.data(), st.lists(st.integers(0, 2), min_size=1, max_size=7), st.integers(1, 4), st.sampled_from([1, 6, 35, 12]))
def test_transfer_plans_and_the_cost_model_count_the_same(data: st.DataObject, nodes: list[int], experts: int, numel: int) -> None:
    numbered = sorted(set(nodes))
    topology = unit_topology([numbered.index(node) for node in nodes])
    world = topology.world_size
    owner_E = np.array(data.draw(st.lists(st.integers(0, world - 1), min_size=experts, max_size=experts)))
    row = st.lists(st.booleans(), min_size=world, max_size=world)
    where_ED = np.array(data.draw(st.lists(row, min_size=experts, max_size=experts))) | (owner_E[:, None] == np.arange(world))
    route: Route = data.draw(st.sampled_from(get_args(Route)))
    numbers_WW = gathered_numbers(route, owner_E, where_ED, numel, topology.node_of_rank)
    placement, chunk = Placement(owner_E.copy(), where_ED.copy()), ChunkSize(numel, 2)
    plans = [plan_chunks_by(route, placement, chunk, topology, rank) for rank in range(world)]
    assert sent_numbers(plans, back=False) == numbers_WW.tolist()
    assert sent_numbers(plans, back=True) == numbers_WW.T.tolist()

    loads_ED = np.ones(where_ED.shape)
    flow = flows(loads_ED, even_quota(where_ED, loads_ED, topology), topology)
    cost = LayerCost(trainable_bytes=2.0 * numel, chunk_numel=numel)
    ports = price_flow(owner_E, where_ED, flow, loads_ED, topology, cost, execution=ExecutionMode(route=route)).gathered
    near_WW = topology.same_node()
    assert (numel * ports.near_out_D).tolist() == pytest.approx((numbers_WW * near_WW).sum(1).tolist())
    assert (numel * ports.near_in_D).tolist() == pytest.approx((numbers_WW * near_WW).sum(0).tolist())
    assert (numel * ports.far_out_D).tolist() == pytest.approx((numbers_WW * ~near_WW).sum(1).tolist())
    assert (numel * ports.far_in_D).tolist() == pytest.approx((numbers_WW * ~near_WW).sum(0).tolist())


def sent_numbers(plans: list[ChunkPlan], *, back: bool) -> list[list[int]]:
    """What each rank sends to each other in all exchanges of a gather, or of a reduction."""
    exchanges = [plan.reduce if back else plan.gather for plan in plans]
    width = [plan.chunk.numel // plan.slices for plan in plans]
    return [(width[rank] * np.sum([e.sent.count_D for e in mine], axis=0)).tolist() for rank, mine in enumerate(exchanges)]
