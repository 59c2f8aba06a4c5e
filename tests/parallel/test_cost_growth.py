"""Costs grow with the quantities that cause them, on any machines, and no tokens are lost."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hecate.parallel.cluster.topology import Link, Topology
from hecate.parallel.cost.cost_model import ExecutionMode, LayerCost, LayerSeconds, Route
from hecate.parallel.cost.flows import flows
from testing.plain_flows import layer_seconds, rows_served


@dataclass
class Case:
    owner_E: np.ndarray
    where_ED: np.ndarray
    loads_ED: np.ndarray
    quota_ED: np.ndarray
    machines: Topology
    cost: LayerCost
    route: Route

    def seconds(self, *, rematerialize: bool = False, **arguments: object) -> LayerSeconds:
        given_ = (self.owner_E, self.where_ED, self.quota_ED, self.loads_ED, self.machines, self.cost)
        return layer_seconds(*given_, execution=ExecutionMode(rematerialize=rematerialize, route=self.route), **arguments)  # type: ignore[arg-type]

    def fastest_gather(self) -> float:
        given_ = (self.owner_E, self.where_ED, self.quota_ED, self.loads_ED, self.machines, self.cost)
        return float(layer_seconds(*given_).gather)


@st.composite
def cases(draw: st.DrawFn, max_nodes: int = 3) -> Case:
    world, experts = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    count = draw(st.integers(1, min(world, max_nodes)))
    nodes = tuple(draw(st.permutations([*range(count), *(rank % count for rank in range(world - count))])))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    owner = rng.integers(0, world, size=experts)
    where = rng.random((experts, world)) < rng.random()
    where[np.arange(experts), owner] = True
    tokens = rng.integers(0, 30, size=(experts, world)) * (rng.random((experts, world)) < 0.8) * 1.0
    share = rng.random((experts, world)) * where
    quota = tokens.sum(1, keepdims=True) * share / share.sum(1, keepdims=True)

    def rates(number: int) -> tuple[float, ...]:
        return tuple(np.exp(rng.normal(size=number)).tolist())

    near, far = Link(*rates(2)), Link(*rates(2))
    machines = Topology(
        nodes,
        rates(world),
        (1.0,) * world,
        near,
        far,
        port_bandwidth=rates(world),
        uplink_bandwidth=rates(count),
        nic_bandwidth=rates(world),
        memory_bandwidth=rates(world),
        overlap_slowdown=float(rng.uniform(1, 2)),
    )
    values = {f.name: float(np.exp(rng.normal())) for f in fields(LayerCost)}
    cost = LayerCost(**{**values, "top_k": int(rng.integers(1, 4)), "chunk_numel": int(rng.choice([1, 12])), "frozen_lifetime": 20.0})  # type: ignore[arg-type]
    return Case(owner, where, tokens, quota, machines, cost, draw(st.sampled_from(get_args(Route))))


PARTS = ("compute", "dispatch", "gather", "reduce", "exposed", "optimizer")


def assert_no_part_falls(before: LayerSeconds, after: LayerSeconds, parts: tuple[str, ...] = PARTS) -> None:
    for name in parts:
        assert float(getattr(after, name)) >= float(getattr(before, name)) * (1 - 1e-9), name


HIDING = ("non_moe_flops", "non_moe_backward", "frozen_lifetime")
GROWING = tuple(f.name for f in fields(LayerCost) if f.name not in ("top_k", "chunk_numel", *HIDING))


@pytest.mark.parametrize("name", GROWING)
@settings(max_examples=40)
@given(case=cases(), factor=st.floats(1.0, 10.0))
def test_more_bytes_or_flops_never_take_less_time(name: str, case: Case, factor: float) -> None:
    more = replace(case.cost, **{name: getattr(case.cost, name) * factor})
    assert_no_part_falls(case.seconds(), replace(case, cost=more).seconds())


@settings(max_examples=40)
@given(case=cases(), factor=st.floats(1.0, 10.0))
def test_more_attention_or_a_longer_life_hide_more(case: Case, factor: float) -> None:
    for name in HIDING:
        more = replace(case.cost, **{name: getattr(case.cost, name) * factor})
        assert_no_part_falls(replace(case, cost=more).seconds(), case.seconds())


RATES = ("port_bandwidth", "uplink_bandwidth", "nic_bandwidth", "memory_bandwidth")


@pytest.mark.parametrize("name", RATES)
@settings(max_examples=40)
@given(case=cases(), factor=st.floats(1.0, 10.0), data=st.data())
def test_a_slower_link_or_memory_never_takes_less_time(name: str, case: Case, factor: float, data: st.DataObject) -> None:
    """One of them alone."""
    values = list(getattr(case.machines, name))
    values[data.draw(st.integers(0, len(values) - 1))] /= factor
    slower = replace(case, machines=replace(case.machines, **{name: tuple(values)}))
    assert_no_part_falls(case.seconds(), slower.seconds())
    assert slower.fastest_gather() >= case.fastest_gather() * (1 - 1e-8)  # the reduction goes back by that route, which may suit it better


@settings(max_examples=40)
@given(case=cases(), factor=st.floats(1.0, 10.0))
def test_more_latency_or_a_slower_device_never_takes_less_time(case: Case, factor: float) -> None:
    before, machines = case.seconds(), case.machines
    for name in ("intra_node", "inter_node"):
        link = getattr(machines, name)
        slower = replace(machines, **{name: Link(link.bandwidth, link.latency * factor)})
        assert_no_part_falls(before, replace(case, machines=slower).seconds())
    slower = replace(machines, overlap_slowdown=min(2.0, machines.overlap_slowdown * factor))
    assert_no_part_falls(before, replace(case, machines=slower).seconds())
    # A slower device has the longer attention to hide behind, so that what is exposed may fall.
    slower = replace(machines, flops=(machines.flops[0] / factor, *machines.flops[1:]))
    assert_no_part_falls(before, replace(case, machines=slower).seconds(), ("compute", "dispatch", "gather", "reduce", "optimizer"))


@settings(max_examples=40)
@given(case=cases(), factor=st.floats(1.0, 10.0))
def test_more_tokens_of_the_same_kind_never_take_less_time(case: Case, factor: float) -> None:
    more = replace(case, loads_ED=case.loads_ED * factor, quota_ED=case.quota_ED * factor)
    assert_no_part_falls(case.seconds(), more.seconds())


@settings(max_examples=40)
@given(case=cases(), data=st.data())
def test_another_replica_never_takes_less_time_to_bring(case: Case, data: st.DataObject) -> None:
    """Flat. Over leaders another rank may become the leader, with less to hand on than the last one had."""
    case = replace(case, route="flat")
    where = case.where_ED.copy()
    where[data.draw(st.integers(0, where.shape[0] - 1)), data.draw(st.integers(0, where.shape[1] - 1))] = True
    # Dispatch may fall: once everything is everywhere no rank need ask the others.
    assert_no_part_falls(case.seconds(), replace(case, where_ED=where).seconds(), tuple(part for part in PARTS if part != "dispatch"))


@settings(max_examples=40)
@given(cases())
def test_gathering_again_never_takes_less_time(case: Case) -> None:
    assert_no_part_falls(case.seconds(), case.seconds(rematerialize=True))


@settings(max_examples=40)
@given(case=cases(), data=st.data())
def test_resident_frozen_parts_never_cost_more_than_absent_ones(case: Case, data: st.DataObject) -> None:
    """On every rank of one expert; part of a node may change who leads there."""
    resident = case.owner_E[:, None] == np.arange(case.where_ED.shape[1])
    resident[data.draw(st.integers(0, len(resident) - 1))] = True
    assert_no_part_falls(case.seconds(resident_ED=resident), case.seconds())


@settings(max_examples=40)
@given(case=cases(), move=st.floats(0.0, 1.0))
def test_rows_grow_with_the_assignments_behind_them(case: Case, move: float) -> None:
    """Some of rank 0's assignments served at the last rank in place of rank 0: no fewer rows there, no more here, none lost on the way."""
    world = case.where_ED.shape[1]
    if world == 1:
        return
    tokens = case.loads_ED
    quota = tokens.copy()
    quota[:, 0] -= move * tokens[:, 0]
    quota[:, -1] += move * tokens[:, 0]
    before = rows_served(flows(tokens, tokens, case.machines), tokens, case.cost, case.machines)
    after = rows_served(flows(tokens, quota, case.machines), tokens, case.cost, case.machines)
    assert after.computed_D[-1] >= before.computed_D[-1] * (1 - 1e-9)
    assert after.computed_D[0] <= before.computed_D[0] * (1 + 1e-9)
    assert after.computed_D.sum() >= before.computed_D.sum() * (1 - 1e-9)


