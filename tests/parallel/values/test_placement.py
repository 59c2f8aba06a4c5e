"""Placements by their invariants."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hecate.parallel.values.placement import Placement, contiguous_owners, everything_everywhere, owners_only, redealt_owners


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
def test_each_expert_has_one_owner_which_holds_it(placement: Placement) -> None:
    ranks = range(placement.world_size)
    assert sorted(e for rank in ranks for e in placement.owned_by(rank)) == list(range(placement.num_experts))
    assert all(set(placement.owned_by(rank)) <= set(placement.experts_on(rank)) for rank in ranks)


@given(placements())
def test_placements_are_equal_by_value(placement: Placement) -> None:
    again = Placement(placement.owner_E.copy(), placement.where_ED.copy())
    assert (again, hash(again)) == (placement, hash(placement))
    fewer = Placement(placement.owner_E.copy(), placement.owner_E[:, None] == np.arange(placement.world_size))
    assert (fewer == placement) == bool((fewer.where_ED == placement.where_ED).all())
    moved = Placement((placement.owner_E + 1) % placement.world_size, np.ones_like(placement.where_ED))
    assert (moved == everything_everywhere(placement.owner_E, placement.world_size)) == (placement.world_size == 1)
    assert placement != 1


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


def test_everything_everywhere_leaves_the_callers_owners_writable() -> None:
    owner = np.array([1, 0, 1])
    placement = everything_everywhere(owner, 2)
    owner[0] = 0
    assert placement.where_ED.tolist() == [[True, True]] * 3
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


@given(st.lists(st.lists(st.integers(-1, 7), min_size=1, max_size=9), min_size=1, max_size=5), st.integers(1, 6))
def test_redealt_owners_are_even_and_move_no_more_than_they_must(holders: list[list[int]], world: int) -> None:
    before = [np.array(holder_E) for holder_E in holders]
    after = redealt_owners(before, world)
    owned_D = np.bincount(np.concatenate(after), minlength=world)
    assert len(owned_D) == world
    assert owned_D.max() - owned_D.min() <= 1
    held = np.concatenate(before)
    here = (held >= 0) & (held < world)
    # Who keeps the most it may of what it holds loses only what is beyond its share.
    kept = (held == np.concatenate(after)) & here
    most = -(-len(held) // world)
    surplus = np.maximum(np.bincount(held[here], minlength=world) - (most - 1), 0).sum()
    assert (here & ~kept).sum() <= surplus
    assert all((np.array(holder_E) == old_E).all() for holder_E, old_E in zip(holders, before, strict=True)), "arguments are left alone"


def test_redealt_owners_by_hand() -> None:
    """Rank 3 of four is gone; then a fourth comes back."""
    shrunk = redealt_owners([np.array([0, 1, 2, 3]), np.array([0, 1, 2, 3])], 3)
    assert [owner_E.tolist() for owner_E in shrunk] == [[0, 1, 2, 0], [0, 1, 2, 1]]
    grown = redealt_owners(shrunk, 4)
    assert [owner_E.tolist() for owner_E in grown] == [[0, 1, 2, 3], [0, 1, 2, 3]]
