"""Tokens to the replicas that serve them, and the results back. No token is dropped and no capacity is set.

A token travels once to each rank that serves any of its choices, not once per choice: the rank computes all of the token's choices
that it was given and returns their weighted sum.

Shapes: T tokens here, M rows sent (tokens times the ranks that serve them), R rows received, D hidden, K choices, E experts, W ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from hecate.parallel.placement import Placement


@dataclass(frozen=True, kw_only=True)
class Dispatched:
    """Tokens at the rank that computes them, and what `combine` needs to return the results."""

    x_RD: Tensor
    slot_RK: Tensor
    """int64: the slot here of each choice, -1: served elsewhere"""
    weight_RK: Tensor
    token_R: Tensor
    """int64: global token numbers"""
    source_M: Tensor
    """int64: the row of x_TD that each sent row was"""
    num_tokens: int
    send_rows: list[int]
    recv_rows: list[int]

    def bytes_sent(self, rank: int, *, backward: bool) -> int:
        """Bytes that `rank`, this rank, sends to others in dispatch and combine; with `backward`, in their backward passes, too."""
        away = sum(self.send_rows) - self.send_rows[rank]
        back = sum(self.recv_rows) - self.recv_rows[rank]
        hidden = self.x_RD.shape[1] * self.x_RD.element_size()
        weight = self.weight_RK.shape[1] * self.weight_RK.element_size()
        meta = (self.slot_RK.shape[1] + 1) * self.slot_RK.element_size()
        forward = away * (hidden + weight + meta) + back * hidden + (len(self.send_rows) - 1) * self.slot_RK.element_size()
        # Gradients of rows and weights return the way they came, and those of the results, too.
        return forward + (back * (hidden + weight) + away * hidden if backward else 0)


def destinations(expert_TK: Tensor, split_EW: Tensor) -> Tensor:
    """int64 [T, K]: the rank that serves each choice.

    The n tokens of an expert, in order, are cut into runs proportional to the expert's row of `split_EW` (float64, rows sum to 1), by
    rank ascending, each rounded to within one token.
    """
    expert = expert_TK.flatten()
    order = torch.argsort(expert, stable=True)
    count_E = torch.bincount(expert, minlength=len(split_EW))
    first_E = torch.cumsum(count_E, 0) - count_E
    ordinal = torch.empty_like(expert)
    ordinal[order] = torch.arange(len(expert), device=expert.device)
    position = (ordinal - first_E[expert] + 0.5) / count_E[expert]
    bounds_EW = torch.cumsum(split_EW, 1)[:, :-1]
    return (position[:, None] >= bounds_EW[expert]).sum(1).view_as(expert_TK)


def dispatch(
    x_TD: Tensor,
    expert_TK: Tensor,
    weight_TK: Tensor,
    token_T: Tensor,
    placement: Placement,
    split_EW: np.ndarray,
    group: dist.ProcessGroup,
) -> Dispatched:
    """Send each token to the ranks that serve its choices. Differentiable in x and weights.

    Every rank of the group must call it, in the same order; a rank may have no tokens, and may receive none. On CUDA it reads the row
    counts back to the host.

    Args:
        split_EW: float64 [experts, ranks]: shares of *this* rank's tokens of each expert (see `token_split`).
    """
    world = dist.get_world_size(group)
    device = x_TD.device
    rank_TK = destinations(expert_TK, torch.from_numpy(split_EW).to(device))
    present_WT = (rank_TK[None] == torch.arange(world, device=device)[:, None, None]).any(2)
    rank_M, source_M = present_WT.nonzero(as_tuple=True)
    slot_WE = torch.from_numpy(np.stack([placement.slot_of_expert(peer) for peer in range(world)])).to(device)
    expert_MK = expert_TK[source_M]
    slot_MK = torch.where(rank_TK[source_M] == rank_M[:, None], slot_WE[rank_M[:, None], expert_MK], -1)

    send_W = present_WT.sum(1)
    recv_W = torch.empty_like(send_W)
    dist.all_to_all_single(recv_W, send_W, group=group)
    send_rows, recv_rows = send_W.tolist(), recv_W.tolist()
    meta_RN = _exchange(torch.cat([slot_MK, token_T[source_M, None]], dim=1), send_rows, recv_rows, group)
    # index_select: its backward pass adds rows up, that of an index sorts them first.
    rows_MD, weight_MK = x_TD.index_select(0, source_M), weight_TK.index_select(0, source_M)
    x_RD, weight_RK = _Exchange.apply(send_rows, recv_rows, group, rows_MD, weight_MK)
    return Dispatched(
        x_RD=x_RD,
        slot_RK=meta_RN[:, :-1],
        weight_RK=weight_RK,
        token_R=meta_RN[:, -1],
        source_M=source_M,
        num_tokens=len(x_TD),
        send_rows=send_rows,
        recv_rows=recv_rows,
    )


def combine(y_RD: Tensor, dispatched: Dispatched, group: dist.ProcessGroup) -> Tensor:
    """Return the results to the tokens' ranks and add them up there: [T, D]. Differentiable. Every rank must call it."""
    (y_MD,) = _Exchange.apply(dispatched.recv_rows, dispatched.send_rows, group, y_RD)
    y_TD = y_MD.new_zeros((dispatched.num_tokens, y_MD.shape[1]))
    return y_TD.index_add_(0, dispatched.source_M, y_MD)


def _exchange(rows: Tensor, send_rows: list[int], recv_rows: list[int], group: dist.ProcessGroup) -> Tensor:
    received = rows.new_empty((sum(recv_rows), *rows.shape[1:]))
    dist.all_to_all_single(received, rows.contiguous(), recv_rows, send_rows, group=group)
    return received


class _Exchange(torch.autograd.Function):
    """Rows to their ranks; gradients take the same way back.

    All tensors of one dispatch go through one node, so that every rank runs the same collectives backward, whatever its experts used.
    """

    @staticmethod
    def forward(ctx: Any, send_rows: list[int], recv_rows: list[int], group: dist.ProcessGroup, *rows: Tensor) -> tuple[Tensor, ...]:
        ctx.send_rows, ctx.recv_rows, ctx.group = send_rows, recv_rows, group
        return tuple(_exchange(tensor, send_rows, recv_rows, group) for tensor in rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, *(_exchange(grad, ctx.recv_rows, ctx.send_rows, ctx.group) for grad in grads)
