"""Low-rank pairs, W + scale · B A: the records that kernels take, and a frozen linear layer with one pair."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hecate.kernels.common.dropout import RowDropout, TokenDropout

MAX_RANK = 256
"""the largest rank that the Triton kernels take, and for which there are launch configurations"""


@dataclass(frozen=True)
class LowRankPairs:
    """The pairs of one projection, one for each slot. Slot s adds scale · B_s A_s to the projection's weight."""

    a_SrI: Tensor
    """[slots, rank, inputs]"""
    b_SOr: Tensor
    """[slots, outputs, rank]"""
    scale: float
    eta: float | None = None
    """of the gradient rule row_norm (`row_factors`); None: gradients of A and B are what they are"""


def row_factors(a_rI: Tensor, b_Or: Tensor, eta: float | None) -> Tensor | None:
    """Return what the rule row_norm multiplies the gradient of each output row by before it reaches A and B: [.., O]; None without eta.

    It is 1 / sqrt(|row of B A| + 1 / eta^2), and thus eta where B is zero. The input's gradient stays what it is. With factors f this
    gives B the gradient f · dB, and A the one that it would have if B were f · B. Source: ALLoRA (arXiv 2410.09692).

    Args:
        a_rI, b_Or: one pair, or pairs with slots in front. B A itself is not made: the norms follow from A A'.
    """
    if eta is None:
        return None
    squares = ((b_Or @ (a_rI @ a_rI.mT)) * b_Or).sum(-1)
    return (squares.clamp(min=0).sqrt() + eta**-2).sqrt().reciprocal()


def scaled_rows(b_Or: Tensor, factor_O: Tensor | None) -> Tensor:
    """Return B, or its gradient, with each row multiplied by a factor of `row_factors`; the same tensor if there are none."""
    return b_Or if factor_O is None else b_Or * factor_O[..., None].to(b_Or.dtype)


def side_by_side(matrix_SrN: Tensor, dtype: torch.dtype) -> Tensor:
    """[S·r, N] in this type: all slots' A, or their B transposed, as one matrix.

    A view of the pairs, or a copy: for one pass alone, because replicas are freed between passes.
    """
    return matrix_SrN.to(dtype).flatten(0, 1)


@dataclass(frozen=True)
class LowRankTerm:
    """The second half of a low-rank product: rows already multiplied by one matrix of a pair, and the matrix that expands them."""

    low_PR: Tensor
    """[P, R], a row for each of the sorted assignments"""
    matrix_SNR: Tensor
    """[S, N, R], B, or in a backward pass A transposed; a view of any strides"""


@dataclass(frozen=True)
class ShrunkInput:
    """The columns of one pair in the input that gate and up share: one GEMM multiplies it by the A of all their pairs, side by side."""

    output: slice
    """the pair's columns of the gate and up outputs, which lie side by side [2F]"""
    low: slice
    """the pair's columns of the shrunk input"""
    scale: float
    """the pair's scale, times that of dropout"""
    eta: float | None = None
    """see `LowRankPairs.eta`"""


def shrunk_inputs(pairs: dict[str, LowRankPairs], ffn: int, dropout_scale: float) -> dict[str, ShrunkInput]:
    """Return the columns of each pair of gate, up, or both as one projection, in this order."""
    outputs = {"gate_proj": slice(0, ffn), "up_proj": slice(ffn, None), "gate_up_proj": slice(0, None)}
    names = [name for name in outputs if name in pairs]
    ends = list(itertools.accumulate(pairs[name].a_SrI.shape[1] for name in names))
    return {
        name: ShrunkInput(outputs[name], slice(start, end), pairs[name].scale * dropout_scale, pairs[name].eta)
        for name, start, end in zip(names, [0, *ends], ends, strict=False)
    }


def separate_gate_and_up(pairs: dict[str, LowRankPairs]) -> dict[str, LowRankPairs]:
    """Split a pair of `gate_up_proj`, whose B has the rows of both, into pairs of gate and up with the same A. Others are unchanged."""
    if "gate_up_proj" not in pairs:
        return pairs
    both = pairs["gate_up_proj"]
    gate, up = (LowRankPairs(both.a_SrI, b, both.scale, both.eta) for b in both.b_SOr.chunk(2, dim=1))
    return {"gate_proj": gate, "up_proj": up, **{name: of for name, of in pairs.items() if name != "gate_up_proj"}}


def lora_linear(
    x_TI: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None,
    a_rI: Tensor,
    b_Or: Tensor,
    scale: float,
    dropout: TokenDropout | None = None,
    eta: float | None = None,
) -> Tensor:
    """Return W x + bias + scale · B A dropout(x), [tokens, outputs] in x's dtype, without temporaries of the output's size.

    It is differentiable in x and the pair, whose gradients have their own dtype, but not in the frozen weight.

    Args:
        dropout: the dropout of x's rows.
        eta: see `LowRankPairs.eta`.
    """
    rows = None if dropout is None else dropout.rows()
    if rows is not None:
        scale *= rows.scale
    return _LoraLinear.apply(x_TI, weight_OI, bias_O, a_rI, b_Or, scale, rows, eta)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TI: Tensor,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        a_rI: Tensor,
        b_Or: Tensor,
        scale: float,
        dropout: RowDropout | None,
        eta: float | None,
    ) -> Tensor:
        y_TO = F.linear(x_TI, weight_OI, bias_O)
        keep_TI = None if dropout is None else dropout.keep(x_TI.shape[1], x_TI.dtype)
        low_Tr = (x_TI if keep_TI is None else keep_TI.mul_(x_TI)) @ a_rI.to(x_TI.dtype).T
        y_TO.addmm_(low_Tr, b_Or.to(x_TI.dtype).T, alpha=scale)
        ctx.scale, ctx.eta, ctx.dropped_levels = scale, eta, None if dropout is None else dropout.dropped_levels
        ctx.save_for_backward(x_TI, weight_OI, a_rI, b_Or, low_Tr, None if dropout is None else dropout.word_R)
        return y_TO

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy_TO,) = grads
        x_TI, weight_OI, a_rI, b_Or, low_Tr, word_T = ctx.saved_tensors
        factor_O = row_factors(a_rI, b_Or, ctx.eta)
        dlow_Tr = (dy_TO @ b_Or.to(dy_TO.dtype)).mul_(ctx.scale)
        keep_TI = None if word_T is None else RowDropout(word_T, ctx.dropped_levels).keep(x_TI.shape[1], x_TI.dtype)
        db_Or = scaled_rows((dy_TO.T @ low_Tr).mul_(ctx.scale).to(b_Or.dtype), factor_O)
        dx_TI, da_rI = None, None
        if ctx.needs_input_grad[3]:
            of_a_Tr = dlow_Tr if factor_O is None else (dy_TO @ scaled_rows(b_Or, factor_O).to(dy_TO.dtype)).mul_(ctx.scale)
            da_rI = (of_a_Tr.T @ (x_TI if keep_TI is None else keep_TI * x_TI)).to(a_rI.dtype)
        if ctx.needs_input_grad[0]:
            dx_TI = dy_TO @ weight_OI
            a = a_rI.to(dy_TO.dtype)
            if keep_TI is None:
                dx_TI.addmm_(dlow_Tr, a)
            else:
                dx_TI.addcmul_(dlow_Tr @ a, keep_TI)
        return dx_TI, None, None, da_rI, db_Or, None, None, None