@settings(max_examples=40)
@given(cases())
def test_rows_that_leave_arrive_and_are_no_more_than_assignments_or_tokens(case: Case) -> None:
    flow = flows(case.loads_ED, case.quota_ED, case.machines)
    found = rows_served(flow, case.loads_ED, case.cost, case.machines)
    sent, received = found.near[0] + found.far[0], found.near[1] + found.far[1]
    np.testing.assert_allclose(sent.sum(), received.sum(), rtol=1e-9, atol=1e-9)
    tokens_D = case.loads_ED.sum(0) / case.cost.top_k
    for rank, received_rows in enumerate(received.tolist()):
        assignments = (flow.near_served_ED + flow.far_served_ED)[:, rank].sum()
        others = tokens_D.sum() - tokens_D[rank]
        assert assignments / case.cost.top_k * (1 - 1e-9) <= received_rows <= min(assignments, others) * (1 + 1e-9) + 1e-9
        assert found.computed_D[rank] >= received_rows * (1 - 1e-9)


@settings(max_examples=40)
@given(cases(), st.booleans())
def test_layers_are_priced_one_by_one(case: Case, rematerialize: bool) -> None:
    """A layer and one with half the loads and no replicas, stacked."""
    own = case.owner_E[:, None] == np.arange(case.where_ED.shape[1])
    half = case.loads_ED / 2
    other = replace(case, where_ED=own, loads_ED=half, quota_ED=half.sum(1, keepdims=True) * own)
    stacked = {name: np.stack([getattr(case, name), getattr(other, name)]) for name in ("owner_E", "where_ED", "loads_ED", "quota_ED")}
    together = replace(case, **stacked).seconds(rematerialize=rematerialize)
    alone = [one.seconds(rematerialize=rematerialize) for one in (case, other)]
    for name in (*PARTS, "total"):
        np.testing.assert_allclose(getattr(together, name), [float(getattr(one, name)) for one in alone], rtol=1e-12)


@settings(max_examples=40)
@given(cases())
def test_the_total_is_what_cannot_be_hidden(case: Case) -> None:
    found = case.seconds()
    assert float(found.total) == pytest.approx(float(found.compute + found.dispatch + found.exposed + found.optimizer))
