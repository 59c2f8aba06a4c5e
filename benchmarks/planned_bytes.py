"""Compute what a step must send, from its plan and its actual routing: bytes between every two ranks, and tokens that each rank computes.

This is independent of the collectives, so that their counts can be checked against it.

Shapes: L layers, E experts, W ranks, T tokens of a rank, K assignments of a token.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from benchmarks.gloo_steps import Shape
from hecate.parallel.comm.dispatch import destinations
from hecate.parallel.flows import token_split
from hecate.parallel.planners import Plan, PlanInput

INDEX = 8
"""the bytes of a slot, of a token's number and of a count of tokens"""
FLOAT = 4


def planned_traffic(
    given: PlanInput, plan: Plan, expert_LWTK: Sequence[Sequence[np.ndarray]], shape: Shape
) -> tuple[np.ndarray, np.ndarray]:
    """Compute the traffic of a step.

    Returns:
        int64 [W, W], the bytes of experts, gradients and tokens, forward and backward, from each rank to each other; and int64 [L, W], the
        distinct tokens that each rank computes in each layer.
    """
    world = given.world_size
    sent_WW = np.zeros((world, world), dtype=np.int64)
    rows_LW = np.zeros((given.num_layers, world), dtype=np.int64)
    for layer, expert_WTK in enumerate(expert_LWTK):
        where_ED, owner_E = plan.where_LED[layer], plan.owner_LE[layer]
        for expert, rank in zip(*np.nonzero(where_ED), strict=True):
            if rank != owner_E[expert]:
                sent_WW[owner_E[expert], rank] += int(given.cost.trainable_bytes)
                sent_WW[rank, owner_E[expert]] += int(given.cost.reduced_bytes)
        quota_ED = None if plan.quota_LED is None else plan.quota_LED[layer]
        known_ED = None if given.loads_LED is None else given.loads_LED[layer]
        splits = [token_split(where_ED, known_ED, quota_ED, given.topology, source) for source in range(world)]
        if all((split_EW[:, source] == 1).all() for source, split_EW in enumerate(splits)):  # no token leaves its rank
            rows_LW[layer] = [len(expert_TK) for expert_TK in expert_WTK]
            continue
        for source, (expert_TK, split_EW) in enumerate(zip(expert_WTK, splits, strict=True)):
            rank_TK = destinations(torch.from_numpy(expert_TK), torch.from_numpy(np.cumsum(split_EW, 1)[:, :-1])).numpy()
            for rank in range(world):
                rows = int((rank_TK == rank).any(1).sum())
                rows_LW[layer, rank] += rows
                if rank != source:
                    sent_WW[source, rank] += INDEX + rows * (_row(shape) + _weights(shape) + (shape.top_k + 1) * INDEX + _row(shape))
                    sent_WW[rank, source] += rows * (_row(shape) + _row(shape) + _weights(shape))
    return sent_WW, rows_LW


def _row(shape: Shape) -> int:
    """Return the bytes of a token, which are also those of a result and of their gradients."""
    return shape.hidden * FLOAT


def _weights(shape: Shape) -> int:
    return shape.top_k * FLOAT
