"""One low-rank pair for each token that is mixed of a unit's pairs: A = sum w_e A_e, B = sum w_e B_e, which never lie in memory.

h = sum_e w_e (A_e x) is one product of x with all A, contracted with w; and y = sum_e B_e (w_e h) is one product of all w_e h with all B.

Shapes: T tokens, S slots, r rank, I inputs and O outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hecate.kernels.common.assignments import RoutedTokens
from hecate.kernels.common.dropout import Dropout, RowDropout, dropout_stream
from hecate.kernels.common.low_rank import LowRankPairs, side_by_side


def mixed_factors(routed: RoutedTokens, pairs: LowRankPairs, *, dropout: Dropout | None = None) -> Tensor:
    """Return y = s (sum_k w_k B_k) (sum_k w_k A_k) dropout(x), [tokens, outputs]; the cross terms of different pairs are part of it.

    It computes in x's dtype; gradients of the pairs have their own dtype. It is differentiable in x, weights and pairs. Source of the
    formula: RecLoRA (arXiv 2408.03533), whose released code makes a pair for each sample.

    Args:
        routed: with all slots for every token, in their order.
        dropout: the dropout of x, one mask for a token whatever the pairs; `routed` must then have `token_T`.
    """
    assert routed.slot_TK.shape[1] == len(pairs.a_SrI), "every token needs all pairs of the unit on its rank"
    assert pairs.b_for_a_SOr is None, "the gradient of A in a sum of pairs comes from B itself"
    rows = None
    if dropout is not None:
        assert routed.token_T is not None, "dropout needs the tokens' numbers"
        rows = dropout.rows(routed.token_T, dropout_stream(0, "linear"))
    scale = pairs.scale * (1.0 if rows is None else rows.scale)
    return _MixedFactors.apply(routed.x_TD, routed.weight_TK, pairs.a_SrI, pairs.b_SOr, scale, rows)


class _MixedFactors(torch.autograd.Function):
    """What it keeps of the pairs are views of replicas, whose memory may be freed until the backward pass; all A joined would be a copy."""

    @staticmethod
    def forward(
        ctx: Any, x_TI: Tensor, weight_TS: Tensor, a_SrI: Tensor, b_SOr: Tensor, scale: float, dropout: RowDropout | None
    ) -> Tensor:
        w_TS1 = weight_TS.to(x_TI.dtype)[..., None]
        low_TSr = (_dropped(x_TI, dropout) @ side_by_side(a_SrI, x_TI.dtype).T).view(len(x_TI), *a_SrI.shape[:2])
        mixed_Tr = (w_TS1 * low_TSr).sum(1)
        y_TO = (w_TS1 * (mixed_Tr * scale)[:, None]).flatten(1) @ side_by_side(b_SOr.mT, x_TI.dtype)
        ctx.scale, ctx.dropped_levels = scale, None if dropout is None else dropout.dropped_levels
        ctx.save_for_backward(x_TI, weight_TS, a_SrI, b_SOr, low_TSr, None if dropout is None else dropout.word_R)
        return y_TO

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy_TO,) = grads
        x_TI, weight_TS, a_SrI, b_SOr, low_TSr, word_T = ctx.saved_tensors
        dropout = None if word_T is None else RowDropout(word_T, ctx.dropped_levels)
        dtype, (slots, rank, inputs) = x_TI.dtype, a_SrI.shape
        w_TS1 = weight_TS.to(dtype)[..., None]
        mixed_Tr = (w_TS1 * low_TSr).sum(1) * ctx.scale
        up_TSr = (dy_TO @ side_by_side(b_SOr.mT, dtype).T).view(low_TSr.shape)  # dy B_e of each pair
        dmixed_Tr = (w_TS1 * up_TSr).sum(1) * ctx.scale
        sums = torch.promote_types(dtype, torch.float32)
        dweight_TS = (up_TSr * mixed_Tr[:, None] + low_TSr * dmixed_Tr[:, None]).sum(-1, dtype=sums)
        db_SrO = ((w_TS1 * mixed_Tr[:, None]).flatten(1).T @ dy_TO).view(slots, rank, -1)
        dlow_TR = (w_TS1 * dmixed_Tr[:, None]).flatten(1)
        da_SrI = None
        if ctx.needs_input_grad[2]:  # not of a fixed A
            da_SrI = (dlow_TR.T @ _dropped(x_TI, dropout)).view(slots, rank, inputs).to(a_SrI.dtype)
        dx_TI = _dropped(dlow_TR @ side_by_side(a_SrI, dtype), dropout) if ctx.needs_input_grad[0] else None
        return dx_TI, dweight_TS.to(weight_TS.dtype), da_SrI, db_SrO.mT.to(b_SOr.dtype), None, None


def _dropped(row_TI: Tensor, dropout: RowDropout | None) -> Tensor:
    """The rows after dropout, without its scale."""
    return row_TI if dropout is None else row_TI * dropout.keep(row_TI.shape[1], row_TI.dtype)
