"""Gradients of output rows by the norms of the rows of B A (ALLoRA, arXiv 2410.09692).

Shapes: r rank, I inputs and O outputs of a projection; slots may stand in front.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hecate.kernels.common.low_rank import LowRankPairs
from hecate.parallel.values.expert_kinds import LoraShape


def _rule(pairs: LowRankPairs, lora: LoraShape) -> LowRankPairs:
    assert lora.eta is not None
    return row_norm(pairs, lora.eta)


def row_norm(pairs: LowRankPairs, eta: float) -> LowRankPairs:
    """Multiply the gradient of each output row by `row_factors` before it reaches A and B.

    This gives B the gradient f · dB, and A the one that it would have if B were f · B.
    """
    with torch.no_grad():
        factor_O1 = row_factors(pairs.a_SrI, pairs.b_SOr, eta)[..., None].to(pairs.b_SOr.dtype)
        b_for_a = pairs.b_SOr * factor_O1 if pairs.a_SrI.requires_grad else None
    return replace(pairs, b_SOr=_ScaledGradient.apply(pairs.b_SOr, factor_O1), b_for_a_SOr=b_for_a)


def row_factors(a_rI: Tensor, b_Or: Tensor, eta: float) -> Tensor:
    """Return 1 / sqrt(|row of B A| + 1 / eta^2) for each output row, [.., O]; it is eta where B is zero.

    B A itself is not made: the norms follow from A A'.
    """
    squares = ((b_Or @ (a_rI @ a_rI.mT)) * b_Or).sum(-1)
    return (squares.clamp(min=0).sqrt() + eta**-2).sqrt().reciprocal()


class _ScaledGradient(torch.autograd.Function):
    """A view of a tensor, whose gradient is multiplied by a factor on its way back."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (factor,) = ctx.saved_tensors
        return grads[0] * factor, None


RULE = _rule
