"""Quotas, flows and token splits against plain loops over the assignments, and by hand."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hecate.parallel.cluster.topology import Topology
from hecate.parallel.cost.flows import flows, nothing_travels, token_split
from testing.plain_flows import even_quota
from testing.unit_cases import unit_topology

CLOSE = {"rtol": 1e-9, "atol": 1e-9}


@dataclass
class Case:
    nodes: tuple[int, ...]
    where_ED: np.ndarray
    loads_ED: np.ndarray
    quota_ED: np.ndarray
    """any convex split over the replicas"""

    @property
    def topology(self) -> Topology:
        return unit_topology(self.nodes)

    @property
    def ranks(self) -> range:
        return range(len(self.nodes))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Nodes of any size with ranks in any order; experts somewhere, with any loads (often none), served by any of their replicas."""
    world, experts = draw(st.integers(1, 6)), draw(st.integers(1, 5))
    count = draw(st.integers(1, world))
    node = st.integers(0, count - 1)
    nodes = tuple(draw(st.permutations([*range(count), *draw(st.lists(node, min_size=world - count, max_size=world - count))])))
    rows = st.lists(st.booleans(), min_size=world, max_size=world).filter(any)
    where = np.array(draw(st.lists(rows, min_size=experts, max_size=experts)))
    load = st.lists(st.sampled_from([0, 0, 1, 2, 3, 7, 50]), min_size=world, max_size=world)
    tokens = np.array(draw(st.lists(load, min_size=experts, max_size=experts)), dtype=np.float64)
    shares = np.array(draw(st.lists(st.lists(st.integers(0, 4), min_size=world, max_size=world), min_size=experts, max_size=experts)))
    shares = shares * where
    shares[shares.sum(1) == 0] = where[shares.sum(1) == 0]
    return Case(nodes, where, tokens, tokens.sum(1, keepdims=True) * shares / shares.sum(1, keepdims=True))


def even_shares(case: Case, expert: int, source: int) -> dict[int, float]:
    """Who serves the assignments of a source: itself, or all replicas of its node alike, or all replicas alike."""
    holders = [rank for rank in case.ranks if case.where_ED[expert, rank]]
    near = [rank for rank in holders if case.nodes[rank] == case.nodes[source]]
    serving = [source] if source in holders else near or holders
    return {rank: 1 / len(serving) for rank in serving}


@given(cases())
def test_even_quotas_are_the_assignments_of_all_sources_added_up(case: Case) -> None:
    wanted = np.zeros(case.where_ED.shape)
    for expert in range(len(wanted)):
        for source in case.ranks:
            for rank, share in even_shares(case, expert, source).items():
                wanted[expert, rank] += case.loads_ED[expert, source] * share
    np.testing.assert_allclose(even_quota(case.where_ED, case.loads_ED, case.topology), wanted, **CLOSE)


def test_even_quotas_by_hand() -> None:
    """Nodes {0, 2} and {1, 3}; 6, 5, 4 and 3 assignments of each expert at ranks 0 to 3.

    expert 0 on 0: all 18.  expert 1 on 0 and 1: 0 keeps 6 and takes 2's 4; 1 keeps 5 and takes 3's 3.
    expert 2 on 0 and 2: each keeps its own; the 8 of the other node go half and half.  expert 3: everywhere.
    """
    where = np.array([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 1, 1]], dtype=bool)
    quota = even_quota(where, np.array([[6.0, 5.0, 4.0, 3.0]] * 4), unit_topology((0, 1, 0, 1)))
    assert quota.tolist() == [[18, 0, 0, 0], [10, 8, 0, 0], [10, 0, 8, 0], [6, 5, 4, 3]]


