"""Frozen parts are fetched once, stay while slots are free, and arrive unchanged."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist

from hecate.parallel.comm.frozen_store import FrozenStore, Residency
from hecate.parallel.placement import Placement, everything_everywhere
from testing.ranks import run_ranks

NUMEL = 5
NONE = torch.empty(0, NUMEL)


def rows(text: str) -> np.ndarray:
    """bool [experts, ranks] from words, one an expert: "10 01"."""
    return np.array([[mark == "1" for mark in word] for word in text.split()])


def residency(slots: list[int]) -> Residency:
    """Experts 0-3 on rank 0, 4 on rank 1."""
    return Residency(np.array([0, 0, 0, 0, 1]), np.array(slots))


def test_the_most_recently_wanted_stay_while_there_is_room() -> None:
    """Rank 1 keeps two of rank 0's experts."""
    places = residency([0, 2])
    steps = [
        ("11 10 10 10 01", "01 00 00 00 00", "11 10 10 10 01"),  # 0 comes
        ("10 11 10 10 01", "00 01 00 00 00", "11 11 10 10 01"),  # 1 comes, 0 has room
        ("11 10 10 10 01", "00 00 00 00 00", "11 11 10 10 01"),  # nothing has to come
        ("10 10 11 10 01", "00 00 01 00 00", "11 10 11 10 01"),  # 2 comes; 1 was wanted before 0 was
        ("10 11 11 11 01", "00 01 00 01 00", "10 11 11 11 01"),  # three are wanted: nothing else stays
        ("10 10 10 10 01", "00 00 00 00 00", "10 11 11 10 01"),  # of three wanted equally lately the highest index goes
    ]
    for number, (where, fresh, held) in enumerate(steps):
        assert (places.need(rows(where)) == rows(fresh)).all(), f"step {number}"
        assert (places.held_ED == rows(held)).all(), f"step {number}"


def test_borrowing_everything_leaves_what_was_wanted_last() -> None:
    places = residency([1, 2])
    places.need(rows("10 10 10 11 01"))
    places.need(rows("10 11 10 10 01"))
    assert (places.hold_for_now(np.ones((5, 2), dtype=bool)) == rows("01 00 01 00 10")).all()
    assert places.held_ED.all()
    places.evict()
    assert (places.held_ED == rows("10 11 10 11 11")).all(), "rank 0 has room for one, rank 1 for two"


def test_an_expert_that_leaves_its_rank_stays_as_a_replica() -> None:
    places = residency([1, 1])
    places.need(rows("11 10 10 10 01"))
    fresh_ED = places.change_owners(np.array([1, 1, 0, 0, 1]))
    assert (fresh_ED == rows("00 01 00 00 00")).all(), "0 was there already"
    assert (places.held_ED == rows("11 01 10 10 01")).all(), "rank 0 keeps one of the two that left it"


def frozen(expert: int) -> torch.Tensor:
    return torch.full((NUMEL,), float(expert), dtype=torch.float32) + torch.arange(NUMEL) / 8


