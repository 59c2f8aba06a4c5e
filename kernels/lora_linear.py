"""A frozen linear layer with one low-rank pair, forward and backward without temporaries of the output's size."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hecate.kernels.dropout import Dropout


def lora_linear(
    x_TI: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None,
    a_rI: Tensor,
    b_Or: Tensor,
    scale: float,
    *,
    dropout: Dropout | None = None,
    token_T: Tensor | None = None,
    stream: int = 0,
) -> Tensor:
    """W x + bias + scale · B A dropout(x): [tokens, outputs], in x's dtype.

    Differentiable in x and the pair, whose gradients come in their own dtype; not in the frozen weight.

    Args:
        dropout: needs `token_T` (int64 [tokens], global token numbers) and `stream` (see `Dropout.rows`).
    """
    row_T = None
    if dropout is not None:
        assert token_T is not None
        row_T = dropout.rows(token_T, stream)
        scale *= dropout.scale
    return _LoraLinear.apply(x_TI, weight_OI, bias_O, a_rI, b_Or, scale, dropout, row_T)


def _keep(like: Tensor, dropout: Dropout | None, row_T: Tensor | None) -> Tensor | None:
    """1 where dropout keeps an element and 0 where it drops it; None without dropout."""
    if dropout is None or row_T is None:
        return None
    return dropout.keep_into(row_T, dropout.scratch(like), torch.empty_like(like))


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
        dropout: Dropout | None,
        row_T: Tensor | None,
    ) -> Tensor:
        y_TO = F.linear(x_TI, weight_OI, bias_O)
        keep_TI = _keep(x_TI, dropout, row_T)
        low_Tr = (x_TI if keep_TI is None else keep_TI.mul_(x_TI)) @ a_rI.to(x_TI.dtype).T
        y_TO.addmm_(low_Tr, b_Or.to(x_TI.dtype).T, alpha=scale)
        ctx.scale, ctx.dropout = scale, dropout
        ctx.save_for_backward(x_TI, weight_OI, a_rI, b_Or, low_Tr, row_T)
        return y_TO

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy_TO,) = grads
        x_TI, weight_OI, a_rI, b_Or, low_Tr, row_T = ctx.saved_tensors
        dlow_Tr = (dy_TO @ b_Or.to(dy_TO.dtype)).mul_(ctx.scale)
        keep_TI = _keep(x_TI, ctx.dropout, row_T)
        da_rI = (dlow_Tr.T @ (x_TI if keep_TI is None else keep_TI * x_TI)).to(a_rI.dtype)
        db_Or = (dy_TO.T @ low_Tr).mul_(ctx.scale).to(b_Or.dtype)
        dx_TI = None
        if ctx.needs_input_grad[0]:
            dx_TI = dy_TO @ weight_OI
            a = a_rI.to(dy_TO.dtype)
            if keep_TI is None:
                dx_TI.addmm_(dlow_Tr, a)
            else:
                dx_TI.addcmul_(dlow_Tr @ a, keep_TI)
        return dx_TI, None, None, da_rI, db_Or, None, None, None