@given(cases())
def test_layers_are_treated_one_by_one(case: Case) -> None:
    """A layer and its mirror image, stacked, give what each gives alone."""
    where, tokens = (np.stack([table, table[:, ::-1]]) for table in (case.where_ED, case.loads_ED))
    quota = even_quota(where, tokens, case.topology)
    together = flows(tokens, quota, case.topology)
    for layer in range(2):
        np.testing.assert_allclose(quota[layer], even_quota(where[layer], tokens[layer], case.topology), **CLOSE)
        alone = flows(tokens[layer], quota[layer], case.topology)
        for name in alone.__dataclass_fields__:
            np.testing.assert_allclose(getattr(together, name)[layer], getattr(alone, name), **CLOSE)


@pytest.mark.parametrize("even", [True, False])
@given(case=cases())
def test_flows_conserve_tokens(even: bool, case: Case) -> None:
    """What a rank has stays, goes near or goes far; what it serves is its own or comes from near or far; what leaves arrives."""
    quota = even_quota(case.where_ED, case.loads_ED, case.topology) if even else case.quota_ED
    flow = flows(case.loads_ED, quota, case.topology)
    for name in flow.__dataclass_fields__:
        assert getattr(flow, name).min() >= 0, name
    np.testing.assert_allclose(flow.local_ED + flow.near_sent_ED + flow.far_sent_ED, case.loads_ED, **CLOSE)
    np.testing.assert_allclose(flow.local_ED + flow.near_served_ED + flow.far_served_ED, quota, **CLOSE)
    np.testing.assert_allclose(flow.far_sent_ED.sum(1), flow.far_served_ED.sum(1), **CLOSE)
    for node in set(case.nodes):
        ranks = [rank for rank in case.ranks if case.nodes[rank] == node]
        np.testing.assert_allclose(flow.near_sent_ED[:, ranks].sum(1), flow.near_served_ED[:, ranks].sum(1), **CLOSE)


@pytest.mark.parametrize("even", [True, False])
@given(case=cases())
def test_near_goes_before_far(even: bool, case: Case) -> None:
    """Nobody sends away what it could serve; no node sends an expert's assignments to others while others' come to it.

    Exactly, not nearly: a trace of far traffic left over by rounding would cost the latency of a whole exchange between nodes.
    """
    quota = even_quota(case.where_ED, case.loads_ED, case.topology) if even else case.quota_ED
    flow = flows(case.loads_ED, quota, case.topology)
    for expert in range(len(quota)):
        for rank in case.ranks:
            assert flow.local_ED[expert, rank] == pytest.approx(min(case.loads_ED[expert, rank], quota[expert, rank]), rel=1e-9)
            sends = flow.near_sent_ED[expert, rank] + flow.far_sent_ED[expert, rank]
            serves = flow.near_served_ED[expert, rank] + flow.far_served_ED[expert, rank]
            assert sends == 0 or serves == 0
        for node in set(case.nodes):
            ranks = [rank for rank in case.ranks if case.nodes[rank] == node]
            assert not flow.far_sent_ED[expert, ranks].any() or not flow.far_served_ED[expert, ranks].any()


def test_flows_by_hand() -> None:
    """Nodes {0, 2, 4} and {1, 3}; ranks 0 to 4 have 10, 2, 4, 6, 0 assignments and serve 4, 12, 1, 2, 3.

    Local 4, 2, 1, 2, 0. Left to send 6, 0, 3, 4, 0; left to serve 0, 10, 0, 0, 3. Node 0 has 9 to send and serves 3 itself, a third of
    each: 2 and 1 near, 4 and 2 far. Node 1 has 4 and serves 10: all 4 near, and 6 from afar.
    """
    flow = flows(np.array([[10.0, 2, 4, 6, 0]]), np.array([[4.0, 12, 1, 2, 3]]), unit_topology((0, 1, 0, 1, 0)))
    np.testing.assert_allclose(flow.local_ED, [[4, 2, 1, 2, 0]])
    np.testing.assert_allclose(flow.near_sent_ED, [[2, 0, 1, 4, 0]])
    np.testing.assert_allclose(flow.near_served_ED, [[0, 4, 0, 0, 3]])
    np.testing.assert_allclose(flow.far_sent_ED, [[4, 0, 2, 0, 0]])
    np.testing.assert_allclose(flow.far_served_ED, [[0, 6, 0, 0, 0]])


