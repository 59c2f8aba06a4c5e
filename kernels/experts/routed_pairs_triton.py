"""The weighted sum of each token's low-rank pairs on grouped Triton kernels: what experts over a linear layer add to its output.

It computes what `routed_pairs.routed_pairs` does, on assignments sorted by slot. Nothing waits for the device. Ranks are padded to sizes
that tensor cores multiply, in copies that live for one pass only, because the pairs themselves are replicas, which are freed and gathered
between passes. Sums always have the same order and use no atomics.

Shapes: T tokens, K assignments of a token, S slots, P places of the sorted assignments, r rank, R as padded, I inputs, O outputs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hecate.kernels.common.assignments import AssignmentOrder, RoutedTokens
from hecate.kernels.common.combine import combine_assignments
from hecate.kernels.common.dropout import Dropout, RowDropout
from hecate.kernels.common.launch_config import padded_rank
from hecate.kernels.common.low_rank import LowRankPairs
from hecate.kernels.common.operands import flattened, unflattened
from hecate.kernels.common.sorting import Unsorted, sorted_assignments, words_dropout
from hecate.kernels.experts.grouped_gemm import GemmOptions, grouped_gemm
from hecate.kernels.experts.grouped_wgrad import grouped_wgrad
from hecate.kernels.experts.masked_pairs import masked_pairs, masking_pays_beside_kernels
from hecate.kernels.experts.slot_weights import stacked_weights


def routed_pairs_triton(routed: RoutedTokens, pairs: LowRankPairs, *, dropout: Dropout | None = None) -> Tensor:
    """As `routed_pairs.routed_pairs`, in float32, bfloat16 or float16; differentiable once. Many pairs of tiny ranks, which grouped kernels
    would pad to the least that they multiply, are multiplied densely."""
    if dropout is None and masking_pays_beside_kernels(routed, pairs):
        return masked_pairs(routed, pairs)
    return sorted_pairs_triton(routed, pairs, dropout=dropout)


def sorted_pairs_triton(routed: RoutedTokens, pairs: LowRankPairs, *, dropout: Dropout | None = None) -> Tensor:
    """As `routed_pairs_triton`, on sorted assignments whatever the sizes."""
    return _TritonRoutedPairs.apply(routed.x_TD, routed.weight_TK, pairs.scale, routed, dropout, *pairs.matrices)


class _TritonRoutedPairs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TI: Tensor, weight_TK: Tensor, scale: float, routed: RoutedTokens, dropout: Dropout | None, *pairs: Any
    ) -> Tensor:
        a_SrI, b_SOr, _ = pairs
        num_slots = len(a_SrI)
        order, words = sorted_assignments(Unsorted.of(routed, dropout if num_slots else None), num_slots)
        ctx.dropped_levels = 0 if dropout is None else dropout.dropped_levels
        ctx.scale = scale * (1.0 if dropout is None else dropout.scale)
        if num_slots == 0:
            low_PR, y_TO = x_TI.new_empty((order.num_assignments, 0)), x_TI.new_zeros((len(x_TI), b_SOr.shape[1]))
        else:
            a, b = _padded(a_SrI, b_SOr, x_TI.dtype)
            options = GemmOptions(gather=True, drop_x=_of_x(words, ctx.dropped_levels))
            low_PR = grouped_gemm(x_TI.contiguous(), stacked_weights(a), order, options)
            y_PO = grouped_gemm(low_PR, stacked_weights(b), order, GemmOptions(scales=(ctx.scale, ctx.scale)))
            y_TO = combine_assignments(y_PO, weight_TK.contiguous(), order)
        ctx.save_for_backward(x_TI, weight_TK, low_PR, words, *pairs, *flattened(order))
        return y_TO

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, weight_TK, low_PR, words, a_SrI, b_SOr, b_for_a_SOr, *of_order = ctx.saved_tensors
        if len(a_SrI) == 0:
            nothing = [torch.zeros_like(tensor) for tensor in (x_TI, weight_TK, a_SrI, b_SOr)]
            return *nothing[:2], None, None, None, *nothing[2:], None
        order = unflattened(AssignmentOrder, iter(of_order))
        x_TI, dy_TO = x_TI.contiguous(), grads[0].contiguous()
        a, b = _padded(a_SrI, b_SOr, x_TI.dtype)
        rank, drop = a_SrI.shape[1], _of_x(words, ctx.dropped_levels)
        weight_P = weight_TK.flatten()[order.order_P].to(x_TI.dtype)[:, None]
        options = GemmOptions(gather=True, transposed=True, scales=(ctx.scale, ctx.scale))
        dlow_PR = grouped_gemm(dy_TO, stacked_weights(b), order, options)
        # Rows of assignments that other ranks compute were never written; their place, -1, is that of the zero behind all sums.
        dot_P = F.pad((dlow_PR.float() * low_PR.float()).sum(1), (0, 1))
        dweight_TK = dot_P[order.place_TK.long()].to(weight_TK.dtype)
        dlow_PR = dlow_PR * weight_P
        da_SrI, db_SOr = None, b_SOr.new_empty(b_SOr.shape)
        if ctx.needs_input_grad[5]:
            of_a_PR = dlow_PR
            if b_for_a_SOr is not None:
                _, b_for_a = _padded(a_SrI, b_for_a_SOr, x_TI.dtype)
                of_a_PR = grouped_gemm(dy_TO, stacked_weights(b_for_a), order, options) * weight_P
            da_SrI = a_SrI.new_empty(a_SrI.shape)
            grouped_wgrad(of_a_PR[:, :rank], x_TI, order, da_SrI, gather="right", drop_right=drop)
        grouped_wgrad(dy_TO, (low_PR * weight_P)[:, :rank], order, db_SOr, gather="left", scale=ctx.scale)
        dx_TI = None
        if ctx.needs_input_grad[0]:
            dx_PI = grouped_gemm(dlow_PR, stacked_weights(a), order, GemmOptions(transposed=True))
            if drop is not None:
                dx_PI *= drop.of(slice(0, len(dx_PI))).keep(dx_PI.shape[1], dx_PI.dtype)
            dx_TI = combine_assignments(dx_PI, None, order)
        return dx_TI, dweight_TK, None, None, None, da_SrI, db_SOr, None


def _of_x(words: Tensor, dropped_levels: int) -> RowDropout | None:
    dropout = words_dropout(words, dropped_levels)
    return None if dropout is None else dropout.gate_up


def _padded(a_SrI: Tensor, b_SOr: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A [S, R, I] and B [S, O, R], with zeros in the ranks that are added."""
    num_slots, rank, inputs = a_SrI.shape
    padded = padded_rank(rank)
    a_SRI = a_SrI.new_zeros((num_slots, padded, inputs), dtype=dtype)
    b_SOR = b_SOr.new_zeros((num_slots, b_SOr.shape[1], padded), dtype=dtype)
    a_SRI[:, :rank], b_SOR[:, :, :rank] = a_SrI, b_SOr
    return a_SRI, b_SOR
