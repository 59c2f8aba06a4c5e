"""Tokens to the replicas that serve them, and the results back. No token is dropped and no capacity is set.

A token travels once to each rank that serves any of its assignments, not once for each of them: the rank computes all of the token's
assignments that it serves and returns their weighted sum.

Shapes: T tokens of this rank, M rows sent (tokens times the ranks that serve them), R rows received, D hidden, K assignments of a token,
E experts, N = T · K, B bounds between ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from hecate.parallel.comm.aborts import in_range, read
from hecate.parallel.comm.device_tables import token_tables
from hecate.parallel.transfer.transfer_plan import TokenPlan


@dataclass(frozen=True)
class RowSources:
    """From which tokens rows were taken; a token may have several rows, and may have none."""

    source_M: Tensor
    """int64: the token of each row, below `num_tokens`"""
    num_tokens: int
    by_token_M: Tensor | None = None
    """int64: the rows sorted by token, those of one token in their order; None: `index_add_` adds up in the order of the rows"""
    first_T: Tensor | None = None
    """int64: the place in `by_token_M` where each token's rows begin"""


def row_sources(source_M: Tensor, num_tokens: int, *, sort: bool) -> RowSources:
    """Note the sources of rows, so that rows can be added up by token.

    Args:
        sort: true on a GPU, where `index_add_` adds up in an order that changes from run to run.
    """
    if not sort:
        return RowSources(source_M, num_tokens)
    count_T = source_M.new_zeros(num_tokens).scatter_add_(0, source_M, torch.ones_like(source_M))
    return RowSources(source_M, num_tokens, torch.argsort(source_M, stable=True), torch.cumsum(count_T, 0) - count_T)


def sum_rows(sources: RowSources, row_MD: Tensor) -> Tensor:
    """[T, D]: the sum of each token's rows, in the order of the rows, so that it has the same bits in every run."""
    if sources.by_token_M is None:
        return row_MD.new_zeros((sources.num_tokens, row_MD.shape[1])).index_add_(0, sources.source_M, row_MD)
    if not len(row_MD):
        return row_MD.new_zeros((sources.num_tokens, row_MD.shape[1]))
    return F.embedding_bag(sources.by_token_M, row_MD, sources.first_T, mode="sum")


@dataclass(frozen=True, kw_only=True)
class Dispatched:
    """Tokens at the rank that computes them, and what `combine` needs to return the results."""

    x_RD: Tensor
    slot_RK: Tensor
    """int64: the slot on this rank of each assignment, -1: another rank serves it"""
    weight_RK: Tensor
    token_R: Tensor
    """int64: the global number of each row's token"""
    sources: RowSources
    """the tokens of this rank that its sent rows were taken from"""
    send_rows: list[int]
    """how many rows this rank sends to each rank"""
    recv_rows: list[int]
    """how many rows this rank receives from each rank"""
    served: int
    """the number of assignments of the received rows that this rank computes"""

    def bytes_to(self, rank: int, y_RO: Tensor, *, backward: bool) -> list[int]:
        """Bytes that `rank`, this rank, sends to each rank in dispatch and combine; with `backward`, in their backward passes, too.

        Rows and weights have gradients unless nothing before the layer trains, as with given routing in the model's first layer.

        Args:
            y_RO: the results that return.
        """
        hidden = self.x_RD.shape[1] * self.x_RD.element_size()
        result = y_RO.shape[1] * y_RO.element_size()
        weight = self.weight_RK.shape[1] * self.weight_RK.element_size()
        meta = (self.slot_RK.shape[1] + 1) * self.slot_RK.element_size()
        # Gradients of rows and weights return the way they came, and those of the results, too.
        each_away = hidden + weight + meta + (result if backward else 0)
        each_back = result + (hidden + weight if backward and self.x_RD.requires_grad else 0)
        count = 2 * self.slot_RK.element_size()
        return [
            0 if other == rank else away * each_away + back * each_back + count
            for other, (away, back) in enumerate(zip(self.send_rows, self.recv_rows, strict=True))
        ]


def destinations(expert_TK: Tensor, bound_EB: Tensor) -> Tensor:
    """int64 [T, K]: the rank that serves each assignment. On CUDA the host does not wait.

    The n assignments of an expert, in order, are cut into runs proportional to the ranks' shares, by rank ascending, each rounded to within
    one assignment.

    Args:
        bound_EB: float64 [experts, ranks - 1]: cumulative shares (see `TokenPlan`).
    """
    expert = expert_TK.flatten()
    order = torch.argsort(expert, stable=True)
    count_E = expert.new_zeros(len(bound_EB)).scatter_add_(0, expert, torch.ones_like(expert))
    first_E = torch.cumsum(count_E, 0) - count_E
    ordinal = torch.empty_like(expert)
    ordinal[order] = torch.arange(len(expert), device=expert.device)
    position = positions(ordinal - first_E[expert], count_E[expert])
    return (position[:, None] >= bound_EB[expert]).sum(1).view_as(expert_TK)


def positions(ordinal_N: Tensor, count_N: Tensor) -> Tensor:
    """float64 [N]: where the middle of each assignment lies among those of its expert, above 0 and below 1.

    In float32 the last of more than 2^24 assignments would lie at 1, behind all shares.

    Args:
        ordinal_N: the assignment's number among those of its expert, from 0.
        count_N: how many its expert has.
    """
    return (ordinal_N.double() + 0.5) / count_N


