"""The layout without owners: any placement restored from slices, gradients back to slices, equal bytes for all."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hecate.parallel.placement import everything_everywhere
from hecate.parallel.sharded_layout import sharded_all_gather, sharded_reduce_scatter, slice_numel, slice_of
from tests.parallel.collective_cases import Case, many_cases
from tests.parallel.test_collectives import world_group
from tests.ranks import run_ranks


def _compare(rank: int, world: int, cases: list[Case]) -> list[list[int]]:
    group = world_group()
    counts = []
    for case in cases:
        experts = range(len(case.owners))
        width = slice_numel(case.numel, world)
        gather = sharded_all_gather(slice_of(case.chunks(experts), rank, world), case.placement, case.numel, group)
        replicas = gather.wait()
        assert torch.equal(replicas, case.chunks(case.held(rank)))
        assert replicas.is_contiguous()

        reduce = sharded_reduce_scatter(case.gradients(rank), case.placement, group)
        total = reduce.wait()
        assert total.shape == (len(experts), width)
        for expert in experts:
            mine = case.plain_sum(expert)[rank * width : (rank + 1) * width]
            assert torch.equal(total[expert][: len(mine)], mine)
            assert not total[expert][len(mine) :].any()
        counts.append(gather.bytes_to)
        assert sum(reduce.bytes_to) == (world - 1) * len(case.held(rank)) * width * case.dtype.itemsize
    return counts


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@settings(max_examples=2)
@given(data=st.data())
def test_any_placement_is_restored_from_slices(world: int, data: st.DataObject) -> None:
    cases = many_cases(data, world)
    counts = run_ranks(world, _compare, cases)
    for number, case in enumerate(cases):
        slice_bytes = slice_numel(case.numel, world) * case.dtype.itemsize
        for rank in range(world):
            # Whoever owns what: every rank sends each other rank a slice of all that is held there.
            assert counts[rank][number] == [0 if peer == rank else len(case.held(peer)) * slice_bytes for peer in range(world)]


@pytest.mark.parametrize(("numel", "world", "width"), [(1, 1, 1), (1, 4, 1), (8, 4, 2), (9, 4, 3), (2, 3, 1)])
def test_slices_are_equal_and_cover_the_chunk(numel: int, world: int, width: int) -> None:
    chunks = torch.arange(1, 2 * numel + 1).view(2, numel).float()
    slices = [slice_of(chunks, rank, world) for rank in range(world)]
    assert {tuple(s.shape) for s in slices} == {(2, width)}
    joined = torch.cat(slices, dim=1)
    assert torch.equal(joined[:, :numel], chunks)
    assert not joined[:, numel:].any()


def _balance(rank: int, world: int) -> int:
    """All experts at home on rank 0 and wanted everywhere: a flat gather would send all from rank 0."""
    placement = everything_everywhere(np.zeros(4, dtype=np.int64), world)
    return sharded_all_gather(torch.zeros(4, 2), placement, 8, world_group()).bytes_sent


def test_no_rank_sends_more_than_another() -> None:
    assert run_ranks(4, _balance) == [3 * 4 * 2 * 4] * 4
