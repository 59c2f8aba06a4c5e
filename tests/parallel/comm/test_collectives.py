"""The flat collectives against a plain gather and a plain sum, on random placements; several layers at once; the bytes they count."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from hecate.parallel.comm.collectives import (
    sparse_all_gather,
    sparse_all_gather_many,
    sparse_reduce_scatter,
)
from hecate.parallel.transfer.transfer_plan import plan_chunks
from hecate.parallel.values.layout import ChunkSize
from hecate.parallel.values.placement import Placement, owners_only
from testing.ranks import run_ranks
from tests.parallel.comm.collective_cases import Case, Counts, in_bytes, many_cases, ports_of, world_group
from tests.parallel.plain_gather_ports import gather_ports


def _each_alone(rank: int, world: int, cases: list[Case]) -> Counts:
    """Gather, reduce; what each sent to each peer."""
    group = world_group()
    counts = []
    for case in cases:
        gather = sparse_all_gather(case.chunks(case.owned(rank)), case.plan(rank), group)
        assert torch.equal(gather.wait(), case.chunks(case.held(rank)))
        assert gather.wait() is gather.wait()
        reduce = sparse_reduce_scatter(case.gradients(rank), case.plan(rank), group)
        total = reduce.wait()
        assert total.shape == (len(case.owned(rank)), case.numel)
        for row, expert in zip(total, case.owned(rank), strict=True):
            assert torch.equal(row, case.plain_sum(expert)), f"gradient of expert {expert}"
        counts.append((gather.bytes_to, reduce.bytes_to))
    return counts


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@settings(max_examples=2)
@given(data=st.data())
def test_collectives_equal_a_plain_gather_and_sum_and_count_every_byte(world: int, data: st.DataObject) -> None:
    cases = many_cases(data, world)
    counts = run_ranks(world, _each_alone, cases)
    for number, case in enumerate(cases):
        ports = gather_ports(case.placement.owner_E, case.placement.where_ED, case.topology, two_level=False)
        assert ports_of([of_rank[number][0] for of_rank in counts], case) == in_bytes(ports, case)
        assert ports_of([of_rank[number][1] for of_rank in counts], case) == in_bytes(ports.reversed(), case)


def _many_at_once(rank: int, world: int, cases: list[Case]) -> None:
    """The cases as layers, all of one dtype at once."""
    group = world_group()
    for dtype in sorted({case.dtype for case in cases}, key=str):
        layers = [case for case in cases if case.dtype == dtype]
        gathers = sparse_all_gather_many([(case.chunks(case.owned(rank)), case.plan(rank), None) for case in layers], group)
        for case, gather in list(zip(layers, gathers, strict=True))[::-1]:
            assert torch.equal(gather.wait(), case.chunks(case.held(rank)))
        alone = [sparse_all_gather(case.chunks(case.owned(rank)), case.plan(rank), group) for case in layers]
        assert [gather.bytes_to for gather in gathers] == [handle.bytes_to for handle in alone]
        assert all(handle.wait() is not None for handle in alone)
    assert sparse_all_gather_many([], group) == []


@pytest.mark.parametrize("world", [2, 4])
@settings(max_examples=2)
@given(data=st.data())
def test_many_layers_at_once_are_as_one_by_one(world: int, data: st.DataObject) -> None:
    cases = many_cases(data, world)
    run_ranks(world, _many_at_once, cases)


def _bytes_by_hand(rank: int, world: int) -> None:
    """Rank 0 owns two experts of three floats, rank 1 one of them; expert 0 goes to all, expert 2 to rank 0."""
    placement = Placement(np.array([0, 0, 1]), np.array([[1, 1, 1], [1, 0, 0], [1, 1, 0]], dtype=bool))
    plan = plan_chunks(placement, ChunkSize(3, 4), None, rank)
    owned = torch.ones(2 if rank == 0 else 1 if rank == 1 else 0, 3)
    assert sparse_all_gather(owned, plan, world_group()).bytes_to == [[0, 12, 12], [12, 0, 0], [0, 0, 0]][rank]
    grads = torch.ones(len(placement.experts_on(rank)), 3)
    assert sparse_reduce_scatter(grads, plan, world_group()).bytes_to == [[0, 12, 0], [12, 0, 0], [12, 0, 0]][rank]


def test_bytes_by_hand() -> None:
    run_ranks(3, _bytes_by_hand)


def _nothing_moves(rank: int, world: int) -> None:
    """Rank 1 is late to a collective in which nothing moves: nobody waits for it."""
    placement = owners_only(np.array([0, 1]), world)
    done = dist.new_group()
    if rank == 1:
        dist.barrier(group=done)
    plan = plan_chunks(placement, ChunkSize(4, 4), None, rank)
    handle = sparse_all_gather(torch.full((1, 4), float(rank)), plan, world_group())
    assert torch.equal(handle.wait(), torch.full((1, 4), float(rank)))
    assert handle.bytes_to == [0, 0]
    if rank == 0:
        dist.barrier(group=done)


def test_a_placement_in_which_nothing_moves_waits_for_nobody() -> None:
    run_ranks(2, _nothing_moves, timeout=30)


def _overlapping(rank: int, world: int) -> None:
    """Gathers in flight at once, waited for in another order on every rank."""
    group = world_group()
    rng = np.random.default_rng(3)
    cases = []
    for _ in range(4):
        replicas = tuple(map(tuple, (rng.random((6, world)) < 0.6).tolist()))
        cases.append(Case((0,) * world, tuple(rng.integers(0, world, 6).tolist()), replicas, 33, torch.float32))
    handles = [sparse_all_gather(case.chunks(case.owned(rank)), case.plan(rank), group) for case in cases]
    for number in np.random.default_rng(rank).permutation(len(cases)):
        assert torch.equal(handles[number].wait(), cases[number].chunks(cases[number].held(rank)))


def test_gathers_overlap() -> None:
    run_ranks(3, _overlapping)
