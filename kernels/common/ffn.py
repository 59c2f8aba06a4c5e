"""The activation and the weights of the gated feed-forward network (FFN) of an expert, down(act(gate(x)) · up(x)) without biases."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hecate.kernels.common.operands import Operands

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
"""SiLU; GELU by the error function; GELU by its tanh approximation (Gemma)."""

_APPROXIMATE = {"gelu": "none", "gelu_tanh": "tanh"}


@dataclass(frozen=True)
class FfnBase(Operands):
    """The frozen FFN that all experts of a MixLoRA layer share."""

    gate_FD: Tensor
    up_FD: Tensor
    down_DF: Tensor
    activation: str


@dataclass(frozen=True)
class FfnShape(Operands):
    """The sizes of an FFN whose weights are stored in one flat chunk: gate [F, D], up [F, D], down [D, F]."""

    hidden: int
    """D, the width of a token's row"""
    ffn: int
    """F, the inner width"""
    activation: str

    @property
    def numel(self) -> int:
        return 3 * self.hidden * self.ffn

    def matrices(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """Return views of a chunk: gate and up as one matrix [2F, D], and down [D, F]."""
        gate_up, down = flat.split((2 * self.hidden * self.ffn, self.hidden * self.ffn))
        return gate_up.view(2 * self.ffn, self.hidden), down.view(self.hidden, self.ffn)

    def stacked_matrices(self, flat_SC: Tensor) -> tuple[Tensor, Tensor]:
        """Return the views of `matrices` for a chunk per slot: [S, 2F, D] and [S, D, F]."""
        gate_up, down = flat_SC.split((2 * self.hidden * self.ffn, self.hidden * self.ffn), dim=1)
        return gate_up.unflatten(1, (2 * self.ffn, self.hidden)), down.unflatten(1, (self.hidden, self.ffn))


def gradient_dtype(weights: Tensor) -> torch.dtype:
    """The type of the gradient of trained weights: their own, but at least float32, because gradients are summed over tokens and ranks."""
    return torch.promote_types(weights.dtype, torch.float32)


def product_into(out: Tensor, left: Tensor, right: Tensor, *, add: bool) -> None:
    """Write left @ right into `out`, or add it to `out`. Sums over several calls have out's type."""
    if out.dtype == left.dtype:
        out.addmm_(left, right, beta=1 if add else 0)
    elif add:
        out += left @ right
    else:
        out.copy_(left @ right)


def activation(name: str, x: Tensor) -> Tensor:
    """Return act(x), differentiable by autograd."""
    return F.silu(x) if name == "silu" else F.gelu(x, approximate=_APPROXIMATE[name])


def activation_into(name: str, x: Tensor, out: Tensor) -> Tensor:
    """Write act(x) into `out` and return it, without autograd."""
    if name == "silu":
        return torch.ops.aten.silu.out(x, out=out)
    return torch.ops.aten.gelu.out(x, approximate=_APPROXIMATE[name], out=out)


def activation_backward_into(name: str, grad: Tensor, x: Tensor, out: Tensor) -> Tensor:
    """Write grad · act'(x) into `out` and return it."""
    if name == "silu":
        return torch.ops.aten.silu_backward.grad_input(grad, x, grad_input=out)
    return torch.ops.aten.gelu_backward.grad_input(grad, x, approximate=_APPROXIMATE[name], grad_input=out)
