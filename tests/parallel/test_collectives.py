"""The two collectives against a plain gather and a plain sum, on random placements."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist

from hecate.parallel.collectives import sparse_all_gather, sparse_reduce_scatter
from hecate.parallel.placement import Placement
from tests.ranks import run_ranks

CASES = 40
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def random_placement(rng: np.random.Generator, experts: int, world: int) -> Placement:
    """Any owners, any replicas: ranks that own nothing and ranks that hold nothing included."""
    owner = rng.integers(0, rng.integers(1, world + 1), size=experts)
    where = rng.random((experts, world)) < rng.random()
    where[np.arange(experts), owner] = True
    return Placement(owner, where)


def chunk(expert: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(expert), dtype=torch.float64).to(dtype)


def gradient(expert: int, rank: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(1000 + 97 * expert + rank), dtype=torch.float64).to(dtype)


def _compare(rank: int, world: int, seed: int) -> int:
    rng = np.random.default_rng(seed)
    group = dist.group.WORLD
    assert group is not None
    for _ in range(CASES):
        experts, numel, dtype = int(rng.integers(1, 12)), int(rng.integers(1, 70)), DTYPES[rng.integers(len(DTYPES))]
        placement = random_placement(rng, experts, world)
        owned = [chunk(e, numel, dtype) for e in range(experts) if placement.owner_E[e] == rank]
        owned_nC = torch.stack(owned) if owned else torch.empty(0, numel, dtype=dtype)
        held = [e for e in range(experts) if placement.where_ED[e, rank]]

        gather = sparse_all_gather(owned_nC, placement, group)
        replicas = gather.wait()
        assert replicas.shape == (len(held), numel)
        for slot, expert in enumerate(held):
            assert torch.equal(replicas[slot], chunk(expert, numel, dtype)), f"expert {expert} in slot {slot}"
        copies = sum(int(placement.where_ED[e].sum()) - 1 for e in range(experts) if placement.owner_E[e] == rank)
        assert gather.bytes_sent == copies * numel * dtype.itemsize

        grads = [gradient(e, rank, numel, dtype) for e in held]
        grad_SC = torch.stack(grads) if grads else torch.empty(0, numel, dtype=dtype)
        total = sparse_reduce_scatter(grad_SC, placement, group).wait()
        owned_experts = [e for e in range(experts) if placement.owner_E[e] == rank]
        assert total.shape == (len(owned_experts), numel)
        for row, expert in enumerate(owned_experts):
            expected = torch.zeros(numel, dtype=dtype)
            for peer in range(world):
                if placement.where_ED[expert, peer]:
                    expected += gradient(expert, peer, numel, dtype)
            assert torch.equal(total[row], expected), f"gradient of expert {expert}"
    return CASES


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_collectives_equal_a_plain_gather_and_sum(world: int) -> None:
    assert run_ranks(world, _compare, 7 + world) == [CASES] * world


def _overlapping(rank: int, world: int) -> None:
    """Two gathers in flight at once, waited for in the other order."""
    group = dist.group.WORLD
    assert group is not None
    rng = np.random.default_rng(3)
    placements = [random_placement(rng, 6, world) for _ in range(2)]
    handles = []
    for placement in placements:
        owned = [chunk(e, 33, torch.float32) for e in range(6) if placement.owner_E[e] == rank]
        owned_nC = torch.stack(owned) if owned else torch.empty(0, 33)
        handles.append(sparse_all_gather(owned_nC, placement, group))
    for placement, handle in reversed(list(zip(placements, handles, strict=True))):
        for slot, expert in enumerate(placement.experts_on(rank)):
            assert torch.equal(handle.wait()[slot], chunk(int(expert), 33, torch.float32))


def test_gathers_overlap() -> None:
    run_ranks(3, _overlapping)
