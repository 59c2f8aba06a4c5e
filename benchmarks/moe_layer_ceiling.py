"""The most that moving experts in place of tokens can win in a layer of LoRA over a dense base, at rates that were measured.

Expert parallelism waits for the rank with the most work, and for the tokens that travel to it: a row goes there and back, in the forward
and in the backward pass. Without travelling tokens each rank computes each of its own tokens once, which no plan can undercut, as all
ranks have as many. Experts' parameters are gathered and their gradients reduced beside the attention's GEMMs, so of that only what
lasts longer is counted. Nothing else is: no planning, no copies in memory, no latency.

Shapes: T tokens of a rank, K choices of a token, W ranks, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hecate.parallel.cost_model import LayerCost
from hecate.parallel.placement import contiguous_owners


@dataclass(frozen=True)
class Rates:
    """What this machine does while all ranks do it."""

    flops: float
    """a second, of a rank's GEMMs of the layer's shape"""
    bytes_per_s: float
    """each way, of rows that ranks exchange"""


@dataclass(frozen=True)
class Served:
    """What expert parallelism gives each rank to do."""

    rows_W: np.ndarray
    """tokens that the base FFN computes"""
    assignments_W: np.ndarray
    sent_WW: np.ndarray
    """rows from one rank to another, one way"""


def served(routing_WTK: Sequence[np.ndarray], num_experts: int, *, per_choice: bool) -> Served:
    """
    Args:
        per_choice: each choice of a token travels and is computed by itself; else a token does so once for each rank.
    """
    world = len(routing_WTK)
    owner_E = contiguous_owners(num_experts, world)
    assignments_WW = np.stack([np.bincount(owner_E[expert_TK].ravel(), minlength=world) for expert_TK in routing_WTK])
    tokens_WW = np.stack([[(owner_E[expert_TK] == rank).any(1).sum() for rank in range(world)] for expert_TK in routing_WTK])
    rows_WW = assignments_WW if per_choice else tokens_WW
    return Served(rows_WW.sum(0), assignments_WW.sum(0), rows_WW * ~np.eye(world, dtype=bool))


def expert_parallel_seconds(work: Served, cost: LayerCost, rates: Rates) -> float:
    """Of forward and backward pass."""
    flops_W = work.rows_W * cost.row_flops * (1 + cost.row_backward)
    flops_W = flops_W + work.assignments_W * cost.assignment_flops * (1 + cost.assignment_backward)
    busiest_port = max(work.sent_WW.sum(1).max(), work.sent_WW.sum(0).max())
    attention = cost.non_moe_flops * (1 + cost.non_moe_backward)
    return float((flops_W.max() + attention) / rates.flops + 4 * busiest_port * cost.row_bytes / rates.bytes_per_s)


def moved_experts_seconds(tokens: int, num_experts: int, world: int, cost: LayerCost, rates: Rates) -> float:
    """Of forward and backward pass, if every rank has every expert."""
    flops = tokens * cost.row_flops * (1 + cost.row_backward)
    flops += tokens * cost.top_k * cost.assignment_flops * (1 + cost.assignment_backward)
    others = num_experts * (world - 1) / world
    beside = [
        (cost.non_moe_flops, cost.trainable_bytes),
        (cost.non_moe_flops * cost.non_moe_backward, cost.reduced_bytes),
    ]
    return flops / rates.flops + sum(max(work / rates.flops, others * size / rates.bytes_per_s) for work, size in beside)


def ceiling(routing_WTK: Sequence[np.ndarray], num_experts: int, cost: LayerCost, rates: Rates, *, per_choice: bool) -> float:
    """The most that moving experts can win over expert parallelism under this routing."""
    theirs = expert_parallel_seconds(served(routing_WTK, num_experts, per_choice=per_choice), cost, rates)
    return theirs / moved_experts_seconds(len(routing_WTK[0]), num_experts, len(routing_WTK), cost, rates)
