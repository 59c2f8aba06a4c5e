"""Placements by their invariants; the token split by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hecate.parallel.placement import Placement, contiguous_owners, owners_only, token_split
from hecate.parallel.topology import Link, Topology


def topology(*node_of_rank: int) -> Topology:
    world = len(node_of_rank)
    return Topology(node_of_rank, (1e9,) * world, (1e9,) * world, Link(1e9, 0.0), Link(1e8, 0.0))


@st.composite
def placements(draw: st.DrawFn) -> Placement:
    world = draw(st.integers(1, 6))
    owner = draw(st.lists(st.integers(0, world - 1), min_size=1, max_size=9))
    bits = draw(st.lists(st.lists(st.booleans(), min_size=world, max_size=world), min_size=len(owner), max_size=len(owner)))
    where = np.array(bits)
    where[np.arange(len(owner)), owner] = True
    return Placement(np.array(owner), where)


@given(placements())
def test_slots_and_experts_are_inverse(placement: Placement) -> None:
    for rank in range(placement.world_size):
        here, slot_of = placement.experts_on(rank), placement.slot_of_expert(rank)
        assert slot_of[here].tolist() == list(range(len(here)))
        assert here.tolist() == sorted(here)
        absent = set(range(placement.num_experts)) - set(here.tolist())
        assert all(slot_of[expert] == -1 for expert in absent)
        assert len(here) == placement.where_ED[:, rank].sum()


@given(placements())
def test_what_is_owned_and_sent_adds_up_to_what_is_held(placement: Placement) -> None:
    ranks = range(placement.world_size)
    assert sorted(e for rank in ranks for e in placement.owned_by(rank)) == list(range(placement.num_experts))
    for rank in ranks:
        arriving = [e for source in ranks for e in placement.sent(source, rank).tolist()]
        assert sorted([*arriving, *placement.owned_by(rank).tolist()]) == placement.experts_on(rank).tolist()
        assert len(placement.sent(rank, rank)) == 0


def test_everywhere() -> None:
    owner = np.array([0, 1])
    assert Placement(owner.copy(), np.array([[True, True], [True, True]])).everywhere
    assert not Placement(owner.copy(), np.array([[True, True], [False, True]])).everywhere
    assert owners_only(np.zeros(3, dtype=np.int64), 1).everywhere


def test_an_owner_must_hold_its_experts_and_exist() -> None:
    with pytest.raises(AssertionError, match="owner must hold"):
        Placement(np.array([0]), np.array([[False, True]]))
    with pytest.raises(AssertionError):
        Placement(np.array([2]), np.array([[True, True]]))
    with pytest.raises(AssertionError):
        Placement(np.array([0, 0]), np.array([[True, True]]))


def test_a_placement_cannot_be_changed() -> None:
    placement = owners_only(np.array([0, 1]), 2)
    with pytest.raises(ValueError, match="read-only"):
        placement.where_ED[0, 1] = True
    with pytest.raises(ValueError, match="read-only"):
        placement.owner_E[0] = 1


def test_owners_only_leaves_the_callers_owners_writable() -> None:
    owner = np.array([1, 0, 1])
    placement = owners_only(owner, 2)
    owner[0] = 0
    assert placement.where_ED.tolist() == [[False, True], [True, False], [False, True]]
    assert placement.owner_E.tolist() == [1, 0, 1]


@given(st.integers(1, 300), st.integers(1, 40))
def test_contiguous_owners_are_runs_of_almost_equal_length(experts: int, world: int) -> None:
    owner = contiguous_owners(experts, world)
    assert owner.dtype == np.int64
    assert owner.shape == (experts,)
    assert (np.diff(owner) >= 0).all()
    sizes = np.bincount(owner, minlength=world)
    assert len(sizes) == world
    assert sizes.max() - sizes.min() <= 1


def test_contiguous_owners_by_hand() -> None:
    assert contiguous_owners(8, 4).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert contiguous_owners(1, 3).tolist() == [0]


def test_token_split_by_hand() -> None:
    """Two nodes of two ranks, all experts owned by rank 0 but the last: who serves the tokens of rank 3?

    expert 0 on 0 only: must leave the node, one replica;  expert 1 on 0, 1: none near, evenly over both;
    expert 2 on 0, 2: its node has one;  expert 3 on 0, 2, 3: it is here;  expert 4 on all: it is here.
    """
    where = np.array([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1], [1, 1, 1, 1]], dtype=bool)
    placement = Placement(np.array([0, 0, 0, 0, 3]), where)
    split = token_split(placement, topology(0, 0, 1, 1), source=3)
    assert split.tolist() == [[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 1]]


def test_token_split_spreads_over_the_replicas_of_its_own_node() -> None:
    """Rank 0 shares node 0 with ranks 2 and 4; the replicas on 2 and 4 share its tokens, the one on 1 gets none."""
    placement = Placement(np.array([1]), np.array([[False, True, True, False, True]]))
    assert token_split(placement, topology(0, 1, 0, 1, 0), source=0).tolist() == [[0, 0, 0.5, 0, 0.5]]


@given(placements(), st.data())
def test_token_split_rows_sum_to_one_over_replicas(placement: Placement, data: st.DataObject) -> None:
    world = placement.world_size
    nodes = [0] + [data.draw(st.integers(0, 1)) for _ in range(world - 1)]
    for source in range(world):
        split = token_split(placement, topology(*nodes), source)
        assert split.dtype == np.float64
        np.testing.assert_allclose(split.sum(axis=1), 1.0, rtol=1e-12)
        assert (split[~placement.where_ED] == 0).all()
        for expert in range(placement.num_experts):
            near = [r for r in range(world) if placement.where_ED[expert, r] and nodes[r] == nodes[source]]
            serving = np.flatnonzero(split[expert]).tolist()
            if placement.where_ED[expert, source]:
                assert serving == [source]
            elif near:
                assert serving == near
            else:
                assert serving == np.flatnonzero(placement.where_ED[expert]).tolist()
