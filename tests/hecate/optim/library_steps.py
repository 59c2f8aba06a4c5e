"""What the libraries' own optimizers make of parameters, in one process: the reference of every rule.

Each matrix is a parameter of its own. Gradients are random, by the names of the parameter and the step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hecate.optim.adamw import AdamW
from hecate.optim.rule import GradientRule
from hecate.optim.rules import adafactor, adamw_8bit, lion, muon
from hecate.optim.rules import adamw as plain_adamw

PEAK, ADAMW_PEAK, DECAY, BETAS, EPSILON = 0.02, 0.005, 0.1, (0.8, 0.95), 1e-6
OPTIM = {"adamw": plain_adamw, "muon": muon, "adamw_8bit": adamw_8bit, "adafactor": adafactor, "lion": lion}
"""each in a file of its name"""
BY_BITSANDBYTES = ("adamw_8bit", "lion")


def dtype_of(optim: str) -> torch.dtype:
    return torch.float32 if optim in BY_BITSANDBYTES else torch.float64


def rule(optim: str, exclude: tuple[str, ...] = (), **settings: Any) -> GradientRule:
    """As the configuration makes it, with the numbers above."""
    module = OPTIM[optim]
    if optim == "muon":
        settings = {"adamw_learning_rate": ADAMW_PEAK, **settings}
    of_section = module.SETTINGS(**settings) if hasattr(module, "SETTINGS") else None
    adamw = AdamW(weight_decay=DECAY, beta1=BETAS[0], beta2=BETAS[1], epsilon=EPSILON, exclude=exclude)
    return GradientRule(module.STATE, module.STEP(of_section, adamw, PEAK))


def gradient(name: str, step: int, like: Tensor) -> Tensor:
    """Larger in some places than in others, as gradients are."""
    random = torch.Generator().manual_seed(1000 * step + sum(map(ord, name)))
    size = torch.randn(like.shape, generator=random, dtype=torch.float64) * torch.rand(like.shape, generator=random, dtype=torch.float64)
    return size.to(like.dtype)


def library_steps(
    optim: str,
    tensors: Mapping[str, Tensor],
    steps: int,
    factor: Callable[[int], float],
    gradient_of: Callable[[str, int], Tensor | None],
    *,
    by_adamw: tuple[str, ...] = (),
    excluded: tuple[str, ...] = (),
    adjust: str = "match_rms_adamw",
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """The tensors after so many steps, and what the library keeps of each.

    Args:
        factor: of the peak learning rate, by step.
        gradient_of: by name and step; None: the tensor is not stepped.
        by_adamw: the names of those that Muon leaves to AdamW.
        excluded: the names of those without weight decay.
    """
    parameters = {name: nn.Parameter(tensor.detach().clone(memory_format=torch.contiguous_format)) for name, tensor in tensors.items()}
    optimizers = []
    for name, parameter in parameters.items():
        decay = 0.0 if name in excluded else DECAY
        optimizer, peak = _of_library(optim if name not in by_adamw else "adamw", parameter, decay, adjust), PEAK
        if name in by_adamw and optim == "muon":
            peak = ADAMW_PEAK
        optimizers.append((name, parameter, optimizer, peak))
    for step in range(steps):
        for name, parameter, optimizer, peak in optimizers:
            given = gradient_of(name, step)
            if given is not None:
                parameter.grad = given.clone(memory_format=torch.contiguous_format)
                optimizer.param_groups[0]["lr"] = peak * factor(step)
                optimizer.step()
    return {name: parameter.detach() for name, parameter in parameters.items()}, {name: o.state[p] for name, p, o, _ in optimizers}


def _of_library(optim: str, parameter: nn.Parameter, decay: float, adjust: str) -> torch.optim.Optimizer:
    if optim == "muon":
        return torch.optim.Muon([parameter], lr=PEAK, weight_decay=decay, momentum=0.95, adjust_lr_fn=adjust)
    if optim == "adafactor":
        return torch.optim.Adafactor([parameter], lr=PEAK, weight_decay=decay)
    if optim == "adamw":
        return torch.optim.AdamW([parameter], lr=PEAK, betas=BETAS, eps=EPSILON, weight_decay=decay, fused=True)
    import bitsandbytes

    if optim == "lion":
        return bitsandbytes.optim.Lion([parameter], lr=PEAK, betas=BETAS, weight_decay=decay)
    return bitsandbytes.optim.AdamW8bit([parameter], lr=PEAK, betas=BETAS, eps=EPSILON, weight_decay=decay)
