"""ALLoRA's gradients written out: the product B A is made, and its rows' norms are taken of it. Shares no code with hecate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class RowNormProduct(torch.autograd.Function):
    """B A x, where each output row's gradient is multiplied by 1 / sqrt(norm of the row of B A + 1 / eta^2), but not on its way to x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, eta: float) -> Tensor:
        ctx.save_for_backward(x, a, b)
        ctx.eta = eta
        return x @ (b @ a).T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        x, a, b = ctx.saved_tensors
        product = b @ a
        factor = torch.stack([1 / (row.norm() + 1 / ctx.eta**2).sqrt() for row in product])
        dproduct = (factor * dy).flatten(0, -2).T @ x.flatten(0, -2)
        return dy @ product, b.T @ dproduct, dproduct @ a.T, None


def row_norm_product(x: Tensor, a: Tensor, b: Tensor, eta: float) -> Tensor:
    return RowNormProduct.apply(x, a, b, eta)
