"""Compute what a step must send, from its plan and its actual routing: bytes between every two ranks, and tokens that each rank computes.

This is independent of the collectives, so that their counts can be checked against it.

Shapes: L layers, E experts, W ranks, T tokens of a rank, K assignments of a token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.gloo_steps import Shape
from hecate.parallel.cluster.topology import Topology
from hecate.parallel.comm.dispatch import destinations
from hecate.parallel.cost.cost_model import Route
from hecate.parallel.planners import LayerPlan, Plan, PlanInput
from hecate.parallel.transfer.transfer_plan import fastest_route
from hecate.parallel.values.layout import ChunkSize
from hecate.parallel.values.placement import Placement

INDEX = 8
"""the bytes of a slot, of a token's number and of a count of tokens"""
FLOAT = 4


@dataclass(frozen=True)
class RowBytes:
    """The bytes that travel for a token whose experts another rank computes."""

    inputs: int
    """of its row on the way there; the gradient that returns has as many"""
    outputs: int
    """of the result that returns; its gradient has as many"""
    weights: int
    """of its experts' weights; their gradients have as many"""
    top_k: int
    differentiable: bool = True
    """whether a gradient of rows or weights returns; False where nothing before the layer trains"""


def planned_traffic(
    given: PlanInput, plan: Plan, expert_LWTK: Sequence[Sequence[np.ndarray]], shape: Shape
) -> tuple[np.ndarray, np.ndarray]:
    """Compute the traffic of a step.

    Returns:
        int64 [W, W], the bytes of experts, gradients and tokens, forward and backward, from each rank to each other; and int64 [L, W], the
        distinct tokens that each rank computes in each layer.
    """
    sent_WW = np.zeros((given.world_size, given.world_size), dtype=np.int64)
    rows_LW = np.zeros((given.num_layers, given.world_size), dtype=np.int64)
    row = RowBytes(shape.hidden * FLOAT, shape.hidden * FLOAT, shape.top_k * FLOAT, shape.top_k)
    for layer, expert_WTK in enumerate(expert_LWTK):
        tokens_WW, rows_LW[layer] = token_bytes(plan.layer(given, layer), given.topology, expert_WTK, row)
        sent_WW += chunk_bytes(given, plan, layer) + tokens_WW
    return sent_WW, rows_LW


def chunk_bytes(given: PlanInput, plan: Plan, layer: int) -> np.ndarray:
    """Compute the bytes of a layer's experts and of their gradients from each rank to each other, int64 [W, W]."""
    where_ED, owner_E = plan.where_LED[layer], plan.owner_LE[layer]
    chunk = ChunkSize(given.cost.chunk_numel, int(given.cost.trainable_bytes) // given.cost.chunk_numel)
    route = fastest_route(Placement(owner_E.copy(), where_ED.copy()), chunk, given.topology)
    numbers_WW = gathered_numbers(route, owner_E, where_ED, chunk.numel, given.topology.node_of_rank)
    return numbers_WW * chunk.element_bytes + numbers_WW.T * (int(given.cost.reduced_bytes) // chunk.numel)


def token_bytes(plan: LayerPlan, topology: Topology, expert_WTK: Sequence[np.ndarray], row: RowBytes) -> tuple[np.ndarray, np.ndarray]:
    """Compute the bytes of a layer's tokens and of their gradients from each rank to each other, int64 [W, W], and the distinct tokens that
    each rank computes, int64 [W]."""
    world = topology.world_size
    sent_WW, rows_W = np.zeros((world, world), dtype=np.int64), np.zeros(world, dtype=np.int64)
    splits = [plan.split(topology, source) for source in range(world)]
    if all((split_EW[:, source] == 1).all() for source, split_EW in enumerate(splits)):  # no token leaves its rank
        return sent_WW, np.array([len(expert_TK) for expert_TK in expert_WTK])
    back = row.inputs + row.weights if row.differentiable else 0
    for source, (expert_TK, split_EW) in enumerate(zip(expert_WTK, splits, strict=True)):
        rank_TK = destinations(torch.from_numpy(expert_TK), torch.from_numpy(np.cumsum(split_EW, 1)[:, :-1])).numpy()
        for rank in range(world):
            rows = int((rank_TK == rank).any(1).sum())
            rows_W[rank] += rows
            if rank != source:
                counts = 2 * INDEX  # of rows, and of the assignments that they bring
                sent_WW[source, rank] += counts + rows * (row.inputs + row.weights + (row.top_k + 1) * INDEX + row.outputs)
                sent_WW[rank, source] += rows * (row.outputs + back)
    return sent_WW, rows_W


def gathered_numbers(route: Route, owner_E: np.ndarray, where_ED: np.ndarray, chunk_numel: int, node_of_rank: Sequence[int]) -> np.ndarray:
    """Count the numbers that each rank sends to each other in a SparseAllGather, int64 [W, W]; in a reduction they go the other way.

    Args:
        chunk_numel: the numbers of an expert.
    """
    world = len(node_of_rank)
    wanted = [[rank for rank in range(world) if where_D[rank] and rank != owner] for owner, where_D in zip(owner_E, where_ED, strict=True)]
    slices = 1
    if route == "sliced":
        most = max((sum(node_of_rank[d] == node for d in ranks) for ranks in wanted for node in node_of_rank), default=0)
        slices = max(number for number in range(1, max(most, 1) + 1) if chunk_numel % number == 0)
    numbers_WW = np.zeros((world, world), dtype=np.int64)
    for expert, ranks in enumerate(wanted):
        for number in range(expert * slices, (expert + 1) * slices):
            for source, target in _copies(route, number, int(owner_E[expert]), ranks, node_of_rank):
                numbers_WW[source, target] += chunk_numel // slices
    return numbers_WW


def _copies(route: Route, number: int, owner: int, wanted: Sequence[int], node_of_rank: Sequence[int]) -> Iterator[tuple[int, int]]:
    """From which rank to which each copy of an expert goes, or of a slice; its leader in a node is the (`number` modulo ranks)-th one."""
    for node in sorted(set(node_of_rank)):
        ranks = [rank for rank in wanted if node_of_rank[rank] == node]
        if not ranks:
            continue
        if route == "flat" or (route == "two_level" and node == node_of_rank[owner]):
            yield from ((owner, rank) for rank in ranks)
            continue
        leader = ranks[number % len(ranks)]
        yield owner, leader
        yield from ((leader, rank) for rank in ranks if rank != leader)