def test_on_one_node_nothing_is_far() -> None:
    """Ranks have 9, 1, 2 assignments and serve 3, 8, 1."""
    flow = flows(np.array([[9.0, 1, 2]]), np.array([[3.0, 8, 1]]), unit_topology((0, 0, 0)))
    assert flow.local_ED.tolist() == [[3, 1, 1]]
    assert flow.near_sent_ED.tolist() == [[6, 0, 1]]
    assert flow.near_served_ED.tolist() == [[0, 7, 0]]
    assert not flow.far_sent_ED.any()
    assert not flow.far_served_ED.any()


def test_even_quotas_inside_nodes_leave_no_trace_of_far_traffic() -> None:
    """A copy of each expert in each node, so that no assignment has to leave one; thirds and sevenths, which no float64 holds, included."""
    rng = np.random.default_rng(0)
    nodes = unit_topology([rank // 8 for rank in range(16)])
    for _ in range(20):
        where = rng.random((6, 16)) < 0.5
        where[:, [0, 8]] = True
        tokens = rng.integers(0, 50, size=where.shape) / 5  # as means over five steps are
        flow = flows(tokens, even_quota(where, tokens, nodes), nodes)
        assert not flow.far_sent_ED.any()
        assert not flow.far_served_ED.any()


def test_quotas_off_by_a_rounding_cause_no_traffic() -> None:
    """Each rank of two nodes serves its own assignments, but for an error of a planner's arithmetic."""
    tokens = np.array([[30.0, 20, 10, 5]])
    flow = flows(tokens, tokens + np.array([[1e-14, -1e-13, -1e-14, 1.1e-13]]), unit_topology((0, 0, 1, 1)))
    for travelling in (flow.near_sent_ED, flow.near_served_ED, flow.far_sent_ED, flow.far_served_ED):
        assert not travelling.any()


def split_of(case: Case, source: int, loads: np.ndarray | None, quota: np.ndarray | None) -> np.ndarray:
    return token_split(case.where_ED, loads, quota, case.topology, source)


@pytest.mark.parametrize("quotas", [True, False])
@given(case=cases())
def test_rows_of_a_token_split_sum_to_one_over_the_replicas(quotas: bool, case: Case) -> None:
    """Also for experts of which the source, or nobody, was expected to have an assignment."""
    for source in case.ranks:
        split = split_of(case, source, case.loads_ED, case.quota_ED) if quotas else split_of(case, source, None, None)
        assert split.dtype == np.float64
        assert split.min() >= 0
        np.testing.assert_allclose(split.sum(axis=1), 1.0, rtol=1e-12)
        assert (split[~case.where_ED] == 0).all()


@given(cases())
def test_the_split_without_quotas_is_that_of_topology_aware_dispatch(case: Case) -> None:
    for source in case.ranks:
        split = split_of(case, source, None, None)
        for expert in range(len(split)):
            wanted = even_shares(case, expert, source)
            assert split[expert].tolist() == pytest.approx([wanted.get(rank, 0.0) for rank in case.ranks], rel=1e-12)


@given(cases())
def test_even_quotas_give_the_even_split(case: Case) -> None:
    quota = even_quota(case.where_ED, case.loads_ED, case.topology)
    for source in case.ranks:
        got, wanted = split_of(case, source, case.loads_ED, quota), split_of(case, source, None, None)
        np.testing.assert_allclose(got, wanted, **CLOSE)


@given(cases(), st.sampled_from(["any", "even", None]), st.booleans())
def test_nothing_travels_exactly_when_every_source_keeps_all(case: Case, kind: str | None, everywhere: bool) -> None:
    case.where_ED = case.where_ED | everywhere
    even_ED = even_quota(case.where_ED, case.loads_ED, case.topology)
    planned = (None, None) if kind is None else (case.loads_ED, even_ED if kind == "even" else case.quota_ED)
    kept = all((split_of(case, source, *planned)[:, source] == 1).all() for source in case.ranks)
    assert nothing_travels(case.where_ED, *planned, case.topology) == kept


@given(cases())
def test_the_splits_of_all_sources_reproduce_the_quotas(case: Case) -> None:
    served = np.zeros(case.quota_ED.shape)
    for source in case.ranks:
        split = split_of(case, source, case.loads_ED, case.quota_ED)
        for expert in range(len(split)):
            served[expert] += case.loads_ED[expert, source] * split[expert]
    np.testing.assert_allclose(served, case.quota_ED, **CLOSE)


@given(cases())
def test_a_source_sends_near_and_far_what_flows_say(case: Case) -> None:
    flow = flows(case.loads_ED, case.quota_ED, case.topology)
    for source in case.ranks:
        sent_ED = split_of(case, source, case.loads_ED, case.quota_ED) * case.loads_ED[:, source, None]
        near = [rank for rank in case.ranks if case.nodes[rank] == case.nodes[source] and rank != source]
        far = [rank for rank in case.ranks if case.nodes[rank] != case.nodes[source]]
        np.testing.assert_allclose(sent_ED[:, source], flow.local_ED[:, source], **CLOSE)
        np.testing.assert_allclose(sent_ED[:, near].sum(1), flow.near_sent_ED[:, source], **CLOSE)
        np.testing.assert_allclose(sent_ED[:, far].sum(1), flow.far_sent_ED[:, source], **CLOSE)


@given(cases())
def test_an_expert_without_expected_assignments_has_the_even_split(case: Case) -> None:
    """Of the source: the quotas were made for others' assignments. Of all: quotas are zero."""
    for source in case.ranks:
        split, even = split_of(case, source, case.loads_ED, case.quota_ED), split_of(case, source, None, None)
        none = case.loads_ED[:, source] == 0
        np.testing.assert_array_equal(split[none], even[none])


def test_token_split_by_hand() -> None:
    """Two nodes of two ranks, all experts owned by rank 0 but the last: who serves the tokens of rank 3?

    expert 0 on 0 only: must leave the node, one replica;  expert 1 on 0, 1: none near, evenly over both;
    expert 2 on 0, 2: its node has one;  expert 3 on 0, 2, 3: it is here;  expert 4 on all: it is here.
    """
    where = np.array([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1], [1, 1, 1, 1]], dtype=bool)
    split = token_split(where, None, None, unit_topology((0, 0, 1, 1)), source=3)
    assert split.tolist() == [[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 1]]


def test_token_split_spreads_over_the_replicas_of_its_own_node() -> None:
    """Rank 0 shares node 0 with ranks 2 and 4; the replicas on 2 and 4 share its tokens, the one on 1 gets none."""
    where = np.array([[False, True, True, False, True]])
    assert token_split(where, None, None, unit_topology((0, 1, 0, 1, 0)), source=0).tolist() == [[0, 0, 0.5, 0, 0.5]]


def test_token_split_with_quotas_by_hand() -> None:
    """The flows by hand above: rank 0's 10 assignments are 4 here, 2 near (rank 4 alone serves for its node), 4 far (rank 1 alone).

    Rank 3's 6 are 2 here and 4 near, at rank 1. Rank 4 was expected to have none: over the replicas of its node as it is itself one.
    """
    where, loads, quota = np.ones((1, 5), dtype=bool), np.array([[10.0, 2, 4, 6, 0]]), np.array([[4.0, 12, 1, 2, 3]])
    wanted = {0: [0.4, 0.4, 0, 0, 0.2], 3: [0, 2 / 3, 0, 1 / 3, 0], 4: [0, 0, 0, 0, 1]}
    for source, row in wanted.items():
        np.testing.assert_allclose(token_split(where, loads, quota, unit_topology((0, 1, 0, 1, 0)), source), [row])
