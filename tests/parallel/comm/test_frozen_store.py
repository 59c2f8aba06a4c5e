"""Frozen parts travel as planned and arrive unchanged."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist

from hecate.parallel.comm.frozen_store import FrozenStore
from hecate.parallel.transfer.residency import Residency, frozen_move
from testing.ranks import run_ranks

NUMEL = 5
NONE = torch.empty(0, NUMEL)
CHUNK_BYTES = 4 * NUMEL


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
        asked: list[int] = []
        owned = np.flatnonzero(owner_E == rank).tolist()
        store = FrozenStore(owned, lambda expert, asked=asked: asked.append(expert) or frozen(expert), NONE, group)
        assert asked == owned, "no expert is made that the rank does not own"
        slots_D = rng.integers(0, experts, size=world)
        before = Residency.of_owners(owner_E, slots_D)
        for step in range(8):
            where_ED = before.owned_ED | (rng.random((experts, world)) < 0.3)
            if step == 3:
                after = before.change_owners(rng.integers(0, world, size=experts))
            elif step == 5:
                after = before.hold_for_now(np.ones((experts, world), dtype=bool))
            elif step == 6:
                after = before.evict()
            else:
                after = before.need(where_ED)
                foreign_ED = after.held_ED & ~after.owned_ED
                assert (foreign_ED.sum(0) <= np.maximum(slots_D, (where_ED & foreign_ED).sum(0))).all()
                totals[0] += int((where_ED & ~before.held_ED).sum())
                totals[1] += int((where_ED & before.held_ED & ~before.owned_ED).sum())
                totals[2] += int((foreign_ED & ~where_ED).sum())
            sent = store.bytes_sent
            move = frozen_move(before, after, rank)
            store.start(move)
            fresh_ED = after.held_ED & ~before.held_ED
            assert store.bytes_sent - sent == int(fresh_ED[before.owner_E == rank].sum()) * CHUNK_BYTES
            held = np.flatnonzero(after.held_ED[:, rank]).tolist()
            for expert, chunk in zip(held, store.chunks(held), strict=True):
                assert torch.equal(chunk, frozen(expert))
            for expert in move.dropped:
                with pytest.raises(KeyError):
                    store.chunks([expert])
            before = after
    return totals


@pytest.mark.parametrize("world", [1, 2, 3])
def test_any_placements(world: int) -> None:
    totals = run_ranks(world, _any_placements, 7 + world)
    assert all(found == totals[0] for found in totals)
    brought, there, idle = totals[0]
    assert world == 1 or min(brought, there, idle) > 10, "brought, found there, and kept though not needed"


def _no_collective(rank: int, world: int) -> None:
    """Only rank 0 makes a move in which nobody lacks anything: a collective would hang."""
    group = dist.group.WORLD
    assert group is not None
    store = FrozenStore([rank], frozen, NONE, group)
    before = Residency.of_owners(np.array([0, 1]), np.array([2, 2]))
    everywhere = before.need(np.ones((2, 2), dtype=bool))
    store.start(frozen_move(before, everywhere, rank))
    store.wait()
    if rank == 0:
        owners = everywhere.need(np.eye(2, dtype=bool))
        store.start(frozen_move(everywhere, owners, rank))
        store.start(frozen_move(owners, owners.need(np.ones((2, 2), dtype=bool)), rank))
        assert len(store.chunks([0, 1])) == 2


def test_what_nobody_needs_is_no_collective() -> None:
    run_ranks(2, _no_collective, timeout=20)


def _owned_are_not_copied(rank: int, world: int) -> None:
    group = dist.group.WORLD
    assert group is not None
    own = frozen(rank)
    store = FrozenStore([rank], lambda _: own, NONE, group)
    before = Residency.of_owners(np.array([0, 1]), np.array([2, 2]))
    store.start(frozen_move(before, before.need(np.ones((2, 2), dtype=bool)), rank))
    assert store.chunks([0, 1])[rank].data_ptr() == own.data_ptr()


def test_an_owners_replica_is_its_owned_part() -> None:
    run_ranks(2, _owned_are_not_copied)
