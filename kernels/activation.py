"""The gating activations of FFNs: forward, derivative, both able to write into a given buffer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
"""SiLU; GELU by the error function; GELU by its tanh approximation (Gemma)."""

_APPROXIMATE = {"gelu": "none", "gelu_tanh": "tanh"}


def activation(name: str, x: Tensor) -> Tensor:
    """act(x), differentiable by autograd."""
    return F.silu(x) if name == "silu" else F.gelu(x, approximate=_APPROXIMATE[name])


def activation_into(name: str, x: Tensor, out: Tensor) -> Tensor:
    """act(x), written into `out`; no autograd."""
    if name == "silu":
        return torch.ops.aten.silu.out(x, out=out)
    return torch.ops.aten.gelu.out(x, approximate=_APPROXIMATE[name], out=out)


def activation_backward_into(name: str, grad: Tensor, x: Tensor, out: Tensor) -> Tensor:
    """grad · act'(x), written into `out`."""
    if name == "silu":
        return torch.ops.aten.silu_backward.grad_input(grad, x, grad_input=out)
    return torch.ops.aten.gelu_backward.grad_input(grad, x, approximate=_APPROXIMATE[name], grad_input=out)
