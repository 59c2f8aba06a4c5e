"""Executed quotas and traffic against the shares of each source, one source after the other."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hecate.parallel.cluster.topology import Topology
from hecate.parallel.cost.flows import token_split
from testing.plain_flows import executed_flows, served
from testing.unit_cases import unit_topology

LAYERS, EXPERTS = 2, 3


@st.composite
def cases(draw: st.DrawFn) -> tuple[Topology, np.ndarray, np.ndarray | None, np.ndarray, np.ndarray]:
    """(topology, where, quota, planned loads, true loads) of two layers; many loads are zero, planned and true ones differ."""
    world = draw(st.integers(1, 5))
    nodes = (0, *draw(st.lists(st.integers(0, 1), min_size=world - 1, max_size=world - 1)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    shape = (LAYERS, EXPERTS, world)
    where = rng.random(shape) < draw(st.sampled_from([0.2, 0.6, 1.0]))
    where |= rng.integers(world, size=(LAYERS, EXPERTS))[..., None] == np.arange(world)
    planned, true = (rng.integers(0, 50, shape) * (rng.random(shape) < 0.6) for _ in range(2))
    quota = None
    if draw(st.booleans()):
        share = where * rng.random(shape) * (rng.random(shape) < 0.7) + where * 1e-3
        quota = planned.sum(-1, keepdims=True) * share / share.sum(-1, keepdims=True)
    return unit_topology(nodes), where, quota, planned.astype(float), true.astype(float)


@given(cases())
def test_all_sources_at_once_are_each_source_after_the_other(
    case: tuple[Topology, np.ndarray, np.ndarray | None, np.ndarray, np.ndarray],
) -> None:
    topo, where_LED, quota_LED, planned_LED, true_LED = case
    flow = executed_flows(where_LED, quota_LED, planned_LED, true_LED, topo)
    world, node = topo.world_size, topo.node_of_rank
    for layer in range(LAYERS):
        want = {name: np.zeros((EXPERTS, world)) for name in ("local", "near_sent", "near_served", "far_sent", "far_served")}
        for source in range(world):
            split_ED = token_split(where_LED[layer], planned_LED[layer], None if quota_LED is None else quota_LED[layer], topo, source)
            for expert in range(EXPERTS):
                for rank in range(world):
                    assignments = true_LED[layer, expert, source] * split_ED[expert, rank]
                    if rank == source:
                        want["local"][expert, rank] += assignments
                    else:
                        kind = "near" if node[rank] == node[source] else "far"
                        want[f"{kind}_sent"][expert, source] += assignments
                        want[f"{kind}_served"][expert, rank] += assignments
        for name, expected in want.items():
            np.testing.assert_allclose(getattr(flow, f"{name}_ED")[layer], expected, atol=1e-6, err_msg=name)
        total = want["local"] + want["near_served"] + want["far_served"]
        np.testing.assert_allclose(served(flow)[layer], total, atol=1e-6)


def test_shares_stay_when_loads_change_by_hand() -> None:
    """One expert on both ranks of a node. Rank 0 was to have 10 assignments, of which rank 1 serves 6; rank 1 was to have none.

    It comes to 20 and 10: rank 0 keeps 8 and sends 12, rank 1 keeps its own.
    """
    planned, true = np.array([[10.0, 0.0]]), np.array([[20.0, 10.0]])
    flow = executed_flows(np.ones((1, 2), dtype=bool), np.array([[4.0, 6.0]]), planned, true, unit_topology((0, 0)))
    assert served(flow).tolist() == [[8.0, 22.0]]
    assert flow.near_sent_ED.tolist() == [[12.0, 0.0]]
    assert flow.local_ED.tolist() == [[8.0, 10.0]]
