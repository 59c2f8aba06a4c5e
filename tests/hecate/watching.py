"""Record the gradients that an optimizer is given and the state that it keeps, for tests that compare a run with a reference."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from hecate.optim.optimizer import ExpertOptimizer
from hecate.parallel.values.units import Unit


def gradients_of(optimizer: ExpertOptimizer) -> dict[str, Tensor | None]:
    """By name, the gradients of the step that was taken last, clipped as the optimizer sees them, which frees them: filled at each step."""
    seen: dict[str, Tensor | None] = {}
    clip_and_step = optimizer.step

    def step_and_look(
        grad_norm: float, limit: float | None, loads: dict[Unit, np.ndarray], norms: Sequence[float] = (), skip_above: float = math.inf
    ) -> bool:
        scale = limit / (grad_norm + 1e-6) if limit is not None and grad_norm > limit else 1.0
        for name, parameter in {**optimizer.owned, **optimizer.replicated}.items():
            seen[name] = None if parameter.grad is None else parameter.grad.detach() * scale
        return clip_and_step(grad_norm, limit, loads, norms, skip_above)

    optimizer.step = step_and_look  # type: ignore[method-assign]
    return seen


def moments_of(optimizer: ExpertOptimizer, name: str) -> dict[str, Tensor]:
    """Copies of an owned expert's moments; none before its first step."""
    return {key: value.clone() for key, value in optimizer.state_tensors().items() if key.startswith(f"owned/{name}/")}
