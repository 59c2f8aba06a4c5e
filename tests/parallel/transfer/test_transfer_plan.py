"""Plans of transfers against a walk over every chunk and token: who sends what to whom, by which route, and which rows the tables name.

A plan is executed with plain arrays for all ranks in one process, so what is tested is that the tables alone bring every chunk to its slot
and every gradient to its owner.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hecate.parallel.cluster.topology import Link, Topology
from hecate.parallel.cost.cost_model import LayerCost, Route
from hecate.parallel.cost.flows import token_split
from hecate.parallel.planners import POLICIES, PlanInput
from hecate.parallel.transfer import transfer_plan
from hecate.parallel.transfer.transfer_plan import (
    ChunkPlan,
    SumTables,
    fused_gathers,
    plan_change,
    plan_chunks,
    plan_chunks_by,
    plan_tokens,
    plan_transfer,
)
from hecate.parallel.values.layout import ChunkSize
from hecate.parallel.values.placement import Placement, contiguous_owners, everything_everywhere, owners_only
from testing.unit_cases import unit_topology
from tests.parallel.plain_gather_ports import gather_ports

ROUTES: tuple[Route, ...] = ("flat", "two_level", "sliced")
NUMEL = 12
CHUNK = ChunkSize(NUMEL, 4)


@dataclass(frozen=True)
class Layer:
    topology: Topology
    placement: Placement
    loads_ED: np.ndarray
    quota_ED: np.ndarray | None


def topology(nodes: tuple[int, ...], near: float = 10.0, latency: float = 0.0) -> Topology:
    return unit_topology(nodes, near=Link(near, latency), far=Link(1.0, latency))


def everywhere_on_two_nodes() -> Layer:
    """Each leader sends on several chunks, and makes several sums."""
    owner_E = np.array([0, 0, 1, 2, 3])
    return Layer(topology((0, 0, 1, 1)), everything_everywhere(owner_E, 4), np.ones((5, 4)), None)


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    """A policy's plan for 1 to 4 ranks on one or two nodes; some experts idle, some ranks without tokens, some that own nothing."""
    world, experts = draw(st.integers(1, 4)), draw(st.integers(1, 7))
    nodes = (0, *draw(st.lists(st.integers(0, 1), min_size=world - 1, max_size=world - 1)))
    random = np.random.default_rng(draw(st.integers(0, 10**6)))
    owner_E = contiguous_owners(experts, world) if draw(st.booleans()) else random.integers(0, world, experts)
    loads_ED = random.integers(0, 40, (experts, world)) * (random.random((experts, 1)) < 0.8) * (random.random(world) < 0.8)
    cost = LayerCost(trainable_bytes=NUMEL * 4.0, row_bytes=4.0, assignment_flops=9.0, non_moe_flops=50.0, top_k=2)
    slots_D = random.integers(0, experts + 1, world)
    given_ = PlanInput(owner_E[None], loads_ED[None].astype(np.float64), topology(nodes), cost, slots_D)
    plan = POLICIES[draw(st.sampled_from(sorted(POLICIES)))](given_)
    return Layer(given_.topology, plan.placement(0), given_.expected_LED[0], None if plan.quota_LED is None else plan.quota_LED[0])


def plans_of(layer: Layer, route: Route) -> list[ChunkPlan]:
    """Of all ranks."""
    return [plan_chunks_by(route, layer.placement, CHUNK, layer.topology, rank) for rank in range(layer.topology.world_size)]


def chunk(expert: int) -> np.ndarray:
    return 100.0 * expert + np.arange(NUMEL)


def gradient(expert: int, rank: int) -> np.ndarray:
    return 1000.0 * (rank + 1) + chunk(expert)


