"""Random cases for the collectives, and their expected results: chunks and gradients by number, plain sums, simulations of every copy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from hypothesis import strategies as st

from hecate.parallel.cluster.topology import Topology
from hecate.parallel.comm.collectives import sparse_reduce_scatter
from hecate.parallel.cost.cost_model import Route
from hecate.parallel.cost.gather_bytes import PortBytes
from hecate.parallel.transfer.transfer_plan import ChunkPlan, plan_chunks_by
from hecate.parallel.values.layout import ChunkSize
from hecate.parallel.values.placement import Placement
from testing.unit_cases import unit_topology

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
Counts = list[tuple[list[int], list[int]]]
"""for each case, the bytes that a rank has sent to each rank in a gather and in a reduction"""


def world_group() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group


@dataclass(frozen=True)
class Case:
    """A placement of few experts over the nodes' ranks; small enough to print."""

    nodes: tuple[int, ...]
    owners: tuple[int, ...]
    replicas: tuple[tuple[bool, ...], ...]
    """[experts][ranks], wherever the owners are"""
    numel: int
    dtype: torch.dtype

    @property
    def placement(self) -> Placement:
        where = np.array(self.replicas, dtype=bool)
        where[np.arange(len(self.owners)), self.owners] = True
        return Placement(np.array(self.owners), where)

    @property
    def topology(self) -> Topology:
        return unit_topology(self.nodes)

    def plan(self, rank: int, route: Route = "flat") -> ChunkPlan:
        return plan_chunks_by(route, self.placement, ChunkSize(self.numel, self.dtype.itemsize), self.topology, rank)

    @property
    def chunk_bytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def held(self, rank: int) -> list[int]:
        return [e for e, row in enumerate(self.replicas) if row[rank] or self.owners[e] == rank]

    def owned(self, rank: int) -> list[int]:
        return [e for e, owner in enumerate(self.owners) if owner == rank]

    def chunks(self, experts: Sequence[int]) -> torch.Tensor:
        """[len(experts), C]"""
        return self.rows([_random(expert, self.numel) for expert in experts])

    def gradients(self, rank: int) -> torch.Tensor:
        """[slots, C]: of the replicas on a rank."""
        return self.rows([self.gradient(expert, rank) for expert in self.held(rank)])

    def gradient(self, expert: int, rank: int) -> torch.Tensor:
        return _random(1000 + 97 * expert + rank, self.numel).to(self.dtype)

    def plain_sum(self, expert: int) -> torch.Tensor:
        """Of all replicas' gradients, rank by rank."""
        return _added([self.gradient(expert, rank) for rank in range(len(self.nodes)) if expert in self.held(rank)])

    def sum_over_leaders(self, expert: int) -> torch.Tensor:
        """Each other node's first, rank by rank; then the owner's node's ranks and the leaders, rank by rank."""
        owner = self.owners[expert]
        terms = {rank: self.gradient(expert, rank) for rank in range(len(self.nodes)) if expert in self.held(rank)}
        for node in sorted(set(self.nodes) - {self.nodes[owner]}):
            ranks = [rank for rank in terms if self.nodes[rank] == node]
            if ranks:
                leader = ranks[expert % len(ranks)]
                total = _added([terms.pop(rank) for rank in ranks])
                terms[leader] = total
        return _added([terms[rank] for rank in sorted(terms)])

    def rows(self, rows: list[torch.Tensor]) -> torch.Tensor:
        """[len(rows), C]"""
        return torch.stack(rows).to(self.dtype) if rows else torch.empty(0, self.numel, dtype=self.dtype)


@st.composite
def cases(draw: st.DrawFn, world: int) -> Case:
    """Nodes with ranks in any order, owners and replicas anywhere; ranks that own nothing and ranks that hold nothing included."""
    experts = draw(st.integers(1, 9))
    nodes = draw(st.lists(st.integers(0, 2), min_size=world, max_size=world))
    number = {node: index for index, node in enumerate(sorted(set(nodes)))}
    seed, density = draw(st.integers(0, 10**6)), draw(st.sampled_from((0.0, 0.3, 0.7, 1.0)))
    rng = np.random.default_rng(seed)
    owners = rng.integers(0, draw(st.integers(1, world)), size=experts)
    replicas = rng.random((experts, world)) < density
    return Case(
        tuple(number[node] for node in nodes),
        tuple(owners.tolist()),
        tuple(map(tuple, replicas.tolist())),
        draw(st.sampled_from((1, 2, 3, 5, 12, 64, 257))),
        draw(st.sampled_from(DTYPES)),
    )


def many_cases(data: st.DataObject, world: int) -> list[Case]:
    """For one run of several ranks, as starting them takes longer than many collectives."""
    return data.draw(st.lists(cases(world), min_size=15, max_size=30))


def ports_of(bytes_to_DD: Sequence[Sequence[int]], case: Case) -> dict[str, list[float]]:
    """What all ranks' counts [sender][receiver] say went through each rank's ports, by the names of `PortBytes`."""
    world = range(len(case.nodes))
    near = [[case.nodes[a] == case.nodes[b] for b in world] for a in world]
    return {
        "near_out_D": [sum(bytes_to_DD[rank][peer] for peer in world if near[rank][peer]) for rank in world],
        "near_in_D": [sum(bytes_to_DD[peer][rank] for peer in world if near[rank][peer]) for rank in world],
        "far_out_D": [sum(bytes_to_DD[rank][peer] for peer in world if not near[rank][peer]) for rank in world],
        "far_in_D": [sum(bytes_to_DD[peer][rank] for peer in world if not near[rank][peer]) for rank in world],
    }


def in_bytes(ports: PortBytes, case: Case) -> dict[str, list[float]]:
    """`ports` counts experts."""
    return {name: (getattr(ports, name) * case.chunk_bytes).tolist() for name in PortBytes.__dataclass_fields__}


def _random(seed: int, numel: int) -> torch.Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _added(terms: list[torch.Tensor]) -> torch.Tensor:
    total = torch.zeros_like(terms[0])
    for term in terms:
        total += term
    return total


def reduced(case: Case, rank: int, plan: ChunkPlan, sums: list[torch.Tensor]) -> list[int]:
    """Reduce by the plan's route, and return the bytes sent to each rank. Every rank must call it.

    The result is `sums`, the same a second time, and what the flat route gives within rounding.
    """
    reduce = sparse_reduce_scatter(case.gradients(rank), plan, world_group())
    total = reduce.wait()
    assert torch.equal(total, case.rows(sums))
    assert torch.equal(total, sparse_reduce_scatter(case.gradients(rank), plan, world_group()).wait())
    if case.dtype == torch.float64:
        flat = sparse_reduce_scatter(case.gradients(rank), case.plan(rank), world_group()).wait()
        assert torch.allclose(total, flat, rtol=0, atol=1e-12)
    return reduce.bytes_to
