"""Low-rank pairs, W + scale · B A: the records that kernels take, and a frozen linear layer with one pair."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hecate.kernels.common.dropout import Dropout, RowDropout, TokenDropout
from hecate.kernels.common.ffn import PROJECTIONS
from hecate.kernels.common.operands import Operands

MAX_RANK = 256
"""the largest rank that the Triton kernels take, and for which there are launch configurations"""


@dataclass(frozen=True)
class LowRankPairs:
    """The pairs of one projection, one for each slot. Slot s adds scale · B_s A_s to the projection's weight.

    `lora_linear` takes a single pair, without the dimension of slots.
    """

    a_SrI: Tensor
    """[slots, rank, inputs]"""
    b_SOr: Tensor
    """[slots, outputs, rank]"""
    scale: float
    b_for_a_SOr: Tensor | None = None
    """[slots, outputs, rank]: what stands in the place of B where the gradient of A is computed, and only there; None: B itself. It has no
    gradient"""

    @property
    def matrices(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.a_SrI, self.b_SOr, self.b_for_a_SOr

    def of_slot(self, slot: int, dtype: torch.dtype) -> LowRankPairs:
        """The single pair of a slot, in this type."""
        a_rI, b_Or = self.a_SrI[slot].to(dtype), self.b_SOr[slot].to(dtype)
        return LowRankPairs(a_rI, b_Or, self.scale, None if self.b_for_a_SOr is None else self.b_for_a_SOr[slot].to(dtype))


@dataclass(frozen=True)
class PackedPairs(Operands):
    """The pairs of all projections of a layer with their dropout, as an operator takes them."""

    matrices: Sequence[Tensor]
    """A [slots, rank, inputs] and B [slots, outputs, rank] of each projection with a pair, in the order of `PROJECTIONS`"""
    b_for_a: Sequence[Tensor]
    """[slots, outputs, rank] of each projection with a pair: see `LowRankPairs.b_for_a_SOr`. Nothing: for all it is B"""
    projections: str
    """the names of these projections, with spaces between"""
    scales: Sequence[float]
    """the scale of each pair, times that of dropout"""
    trains_a: bool
    """whether the matrices A have gradients"""
    dropped_levels: int
    """see `Dropout.dropped_levels`; 0: there is no dropout"""

    @staticmethod
    def of(pairs: Mapping[str, LowRankPairs], dropout: Dropout | None) -> PackedPairs:
        """A trains, unless B alone requires a gradient. Either all pairs have a `b_for_a_SOr`, or none."""
        names = [name for name in PROJECTIONS if name in pairs]
        grow = 1.0 if dropout is None else dropout.scale
        a, b, given = zip(*(pairs[name].matrices for name in names), strict=True)
        b_for_a = [matrix for matrix in given if matrix is not None]
        assert len(b_for_a) in (0, len(names)), "a B in whose place another stands for A's gradient, beside one without"
        trains_a = any(matrix.requires_grad for matrix in a) or not any(matrix.requires_grad for matrix in b)
        matrices, scales = [matrix for pair in zip(a, b, strict=True) for matrix in pair], [pairs[name].scale * grow for name in names]
        return PackedPairs(matrices, b_for_a, " ".join(names), scales, trains_a, 0 if dropout is None else dropout.dropped_levels)

    def unpacked(self) -> dict[str, LowRankPairs]:
        """The pairs by projection; their scales include dropout's."""
        b_for_a: Sequence[Tensor | None] = self.b_for_a or [None] * len(self.scales)
        each = zip(self.matrices[0::2], self.matrices[1::2], self.scales, b_for_a, strict=True)
        return {name: LowRankPairs(*of) for name, of in zip(self.projections.split(), each, strict=True)}

    @property
    def trained(self) -> Sequence[Tensor]:
        """Those of `matrices` that have a gradient."""
        return self.matrices if self.trains_a else self.matrices[1::2]

    def gradients(self, of_trained: Sequence[Tensor]) -> list[Tensor | None]:
        """The gradients of `matrices`, from those of what trains; None for a fixed A."""
        return list(of_trained) if self.trains_a else [each for of_b in of_trained for each in (None, of_b)]


def split_like(all_NC: Tensor, matrices: Sequence[Tensor]) -> list[Tensor]:
    """Return views of the columns, which hold matrices side by side: [N, ...] with the sizes of each of `matrices` but its first."""
    shapes = [matrix.shape[1:] for matrix in matrices]
    columns = all_NC.split_with_sizes([math.prod(shape) for shape in shapes], dim=1)
    return [each.view(all_NC.shape[0], *shape) for each, shape in zip(columns, shapes, strict=True)]


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