def in_slices(rows: list[np.ndarray], slices: int) -> np.ndarray:
    return np.stack(rows).reshape(len(rows) * slices, -1) if rows else np.empty((0, NUMEL // slices))


def exchanged(plans: list[ChunkPlan], rows: list[np.ndarray], number: int, *, back: bool) -> list[np.ndarray]:
    """What each rank receives in an exchange in which each sends `rows`, by peer; both sides must count the same."""
    parts = [(plan.reduce if back else plan.gather)[number] for plan in plans]
    pieces = [np.split(sent, np.cumsum(part.sent.count_D)[:-1]) for sent, part in zip(rows, parts, strict=True)]
    received = []
    for rank, part in enumerate(parts):
        arriving = [pieces[peer][rank] for peer in range(len(plans))]
        assert [len(piece) for piece in arriving] == part.received.count_D
        assert part.idle == (not any(part_.sent.expert_M.size for part_ in parts))
        assert arriving[rank].size == 0, "a rank sends nothing to itself"
        received.append(np.concatenate(arriving))
    return received


@settings(max_examples=150)
@given(layers(), st.sampled_from(ROUTES))
@example(everywhere_on_two_nodes(), "two_level")
@example(everywhere_on_two_nodes(), "sliced")
def test_a_gather_brings_every_chunk_to_its_slot(layer: Layer, route: Route) -> None:
    plans = plans_of(layer, route)
    owned = [in_slices([chunk(e) for e in layer.placement.owned_by(plan.rank)], plan.slices) for plan in plans]
    arrived = [exchanged(plans, [rows[plan.tables.owned_row_M] for rows, plan in zip(owned, plans, strict=True)], 0, back=False)]
    if len(plans[0].gather) == 2:
        sent_on = [rows[plan.tables.sent_on_M] for rows, plan in zip(arrived[0], plans, strict=True)]
        arrived.append(exchanged(plans, sent_on, 1, back=False))
    for plan, own in zip(plans, owned, strict=True):
        held = [e for e in range(layer.placement.num_experts) if layer.placement.where_ED[e, plan.rank]]
        assert plan.tables.expert_S.tolist() == held
        replicas = np.full((len(held) * plan.slices, NUMEL // plan.slices), np.nan)
        replicas[plan.tables.own_slot_n] = own
        for rows, slot_M in zip(arrived, plan.tables.arrived_slot_M, strict=True):
            replicas[slot_M] = rows[plan.rank]
        assert replicas.reshape(len(held), NUMEL).tolist() == [chunk(e).tolist() for e in held]
        assert len(plan.tables.own_slot_n) + sum(map(len, plan.tables.arrived_slot_M)) == len(replicas), "a slot is filled twice"


def summed(sums: SumTables[np.ndarray], replicas: np.ndarray, arrived: list[np.ndarray]) -> np.ndarray:
    total = replicas[sums.own_slot_n]
    for term in sums.terms:
        rows = arrived[term.exchange][term.rows]
        if term.sums is None:
            total += rows
        else:
            assert len(set(term.sums.tolist())) == len(term.sums)
            total[term.sums] += rows
    return total


@settings(max_examples=150)
@given(layers(), st.sampled_from(ROUTES))
@example(everywhere_on_two_nodes(), "two_level")
@example(everywhere_on_two_nodes(), "sliced")
def test_a_reduction_brings_every_gradient_to_its_owner_once(layer: Layer, route: Route) -> None:
    plans = plans_of(layer, route)
    replicas = [in_slices([gradient(e, plan.rank) for e in plan.tables.expert_S.tolist()], plan.slices) for plan in plans]
    arrived = [exchanged(plans, [rows[plan.tables.grad_slot_M] for rows, plan in zip(replicas, plans, strict=True)], 0, back=True)]
    if len(plans[0].reduce) == 2:
        sums = [
            summed(plan.tables.leader_sums, rows, [arrived[0][plan.rank]])[plan.tables.leader_row_M]
            for rows, plan in zip(replicas, plans, strict=True)
        ]
        arrived.append(exchanged(plans, sums, 1, back=True))
    for plan, rows in zip(plans, replicas, strict=True):
        total = summed(plan.tables.owner_sums, rows, [part[plan.rank] for part in arrived])
        owned = layer.placement.owned_by(plan.rank).tolist()
        holders = {e: np.flatnonzero(layer.placement.where_ED[e]).tolist() for e in owned}
        wanted = [sum(gradient(e, rank) for rank in holders[e]).tolist() for e in owned]  # type: ignore[union-attr]
        assert total.reshape(len(owned), NUMEL).tolist() == wanted


@given(layers())
def test_sums_are_by_rank_ascending(layer: Layer) -> None:
    """Own terms come first where at most one other precedes them, as two terms may change places; else in their place."""
    for plan in plans_of(layer, "flat"):
        received, sums = plan.reduce[0].received, plan.tables.owner_sums
        peers = [peer for peer, _ in received.pieces]
        assert [received.pieces[number][1] for number in range(len(peers))] == [term.rows for term in sums.terms]
        before = sum(peer < plan.rank for peer in peers)
        assert sums.own_after == (None if before <= 1 else before)


@pytest.mark.parametrize("two_level", [False, True])
@given(layer=layers())
def test_a_plan_moves_the_bytes_that_gather_bytes_says(two_level: bool, layer: Layer) -> None:
    ports = gather_ports(layer.placement.owner_E, layer.placement.where_ED, layer.topology, two_level=two_level)
    node = layer.topology.node_of_rank
    for back, expected in ((False, ports), (True, ports.reversed())):
        counted = {name: np.zeros(layer.topology.world_size) for name in ("near_out_D", "near_in_D", "far_out_D", "far_in_D")}
        for plan in plans_of(layer, "two_level" if two_level else "flat"):
            for exchange in plan.reduce if back else plan.gather:
                for peer, count in enumerate(exchange.sent.count_D):
                    near = "near" if node[peer] == node[plan.rank] else "far"
                    counted[f"{near}_out_D"][plan.rank] += count
                    counted[f"{near}_in_D"][peer] += count
        for name, count_D in counted.items():
            assert count_D.tolist() == getattr(expected, name).tolist(), (name, back)


@given(layers())
def test_tokens_go_where_the_split_says(layer: Layer) -> None:
    for rank in range(layer.topology.world_size):
        loads = (None, None) if layer.quota_ED is None else (layer.loads_ED, layer.quota_ED)
        split_ED = token_split(layer.placement.where_ED, *loads, layer.topology, rank)
        plan = plan_tokens(layer.placement, split_ED)
        ends_ED = np.concatenate([plan.bound_EB, np.ones((len(split_ED), 1))], axis=1)
        np.testing.assert_allclose(np.diff(ends_ED, axis=1, prepend=0.0), split_ED, atol=1e-12)
        for peer, expert in np.ndindex(plan.slot_DE.shape):
            slot = plan.slot_DE[peer, expert]
            held = np.flatnonzero(layer.placement.where_ED[:, peer]).tolist()
            assert (slot == -1) == (expert not in held)
            assert slot == -1 or held[slot] == expert


def copied(placement: Placement) -> Placement:
    return Placement(placement.owner_E.copy(), placement.where_ED.copy())


@given(layers())
def test_equal_values_give_the_same_plan(layer: Layer) -> None:
    split_ED = token_split(layer.placement.where_ED, None, None, layer.topology, 0)
    again = Topology(*(getattr(layer.topology, name) for name in ("node_of_rank", "flops", "memory", "intra_node", "inter_node")))
    first = plan_transfer(layer.placement, split_ED, CHUNK, layer.topology, 0)
    second = plan_transfer(copied(layer.placement), split_ED.copy(), ChunkSize(*CHUNK), again, 0)
    assert second.chunks is first.chunks
    assert second.tokens is first.tokens
    assert (second, hash(second)) == (first, hash(first))
    others = [
        plan_transfer(everything_everywhere(layer.placement.owner_E, layer.topology.world_size), split_ED, CHUNK, layer.topology, 0),
        plan_transfer(layer.placement, None, CHUNK, layer.topology, 0),
        plan_transfer(layer.placement, split_ED, ChunkSize(NUMEL + 1, 4), layer.topology, 0),
    ]
    assert (others[0] == first) == bool(layer.placement.where_ED.all())
    assert first not in others[1:]


def test_caches_are_bounded() -> None:
    for cached in (plan_chunks, plan_change, transfer_plan._cached_tokens, fused_gathers):
        assert cached.cache_info().maxsize == transfer_plan.CACHED


def test_the_route_is_the_fastest() -> None:
    """Expert 0 of rank 0 everywhere, on two nodes of two ranks: over leaders it crosses the slow link once."""
    where_ED = np.array([[True] * 4, [False, True, False, False]])
    placement = Placement(np.array([0, 1]), where_ED)
    nodes = (0, 0, 1, 1)
    routes = [plan_chunks(placement, ChunkSize(numel, 4), topology(nodes), 0).route for numel in (7, 12)]
    assert routes == ["two_level", "sliced"], "a prime number of elements is not cut"
    assert plan_chunks(placement, CHUNK, None, 0).route == "flat"
    pair = everything_everywhere(np.array([0, 1]), 2)
    assert plan_chunks(pair, CHUNK, topology((0, 1)), 0).route == "flat", "a leader would have nobody to send on to"


def test_gathers_that_start_together() -> None:
    """Two flat layers share an exchange where a message's latency exceeds their bytes'; what goes over leaders travels alone, and first."""
    for latency, groups in ((1000.0, ((1,), (0, 2))), (0.0, ((1,), (0,), (2,)))):
        nodes = topology((0, 0, 1, 1), latency=latency)
        flat = plan_chunks_by("flat", owners_only(np.array([0, 1]), 4), CHUNK, nodes, 0)
        moving = plan_chunks_by("flat", Placement(np.array([0]), np.array([[True, True, False, False]])), CHUNK, nodes, 0)
        leaders = plan_chunks_by("two_level", everything_everywhere(np.array([0, 1]), 4), CHUNK, nodes, 0)
        assert (
            fused_gathers(
                (
                    moving,
                    leaders,
                    moving,
                )
            )
            == groups
        )
        assert fused_gathers((leaders,)) == ((0,),)
        assert fused_gathers(()) == ()
        assert (
            fused_gathers(
                (
                    flat,
                    flat,
                )
            )[0][0]
            == 0
        )


@given(layers(), st.integers(0, 10**6))
def test_a_change_of_placement_fetches_what_is_missing_and_nothing_else(layer: Layer, seed: int) -> None:
    before, world = layer.placement, layer.topology.world_size
    owned_ED = before.owner_E[:, None] == np.arange(world)
    after = Placement(before.owner_E.copy(), owned_ED | (np.random.default_rng(seed).random(owned_ED.shape) < 0.5))
    for rank in range(world):
        plans = [plan_chunks(placement, CHUNK, layer.topology, rank) for placement in (before, after)]
        change = plan_change(*plans)
        assert (change.missing.placement.where_ED & ~owned_ED).tolist() == (after.where_ED & ~before.where_ED).tolist()
        slots = np.full(plans[1].num_slots, -1)
        for source, (row_M, slot_M) in ((plans[0], change.kept), (change.missing, change.fetched)):
            slots[slot_M] = source.tables.expert_S[row_M]
        assert slots.tolist() == plans[1].tables.expert_S.tolist()
