"""AdamW (arXiv 1711.05101) as a gradient rule: torch's own computation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.optim.adamw import adamw

from hecate.optim.rule import Stepped
from hecate.parallel.comm.reshard import RowSpec


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """A `GradientRule`."""

    weight_decay: float
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    exclude: tuple[str, ...] = ()
    """kinds of parameters without weight decay (`Stepped.kind`)"""

    def state_specs(self, parameter: RowSpec) -> dict[str, RowSpec]:
        """Two moments and the number of steps, which torch counts in float32."""
        return {"exp_avg": parameter, "exp_avg_sq": parameter, "step": RowSpec((), torch.float32)}

    def step(self, stepped: Sequence[Stepped], learning_rate: float) -> None:
        for excluded in (False, True):
            group = [one for one in stepped if (one.kind in self.exclude) == excluded]
            on_cpu = all(one.value.device.type == "cpu" for one in group)
            adamw(
                [one.value for one in group],
                [one.gradient for one in group],
                [one.state["exp_avg"] for one in group],
                [one.state["exp_avg_sq"] for one in group],
                [],
                [one.state["step"] for one in group],
                # On the CPU the fused step is one pass instead of ten. On a GPU it would keep the count of steps there; a step over all
                # parameters at once does not, and launches a few kernels instead of ten for each parameter.
                foreach=not on_cpu,
                fused=on_cpu,
                amsgrad=False,
                beta1=self.beta1,
                beta2=self.beta2,
                lr=learning_rate,
                weight_decay=0.0 if excluded else self.weight_decay,
                eps=self.epsilon,
                maximize=False,
            )
