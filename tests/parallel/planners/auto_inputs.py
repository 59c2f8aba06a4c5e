"""Inputs of every kind for planners, drawn at random or fixed."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from hecate.parallel.cluster.topology import Link, Topology
from hecate.parallel.cost.cost_model import HISTORY, ROUTE_NUMBERS, ExecutionMode, LayerCost, transfer_seconds
from hecate.parallel.cost.gather_bytes import PortBytes
from hecate.parallel.planners import PlanInput
from hecate.parallel.planners.policies.auto import plan_auto
from hecate.parallel.transfer.transfer_plan import fastest_route
from hecate.parallel.values.layout import ChunkSize
from hecate.parallel.values.placement import contiguous_owners

KINDS = {
    "full experts": LayerCost(
        trainable_bytes=4e6, chunk_numel=10**6, state_bytes=2.4e7, top_k=2, row_bytes=4096, assignment_flops=4e6, non_moe_flops=1e9
    ),
    "dense base": LayerCost(
        trainable_bytes=1e4,
        state_bytes=6e4,
        top_k=2,
        row_bytes=4096,
        row_flops=4e6,
        assignment_flops=1e4,
        assignment_backward=3.0,
        non_moe_flops=1e9,
        non_moe_backward=1.0,
    ),
    "frozen base": LayerCost(
        trainable_bytes=1e4,
        chunk_numel=2502,
        frozen_bytes=4e6,
        top_k=3,
        row_bytes=4096,
        assignment_flops=4e6,
        assignment_backward=1.0,
        non_moe_flops=1e8,
        non_moe_backward=1.0,
    ),
}


def topology(nodes: tuple[int, ...], seed: int = 0, slowdown: float = 1.2) -> Topology:
    """Devices and links that all differ."""
    random = np.random.default_rng(seed)
    world, num_nodes = len(nodes), max(nodes) + 1

    def some(count: int, around: float) -> tuple[float, ...]:
        return tuple((around * random.uniform(0.5, 2.0, count)).tolist())

    return Topology(
        nodes, some(world, 1e13), some(world, 1e10), Link(1e11, 1e-5), Link(1e10, 3e-5),
        port_bandwidth=some(world, 1e11),
        uplink_bandwidth=some(num_nodes, 1e10), nic_bandwidth=some(world, 1e10), overlap_slowdown=slowdown,
    )  # fmt: skip


@st.composite
def inputs(draw: st.DrawFn) -> PlanInput:
    world, experts, layers = draw(st.integers(1, 7)), draw(st.integers(1, 9)), draw(st.integers(1, 2))
    nodes = (0, *draw(st.lists(st.integers(0, 1), min_size=world - 1, max_size=world - 1)))
    random = np.random.default_rng(draw(st.integers(0, 10**6)))
    loads = random.integers(0, 500, (layers, world, experts)) * (random.random((layers, world, experts)) < draw(st.floats(0, 1)))
    owners = random.integers(0, world, (layers, experts)) if draw(st.booleans()) else np.stack([contiguous_owners(experts, world)] * layers)
    return PlanInput(
        owners,
        np.swapaxes(loads, 1, 2).astype(np.float64) if draw(st.booleans()) else None,
        topology(nodes, draw(st.integers(0, 99)), draw(st.floats(1, 2))),
        KINDS[draw(st.sampled_from(sorted(KINDS)))],
        random.integers(0, experts + 1, world),
        resident_LED=random.random((layers, experts, world)) < 0.2 if draw(st.booleans()) else None,
        max_imbalance=draw(st.none() | st.floats(1, 3)),
        execution=draw(executions()),
    )


def executions() -> st.SearchStrategy[ExecutionMode]:
    return st.builds(
        ExecutionMode,
        plan=st.sampled_from(["history", "calibrated", "exact"]),
        rematerialize=st.booleans(),
        prefetch=st.integers(0, 2),
        micro_steps=st.integers(1, 4),
        route=st.sampled_from(["fastest", "flat", "two_level", "sliced"]),
    )


def planned_and_priced() -> list[np.ndarray]:
    random = np.random.default_rng(5)
    results = []
    for number, (nodes, experts) in enumerate([((0, 1, 0, 1), 6), ((0, 0), 8), ((0, 0, 0, 1, 1, 2, 2), 33), ((0, 1), 1)]):
        place, world = topology(nodes), len(nodes)
        for cost in KINDS.values():
            given_ = PlanInput(
                np.stack([contiguous_owners(experts, world)] * 2),
                random.lognormal(3, 2, (2, experts, world)),
                place,
                cost,
                random.integers(0, experts + 1, world),
                max_imbalance=1.1 if number % 2 else None,
                resident_LED=random.random((2, experts, world)) < 0.2 if number > 1 else None,
                execution=ExecutionMode(plan="exact", rematerialize=True) if number > 1 else HISTORY,
            )
            plan = plan_auto(given_)
            assert plan.quota_LED is not None
            priced = plan.seconds(given_)
            results += [plan.where_LED, plan.quota_LED, priced.total, priced.gather, priced.dispatch]
            ports = PortBytes(*random.lognormal(3, 2, (4, world)))
            results.append(transfer_seconds(ports, 3.0, place))
            results.append(np.array(ROUTE_NUMBERS[fastest_route(plan.placement(0), ChunkSize(12, 4), place)]))
    return results


def drawn_input(seed: int) -> PlanInput:
    """One layer of some kind with 1 to 9 experts on 2 to 7 ranks."""
    random = np.random.default_rng(seed)
    world, experts = int(random.integers(2, 8)), int(random.integers(1, 10))
    loads = random.integers(1, 500, (1, experts, world)) * random.random((1, experts, world)) ** random.integers(0, 4)
    return PlanInput(
        random.integers(0, world, (1, experts)),
        loads,
        topology((0, *random.integers(0, 2, world - 1).tolist()), seed, random.uniform(1, 2)),
        KINDS[sorted(KINDS)[seed % 3]],
        random.integers(0, experts + 1, world),
        execution=ExecutionMode(
            plan=("history", "exact")[seed % 2], rematerialize=bool(random.integers(2)), prefetch=int(random.integers(3))
        ),
    )