def dispatch(x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor, token_T: Tensor, plan: TokenPlan, group: dist.ProcessGroup) -> Dispatched:
    """Send each token to the ranks that serve its assignments, rows by rank and then by token. Differentiable in x and weights.

    Every rank of the group must call it, in the same order, with its own plan of the same placement; a rank may have no tokens, and may
    receive none. On CUDA the host waits once, for the counts of rows.
    """
    tables = token_tables(plan, x_TD.device)
    rank_TK = destinations(expert_TK, tables.bound_EB)
    row_N, place_N, rows_D = _rows_to_send(rank_TK, len(tables.slot_DE))
    assignments_D = torch.zeros_like(rows_D).scatter_add_(0, rank_TK.flatten(), torch.ones_like(rank_TK).flatten())
    send_D2 = torch.stack([rows_D, assignments_D], dim=1)
    recv_D2 = torch.empty_like(send_D2)
    dist.all_to_all_single(recv_D2, send_D2, group=group)
    # One read of all that the host must know: each one stops it until the GPU has done everything that is queued.
    send_rows, recv_rows, served_D = read(torch.cat([send_D2[:, :1], recv_D2], dim=1).T, group).tolist()

    num_tokens = len(x_TD)
    row_M = torch.empty_like(row_N).scatter_(0, place_N, row_N)[: sum(send_rows)]  # equal rows have one place
    rank_M, source_M = row_M // max(num_tokens, 1), row_M % max(num_tokens, 1)
    slot_MK = torch.where(rank_TK[source_M] == rank_M[:, None], tables.slot_DE[rank_M[:, None], expert_TK[source_M]], -1)
    meta_RN = _exchange_rows(torch.cat([slot_MK, token_T[source_M, None]], dim=1), send_rows, recv_rows, group)
    # Kernels index with the slots, and the host never looks at them. After an abort they are whatever the memory held; an index out of
    # range would then end the CUDA context of a rank that is to go on.
    in_range(meta_RN[:, :-1], -1, int(plan.slot_DE[dist.get_rank(group)].max()))
    sources = row_sources(source_M, num_tokens, sort=x_TD.is_cuda)
    rows_MD, weight_MK = _TakeRows.apply(sources, x_TD), _TakeRows.apply(sources, weight_TK)
    x_RD, weight_RK = _RowExchange.apply(send_rows, recv_rows, group, rows_MD, weight_MK)
    return Dispatched(
        x_RD=x_RD,
        slot_RK=meta_RN[:, :-1],
        weight_RK=weight_RK,
        token_R=meta_RN[:, -1],
        sources=sources,
        send_rows=send_rows,
        recv_rows=recv_rows,
        served=sum(served_D),
    )


def _rows_to_send(rank_TK: Tensor, num_ranks: int) -> tuple[Tensor, Tensor, Tensor]:
    """The pairs of a rank and a token, one an assignment, sorted: int64 [N] rank · T + token; int64 [N] the place of each among the
    different ones; int64 [ranks] how many different ones each rank has.
    """
    num_tokens = max(len(rank_TK), 1)
    token_T1 = torch.arange(len(rank_TK), device=rank_TK.device)[:, None]
    row_N = torch.sort((rank_TK * num_tokens + token_T1).flatten()).values
    different_N = torch.ones_like(row_N)
    different_N[1:] = row_N[1:] != row_N[:-1]
    send_D = row_N.new_zeros(num_ranks).scatter_add_(0, row_N // num_tokens, different_N)
    return row_N, torch.cumsum(different_N, 0) - 1, send_D


def combine(y_RD: Tensor, dispatched: Dispatched, group: dist.ProcessGroup) -> Tensor:
    """Return the results to the tokens' ranks and add them up there: [T, D]. Differentiable. Every rank must call it."""
    (y_MD,) = _RowExchange.apply(dispatched.recv_rows, dispatched.send_rows, group, y_RD)
    return _SumRows.apply(dispatched.sources, y_MD)


def _exchange_rows(rows: Tensor, send_rows: list[int], recv_rows: list[int], group: dist.ProcessGroup) -> Tensor:
    received = rows.new_empty((sum(recv_rows), *rows.shape[1:]))
    # A gradient may be expanded from fewer numbers, as that of a sum is; a collective reads plain memory.
    dist.all_to_all_single(received, rows.contiguous(), recv_rows, send_rows, group=group)
    return received


class _TakeRows(torch.autograd.Function):
    """The rows of their tokens; gradients of rows are summed by token."""

    @staticmethod
    def forward(ctx: Any, sources: RowSources, x_TD: Tensor) -> Tensor:
        ctx.sources = sources
        return x_TD.index_select(0, sources.source_M)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        return None, sum_rows(ctx.sources, grads[0])


class _SumRows(torch.autograd.Function):
    """Rows summed by token; each row gets the gradient of its token."""

    @staticmethod
    def forward(ctx: Any, sources: RowSources, row_MD: Tensor) -> Tensor:
        # A checkpointed layer that runs again stops at the last tensor that was saved. Without this one, which comes after the exchange
        # of `combine`, a rank whose layer saves nothing later would leave out the exchange that the other ranks make.
        ctx.save_for_backward(sources.source_M)
        return sum_rows(sources, row_MD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        (source_M,) = ctx.saved_tensors
        return None, grads[0].index_select(0, source_M)


class _RowExchange(torch.autograd.Function):
    """Rows to their ranks; gradients take the same way back.

    All tensors of one dispatch go through one node, so that every rank runs the same collectives backward, whatever its experts used.
    """

    @staticmethod
    def forward(ctx: Any, send_rows: list[int], recv_rows: list[int], group: dist.ProcessGroup, *rows: Tensor) -> tuple[Tensor, ...]:
        ctx.send_rows, ctx.recv_rows, ctx.group = send_rows, recv_rows, group
        return tuple(_exchange_rows(tensor, send_rows, recv_rows, group) for tensor in rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, *(_exchange_rows(grad, ctx.recv_rows, ctx.send_rows, ctx.group) for grad in grads)
