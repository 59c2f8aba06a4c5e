"""Parameters that a model computes with in bfloat16 and that are trained in float32.

Between two neighbouring bfloat16 numbers lies a 128th to a 256th of their value, and most steps of AdamW are smaller, so that a weight of
this type would stay what it is. A *master* in float32 takes the steps instead; the model's weight is the master, rounded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def train_in_float32(model: nn.Module, parameters: Mapping[str, nn.Parameter], dtype: torch.dtype) -> dict[str, nn.Parameter]:
    """Have `model` compute in a narrower type, and return its masters, which begin with what the parameters are.

    From then on each forward pass of the model begins with a copy of the masters, rounded, to the parameters. A backward pass adds the
    gradient of each parameter to its master's as soon as it is complete, and leaves none at the parameter: micro-steps are added up in
    float32.

    Args:
        model: the module that is called first in every forward pass.
        parameters: by name, in float32.
        dtype: in which they are from now on.

    Returns:
        The masters, by the names of `parameters`; they are no parameters of the model. Whoever changes one must leave it without a
        gradient, as an optimizer's step does: a master with a gradient is in the middle of a step, where it is copied no second time.
    """
    masters = {name: nn.Parameter(parameter.detach().clone()) for name, parameter in parameters.items()}
    pairs = [(parameter, masters[name]) for name, parameter in parameters.items()]
    for parameter, master in pairs:
        parameter.data = parameter.data.to(dtype)
        parameter.register_post_accumulate_grad_hook(_giver_to(master))
    model.register_forward_pre_hook(lambda *_: _copy_rounded(pairs))
    return masters


def _copy_rounded(pairs: list[tuple[nn.Parameter, nn.Parameter]]) -> None:
    changed = [(parameter, master) for parameter, master in pairs if master.grad is None]
    if changed:
        with torch.no_grad():
            torch._foreach_copy_([parameter for parameter, _ in changed], [master for _, master in changed])


def _giver_to(master: nn.Parameter) -> Any:
    def give(parameter: Tensor) -> None:
        assert parameter.grad is not None
        if master.grad is None:
            master.grad = parameter.grad.to(master.dtype)
        else:
            master.grad += parameter.grad
        parameter.grad = None

    return give
