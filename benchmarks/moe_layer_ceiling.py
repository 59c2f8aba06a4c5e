"""The most that moving experts in place of tokens can win in a layer of LoRA over a dense base, at rates that were measured.

Expert parallelism waits for the rank with the most work, and for the tokens that travel to it: a row goes there and back, in the forward
and in the backward pass. No plan can do with less than each rank computing as many tokens as it has, each once. That experts' parameters
are gathered and their gradients reduced is not counted, since both can hide behind the attention's GEMMs, and neither is planning, copies
in memory or latency. So it is a ceiling also where that cannot all be hidden, but then one that cannot be reached.

Shapes: T tokens of a rank, K choices of a token, W ranks, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hecate.parallel.cost.cost_model import LayerCost
from hecate.parallel.values.placement import contiguous_owners


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


def least_seconds(tokens: int, cost: LayerCost, rates: Rates) -> float:
    """Of forward and backward pass of a rank with so many tokens, under any plan."""
    attention = cost.non_moe_flops * (1 + cost.non_moe_backward)
    row = cost.row_flops * (1 + cost.row_backward)
    assignment = cost.assignment_flops * (1 + cost.assignment_backward)
    return (attention + tokens * (row + cost.top_k * assignment)) / rates.flops


def ceiling(routing_WTK: Sequence[np.ndarray], num_experts: int, cost: LayerCost, rates: Rates, *, per_choice: bool) -> float:
    """The most that moving experts can win over expert parallelism under this routing."""
    theirs = expert_parallel_seconds(served(routing_WTK, num_experts, per_choice=per_choice), cost, rates)
    return theirs / least_seconds(len(routing_WTK[0]), cost, rates)
