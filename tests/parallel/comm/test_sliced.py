"""The collectives in slices against the flat ones and a plain walk: results, order of sums, bytes, and what the hot owner sends."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hecate.parallel.comm.collectives import sparse_all_gather
from hecate.parallel.transfer.routes import most_wanting, sliced_moves, slices_of
from testing.ranks import run_ranks
from tests.parallel.comm.collective_cases import Case, Counts, in_bytes, many_cases, ports_of, reduced, world_group


def slices_for(case: Case) -> int:
    return slices_of(case.numel, most_wanting(case.placement, case.topology))


def leaders_of(case: Case, expert: int, number: int) -> dict[int, list[int]]:
    """The leader of a slice in each node that wants its expert, and whom it serves, itself included."""
    led = {}
    for node in sorted(set(case.nodes)):
        ranks = [r for r in range(len(case.nodes)) if case.nodes[r] == node and r != case.owners[expert] and expert in case.held(r)]
        if ranks:
            led[ranks[(expert * slices_for(case) + number) % len(ranks)]] = ranks
    return led


def sum_in_slices(case: Case, expert: int) -> torch.Tensor:
    """Each slice: first each node's, rank by rank; then the owner's own and the leaders', rank by rank."""
    slices, owner = slices_for(case), case.owners[expert]
    pieces = {rank: case.gradient(expert, rank).chunk(slices) for rank in range(len(case.nodes)) if expert in case.held(rank)}
    total = []
    for number in range(slices):
        terms = {owner: pieces[owner][number]}
        for leader, ranks in leaders_of(case, expert, number).items():
            terms[leader] = sum((pieces[rank][number] for rank in ranks), torch.zeros_like(pieces[owner][number]))
        total.append(sum((terms[rank] for rank in sorted(terms)), torch.zeros_like(pieces[owner][number])))
    return torch.cat(total)


def bytes_by_walk(case: Case) -> list[list[int]]:
    """[sender][receiver]: of a gather, slice by slice."""
    world, slice_bytes = len(case.nodes), case.chunk_bytes // slices_for(case)
    sent = [[0] * world for _ in range(world)]
    for expert, owner in enumerate(case.owners):
        for number in range(slices_for(case)):
            for leader, ranks in leaders_of(case, expert, number).items():
                sent[owner][leader] += slice_bytes
                for rank in ranks:
                    sent[leader][rank] += slice_bytes * (rank != leader)
    return sent


def _in_slices(rank: int, world: int, cases: list[Case]) -> Counts:
    group = world_group()
    counts = []
    for case in cases:
        plan = case.plan(rank, "sliced")
        assert plan.slices == slices_for(case)
        gather = sparse_all_gather(case.chunks(case.owned(rank)), plan, group)
        assert torch.equal(gather.wait(), case.chunks(case.held(rank)))
        into = torch.full_like(gather.wait(), torch.nan)
        assert sparse_all_gather(case.chunks(case.owned(rank)), plan, group, into).wait() is into
        assert torch.equal(into, gather.wait())
        sums = [sum_in_slices(case, expert) for expert in case.owned(rank)]
        counts.append((gather.bytes_to, reduced(case, rank, plan, sums)))
    return counts


@pytest.mark.parametrize("world", [2, 3, 4])
@settings(max_examples=2)
@given(data=st.data())
def test_slices_equal_a_plain_gather_and_sum_and_count_every_byte(world: int, data: st.DataObject) -> None:
    cases = [*many_cases(data, world), Case((0,) * world, (1, 1, 0), ((True,) * world,) * 3, 12, torch.float64)]
    counts = run_ranks(world, _in_slices, cases)
    for number, case in enumerate(cases):
        slices = slices_for(case)
        gathered, reduced = ([of_rank[number][way] for of_rank in counts] for way in (0, 1))
        assert gathered == bytes_by_walk(case)
        assert reduced == [list(column) for column in zip(*gathered, strict=True)], "the same way back"
        exchanges = sliced_moves(case.placement, case.topology, slices)[1].gather
        planned = [in_bytes(moves.ports(case.topology), case) for moves in exchanges]
        together = {name: [(a + b) / slices for a, b in zip(planned[0][name], planned[1][name], strict=True)] for name in planned[0]}
        assert ports_of(gathered, case) == together


def test_a_hot_owner_sends_each_expert_once_by_hand() -> None:
    """One node; expert 0 of rank 0 everywhere, 12 doubles in three slices for ranks 1, 2 and 3, which hand theirs on twice."""
    case = Case((0, 0, 0, 0), (0,), ((True,) * 4,), 12, torch.float64)
    counts = run_ranks(4, _in_slices, [case])
    assert [of_rank[0][0] for of_rank in counts] == [[0, 32, 32, 32], [0, 0, 32, 32], [0, 32, 0, 32], [0, 32, 32, 0]]
    assert [of_rank[0][1] for of_rank in counts] == [[0, 0, 0, 0], [32, 0, 32, 32], [32, 32, 0, 32], [32, 32, 32, 0]]


@pytest.mark.parametrize(("numel", "most", "slices"), [(12, 3, 3), (12, 5, 4), (10, 4, 2), (7, 3, 1), (7, 7, 7), (1, 8, 1), (12, 0, 1)])
def test_chunks_are_cut_evenly(numel: int, most: int, slices: int) -> None:
    assert slices_of(numel, most) == slices