def _any_placements(rank: int, world: int, seed: int) -> list[int]:
    rng = np.random.default_rng(seed)
    group = dist.group.WORLD
    assert group is not None
    totals = [0, 0, 0]
    for _ in range(6):
        experts = int(rng.integers(1, 8))
        owner_E = rng.integers(0, world, size=experts)
        slots_D = rng.integers(0, experts, size=world)
        asked: list[int] = []
        store = FrozenStore(owner_E, slots_D, lambda expert, asked=asked: asked.append(expert) or frozen(expert), NONE, group)
        assert asked == np.flatnonzero(owner_E == rank).tolist(), "no expert is made that the rank does not own"
        for step in range(8):
            before, sent = store.resident_ED, store.bytes_sent
            where_ED = (owner_E[:, None] == np.arange(world)) | (rng.random((experts, world)) < 0.3)
            placement = Placement(owner_E, where_ED)
            if step == 5:
                store.gather_for_now(everything_everywhere(owner_E, world))
                assert [int(c[0]) for c in store.chunks()] == list(range(experts))
                store.evict()
                continue
            if step == 3:
                new_E = rng.integers(0, world, size=experts)
                moved = store.change_owners(new_E)
                assert moved == int(((new_E[:, None] == np.arange(world)) & ~before).sum()) * 4 * NUMEL
                owner_E = new_E
                continue
            store.gather(placement)
            store.gather(placement)  # as every micro-step does
            for expert, chunk in zip(placement.experts_on(rank), store.chunks(), strict=True):
                assert torch.equal(chunk, frozen(int(expert)))
            fresh_ED = where_ED & ~before
            totals[0] += int(fresh_ED.sum())
            totals[1] += int((where_ED & before & (owner_E[:, None] != np.arange(world))).sum())
            assert store.bytes_sent - sent == int(fresh_ED[owner_E == rank].sum()) * 4 * NUMEL
            foreign_ED = store.resident_ED & (owner_E[:, None] != np.arange(world))
            assert (foreign_ED.sum(0) <= np.maximum(slots_D, (where_ED & foreign_ED).sum(0))).all()
            assert store.replica_bytes == int(foreign_ED[:, rank].sum()) * 4 * NUMEL
            all_ranks: list[list[list[bool]]] = [[]] * world
            dist.all_gather_object(all_ranks, store.resident_ED.tolist())
            assert all(theirs == all_ranks[0] for theirs in all_ranks)
            totals[2] += int((foreign_ED & ~where_ED).sum())
    return totals


@pytest.mark.parametrize("world", [1, 2, 3])
def test_any_placements(world: int) -> None:
    totals = run_ranks(world, _any_placements, 7 + world)
    assert all(found == totals[0] for found in totals)
    brought, there, idle = totals[0]
    assert world == 1 or min(brought, there, idle) > 10, "brought, found there, and kept though not wanted"


def _no_collective(rank: int, world: int) -> None:
    """Only rank 0 asks for what all have: a collective would hang."""
    group = dist.group.WORLD
    assert group is not None
    store = FrozenStore(np.array([0, 1]), np.array([2, 2]), frozen, NONE, group)
    everywhere = everything_everywhere(np.array([0, 1]), world)
    store.gather(everywhere)
    store.chunks()
    if rank == 0:
        store.gather(Placement(np.array([0, 1]), np.eye(2, dtype=bool)))
        store.gather(everything_everywhere(np.array([0, 1]), world))
        assert len(store.chunks()) == 2


def test_what_nobody_needs_is_no_collective() -> None:
    run_ranks(2, _no_collective, timeout=20)


def _owned_are_not_copied(rank: int, world: int) -> None:
    group = dist.group.WORLD
    assert group is not None
    own = frozen(rank)
    store = FrozenStore(np.array([0, 1]), np.array([2, 2]), lambda _: own, NONE, group)
    store.gather(everything_everywhere(np.array([0, 1]), world))
    assert store.chunks()[rank].data_ptr() == own.data_ptr()


def test_an_owners_replica_is_its_owned_part() -> None:
    run_ranks(2, _owned_are_not_copied)


def _an_equal_placement(rank: int, world: int) -> None:
    """Each step brings a new object for the same placement; only rank 0 goes on to a last one, which a collective would not survive."""
    group = dist.group.WORLD
    assert group is not None
    owner_E = np.array([0, 1, 1])
    store = FrozenStore(owner_E, np.array([1, 1]), frozen, NONE, group)
    needed = []
    with pytest.MonkeyPatch.context() as patch:
        real = Residency.need
        patch.setattr(Residency, "need", lambda self, where_ED: needed.append(1) or real(self, where_ED))
        for _ in range(3 if rank else 4):
            store.gather(Placement(owner_E.copy(), np.array([[True, True], [False, True], [False, True]])))
            store.chunks()
    assert len(needed) == 1, "the placement was taken for another one"
    assert store.bytes_sent == (4 * NUMEL if rank == 0 else 0)


def test_an_equal_placement_in_a_new_object_changes_nothing() -> None:
    run_ranks(2, _an_equal_placement, timeout=20)