def shrunk_inputs(pairs: dict[str, LowRankPairs], ffn: int, dropout_scale: float) -> dict[str, ShrunkInput]:
    """Return the columns of each pair of gate, up, or both as one projection, in this order."""
    outputs = {"gate_proj": slice(0, ffn), "up_proj": slice(ffn, None), "gate_up_proj": slice(0, None)}
    names = [name for name in outputs if name in pairs]
    ends = list(itertools.accumulate(pairs[name].a_SrI.shape[1] for name in names))
    return {
        name: ShrunkInput(outputs[name], slice(start, end), pairs[name].scale * dropout_scale)
        for name, start, end in zip(names, [0, *ends], ends, strict=False)
    }


def separate_gate_and_up(pairs: dict[str, LowRankPairs]) -> dict[str, LowRankPairs]:
    """Split a pair of `gate_up_proj`, whose B has the rows of both, into pairs of gate and up with the same A. Others are unchanged."""
    if "gate_up_proj" not in pairs:
        return pairs
    both = pairs["gate_up_proj"]
    of_a = (None, None) if both.b_for_a_SOr is None else both.b_for_a_SOr.chunk(2, dim=1)
    gate, up = (LowRankPairs(both.a_SrI, b, both.scale, for_a) for b, for_a in zip(both.b_SOr.chunk(2, dim=1), of_a, strict=True))
    return {"gate_proj": gate, "up_proj": up, **{name: of for name, of in pairs.items() if name != "gate_up_proj"}}


def lora_linear(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, pair: LowRankPairs, dropout: TokenDropout | None = None) -> Tensor:
    """Return W x + bias + scale · B A dropout(x), [tokens, outputs] in x's dtype, without temporaries of the output's size.

    It is differentiable in x and the pair, whose gradients have their own dtype, but not in the frozen weight.

    Args:
        pair: A [rank, inputs] and B [outputs, rank].
        dropout: the dropout of x's rows.
    """
    rows = None if dropout is None else dropout.rows()
    scale = pair.scale if rows is None else pair.scale * rows.scale
    return _LoraLinear.apply(x_TI, weight_OI, bias_O, scale, rows, *pair.matrices)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, scale: float, dropout: RowDropout | None, *pair: Any
    ) -> Tensor:
        a_rI, b_Or, _ = pair
        y_TO = F.linear(x_TI, weight_OI, bias_O)
        keep_TI = None if dropout is None else dropout.keep(x_TI.shape[1], x_TI.dtype)
        low_Tr = (x_TI if keep_TI is None else keep_TI.mul_(x_TI)) @ a_rI.to(x_TI.dtype).T
        y_TO.addmm_(low_Tr, b_Or.to(x_TI.dtype).T, alpha=scale)
        ctx.scale, ctx.dropped_levels = scale, None if dropout is None else dropout.dropped_levels
        ctx.save_for_backward(x_TI, weight_OI, low_Tr, None if dropout is None else dropout.word_R, *pair)
        return y_TO

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy_TO,) = grads
        x_TI, weight_OI, low_Tr, word_T, a_rI, b_Or, b_for_a_Or = ctx.saved_tensors
        dlow_Tr = (dy_TO @ b_Or.to(dy_TO.dtype)).mul_(ctx.scale)
        keep_TI = None if word_T is None else RowDropout(word_T, ctx.dropped_levels).keep(x_TI.shape[1], x_TI.dtype)
        db_Or = (dy_TO.T @ low_Tr).mul_(ctx.scale).to(b_Or.dtype)
        dx_TI, da_rI = None, None
        if ctx.needs_input_grad[5]:
            of_a_Tr = dlow_Tr if b_for_a_Or is None else (dy_TO @ b_for_a_Or.to(dy_TO.dtype)).mul_(ctx.scale)
            da_rI = (of_a_Tr.T @ (x_TI if keep_TI is None else keep_TI * x_TI)).to(a_rI.dtype)
        if ctx.needs_input_grad[0]:
            dx_TI = dy_TO @ weight_OI
            a = a_rI.to(dy_TO.dtype)
            if keep_TI is None:
                dx_TI.addmm_(dlow_Tr, a)
            else:
                dx_TI.addcmul_(dlow_Tr @ a, keep_TI)
        return dx_TI, None, None, None, None, da_rI, db_Or, None
