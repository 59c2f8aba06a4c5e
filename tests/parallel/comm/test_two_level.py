"""The collectives over leaders against the flat ones and a plain walk: results, order of sums, bytes, and that no rank waits needlessly."""

from __future__ import annotations

from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from hecate.parallel.comm.collectives import sparse_all_gather, sparse_reduce_scatter
from testing.ranks import run_ranks
from tests.parallel.comm.collective_cases import Case, Counts, in_bytes, many_cases, ports_of, reduced, world_group
from tests.parallel.plain_gather_ports import gather_ports

EVERYWHERE = ((True,) * 4,) * 5
TWO_NODES = Case((0, 1, 0, 1), (0, 1, 2, 3, 0), EVERYWHERE, 7, torch.float64)
"""ranks of a node are not adjacent"""


def _over_leaders(rank: int, world: int, cases: list[Case]) -> Counts:
    group = world_group()
    counts = []
    for case in cases:
        plan = case.plan(rank, "two_level")
        gather = sparse_all_gather(case.chunks(case.owned(rank)), plan, group)
        assert torch.equal(gather.wait(), case.chunks(case.held(rank)))
        sums = [case.sum_over_leaders(expert) for expert in case.owned(rank)]
        counts.append((gather.bytes_to, reduced(case, rank, plan, sums)))
    return counts


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@settings(max_examples=2)
@given(data=st.data())
def test_over_leaders_equals_a_plain_gather_and_sum_and_counts_every_byte(world: int, data: st.DataObject) -> None:
    cases = many_cases(data, world)
    counts = run_ranks(world, _over_leaders, cases)
    for number, case in enumerate(cases):
        ports = gather_ports(case.placement.owner_E, case.placement.where_ED, case.topology, two_level=True)
        assert ports_of([of_rank[number][0] for of_rank in counts], case) == in_bytes(ports, case)
        assert ports_of([of_rank[number][1] for of_rank in counts], case) == in_bytes(ports.reversed(), case)


def test_an_expert_crosses_once_by_hand() -> None:
    """Nodes {0, 2} and {1, 3}; expert 4 of rank 0 everywhere, 7 doubles. Its leader in node 1 is the 4 % 2 = 0th of 1 and 3."""
    nowhere = ((False,) * 4,) * 4
    case = Case((0, 1, 0, 1), (0, 0, 0, 0, 0), (*nowhere, (True,) * 4), 7, torch.float64)
    counts = run_ranks(4, _over_leaders, [case])
    assert [of_rank[0][0] for of_rank in counts] == [[0, 56, 56, 0], [0, 0, 0, 56], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert [of_rank[0][1] for of_rank in counts] == [[0, 0, 0, 0], [56, 0, 0, 0], [56, 0, 0, 0], [0, 56, 0, 0]]


def _leaders_do_something_else(rank: int, world: int) -> None:
    """Ranks 0 and 1 wait for their collectives only when the others have theirs, which need 0 and 1 as leaders."""
    group, others = world_group(), dist.new_group(timeout=timedelta(seconds=20))
    case = TWO_NODES
    plan = case.plan(rank, "two_level")
    gather = sparse_all_gather(case.chunks(case.owned(rank)), plan, group)
    if rank in (0, 1):
        dist.barrier(group=others)
    assert torch.equal(gather.wait(), case.chunks(case.held(rank)))
    if rank in (2, 3):
        dist.barrier(group=others)
    reduce = sparse_reduce_scatter(case.gradients(rank), plan, group)
    if rank in (0, 1):
        dist.barrier(group=others)
    assert torch.equal(reduce.wait(), case.rows([case.sum_over_leaders(expert) for expert in case.owned(rank)]))
    if rank in (2, 3):
        dist.barrier(group=others)


def test_a_leader_hands_on_without_being_waited_for() -> None:
    run_ranks(4, _leaders_do_something_else, timeout=60)


def _in_any_order(rank: int, world: int) -> None:
    """Many under way at once, waited for in another order on every rank."""
    group = world_group()
    rng = np.random.default_rng(5)
    cases = []
    for numel in rng.integers(1, 20_000, size=12).tolist():
        replicas = tuple(map(tuple, (rng.random((6, world)) < 0.8).tolist()))
        cases.append(Case((1, 0, 0, 1), tuple(rng.integers(0, world, 6).tolist()), replicas, numel, torch.float32))
    plans = [case.plan(rank, "two_level") for case in cases]
    gathers, reductions = [], []
    for case, plan in zip(cases, plans, strict=True):
        gathers.append(sparse_all_gather(case.chunks(case.owned(rank)), plan, group))
        reductions.append(sparse_reduce_scatter(case.gradients(rank), plan, group))
    for number in np.random.default_rng(rank).permutation(len(cases)):
        case = cases[number]
        assert torch.equal(reductions[number].wait(), case.rows([case.sum_over_leaders(e) for e in case.owned(rank)]))
        assert torch.equal(gathers[number].wait(), case.chunks(case.held(rank)))


def test_many_under_way_at_once_may_be_waited_for_in_any_order() -> None:
    run_ranks(4, _in_any_order)


def _one_leaves(rank: int, world: int) -> bool:
    case = TWO_NODES
    plan = case.plan(rank, "two_level")
    if rank == 0:
        dist.destroy_process_group()
        return True
    gather = sparse_all_gather(case.chunks(case.owned(rank)), plan, world_group())
    with pytest.raises(RuntimeError):
        gather.wait()
    return True


def test_a_lost_rank_is_an_error_of_those_that_wait() -> None:
    assert run_ranks(4, _one_leaves, timeout=30) == [True] * 4
