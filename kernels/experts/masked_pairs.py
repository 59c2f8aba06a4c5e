"""The weighted sum of each token's low-rank pairs as two dense products, for pairs whose ranks are few in all: a few experts of rank 8
(MoLA), single ranks as experts (SMoRA), one pair for all tokens.

All slots' A side by side multiply every token, x A'. The result is multiplied by the token's weight for each slot, which is 0 where the
slot was not chosen, and then by all slots' B side by side. That is more arithmetic than the chosen pairs need, but there is nothing to
sort, to gather and to add up, which takes longer where ranks are few. Nothing waits for the device.

Shapes: T tokens, K assignments of a token, S slots, r rank, I inputs and O outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hecate.kernels.common.assignments import RoutedTokens
from hecate.kernels.common.low_rank import LowRankPairs, side_by_side

_MOST_RANKS, _MOST_RANKS_OF_AN_ASSIGNMENT = 64, 32
"""Up to these the dense products were found to take less processor time than plain torch on sorted assignments, for linears of 576 x 576
to 2048 x 2048, 256 to 2048 tokens, float32 and bfloat16: 0.3 to 0.95 of it. With twice as many ranks they took more in float32."""

_MOST_RANK_ON_KERNELS, _LEAST_SLOTS_ON_KERNELS = 4, 16
"""Grouped kernels pad ranks to 16, so that they do this many times the arithmetic. On a GPU neither was timed."""


def masking_pays(routed: RoutedTokens, pairs: LowRankPairs) -> bool:
    """Return whether the dense products are faster than plain torch on sorted assignments, by sizes alone."""
    slots, rank, _ = pairs.a_SrI.shape
    chosen = routed.slot_TK.shape[1]
    few = slots * rank <= max(_MOST_RANKS, _MOST_RANKS_OF_AN_ASSIGNMENT * chosen)
    return slots > 0 and (few or slots <= chosen)


def masking_pays_beside_kernels(routed: RoutedTokens, pairs: LowRankPairs) -> bool:
    """Return whether the dense products are taken to be faster than grouped kernels, by sizes alone."""
    slots, rank, _ = pairs.a_SrI.shape
    few = slots * rank <= _MOST_RANKS_OF_AN_ASSIGNMENT * routed.slot_TK.shape[1]
    return rank <= _MOST_RANK_ON_KERNELS and slots >= _LEAST_SLOTS_ON_KERNELS and few


def masked_pairs(routed: RoutedTokens, pairs: LowRankPairs) -> Tensor:
    """As `routed_pairs.routed_pairs` without dropout, whose masks differ by expert; on any device."""
    return _MaskedPairs.apply(routed.x_TD, routed.weight_TK, routed.slot_TK, pairs.scale, *pairs.matrices)


class _MaskedPairs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, weight_TK: Tensor, slot_TK: Tensor, scale: float, *pairs: Any) -> Tensor:
        a_SrI, b_SOr, _ = pairs
        low_TR = x_TI @ side_by_side(a_SrI, x_TI.dtype).T
        weight_TR = _by_rank(weight_TK, slot_TK, a_SrI, x_TI.dtype)
        ctx.scale = scale
        ctx.save_for_backward(x_TI, weight_TK, slot_TK, low_TR, *pairs)
        return (low_TR * weight_TR.mul_(scale)) @ side_by_side(b_SOr.mT, x_TI.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy_TO,) = grads
        x_TI, weight_TK, slot_TK, low_TR, a_SrI, b_SOr, b_for_a_SOr = ctx.saved_tensors
        slots, rank, _ = a_SrI.shape
        weight_TR = _by_rank(weight_TK, slot_TK, a_SrI, x_TI.dtype).mul_(ctx.scale)
        dlow_TR = dy_TO @ side_by_side(b_SOr.mT, x_TI.dtype).T
        sums = torch.promote_types(x_TI.dtype, torch.float32)
        dot_TS = (dlow_TR * low_TR).view(-1, slots, rank).sum(2, dtype=sums)
        dweight_TK = torch.where(slot_TK < 0, 0.0, dot_TS.gather(1, slot_TK.clamp(min=0))).mul_(ctx.scale).to(weight_TK.dtype)
        dlow_TR.mul_(weight_TR)
        db_RO = (low_TR * weight_TR).T @ dy_TO
        db_SOr = db_RO.view(slots, rank, -1).mT.to(b_SOr.dtype)
        da_SrI = None
        if ctx.needs_input_grad[4]:
            of_a_TR = dlow_TR
            if b_for_a_SOr is not None:
                of_a_TR = (dy_TO @ side_by_side(b_for_a_SOr.mT, x_TI.dtype).T).mul_(weight_TR)
            da_SrI = (of_a_TR.T @ x_TI).view(a_SrI.shape).to(a_SrI.dtype)
        dx_TI = dlow_TR @ side_by_side(a_SrI, x_TI.dtype) if ctx.needs_input_grad[0] else None
        return dx_TI, dweight_TK, None, None, da_SrI, db_SOr, None


def _by_rank(weight_TK: Tensor, slot_TK: Tensor, a_SrI: Tensor, dtype: torch.dtype) -> Tensor:
    """[T, S · r]: each token's weight for the slot that a rank belongs to; 0 where this rank does not compute the token with it."""
    slots, rank, _ = a_SrI.shape
    # One column more, for assignments that other ranks compute.
    weight_TS = weight_TK.new_zeros((len(weight_TK), slots + 1), dtype=dtype)
    weight_TS.scatter_add_(1, torch.where(slot_TK < 0, slots, slot_TK), weight_TK.detach().to(dtype))
    return weight_TS[:, :slots].repeat_interleave(rank, dim=1)
