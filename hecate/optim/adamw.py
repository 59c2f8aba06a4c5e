"""AdamW (arXiv 1711.05101) as a gradient rule: torch's own computation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from hecate.optim.rule import Stepped
from hecate.parallel.comm.device_tables import copy_to
from hecate.parallel.comm.reshard import RowSpec


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """A `GradientRule`."""

    weight_decay: float
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    exclude: tuple[str, ...] = ()
    """The kinds of parameters without weight decay (`Stepped.kind`)."""

    def state_specs(self, parameter: RowSpec) -> dict[str, RowSpec]:
        """Two moments and the number of steps, which torch counts in float32."""
        return {"exp_avg": parameter, "exp_avg_sq": parameter, "step": RowSpec((), torch.float32)}

    def step(self, stepped: Sequence[Stepped], learning_rate: float) -> None:
        for excluded in (False, True):
            group = [parameter for parameter in stepped if (parameter.kind in self.exclude) == excluded]
            if not group:
                continue
            counts = [parameter.state["step"] for parameter in group]
            adamw(
                [parameter.value for parameter in group],
                [parameter.gradient for parameter in group],
                [parameter.state["exp_avg"] for parameter in group],
                [parameter.state["exp_avg_sq"] for parameter in group],
                [],
                _beside(counts, group[0].value.device),
                fused=True,
                amsgrad=False,
                beta1=self.beta1,
                beta2=self.beta2,
                lr=learning_rate,
                weight_decay=0.0 if excluded else self.weight_decay,
                eps=self.epsilon,
                maximize=False,
            )
            if group[0].value.device.type != "cpu":
                torch._foreach_add_(counts, 1)


def _beside(counts: list[Tensor], device: torch.device) -> list[Tensor]:
    """The counts of steps, where torch's fused step needs them: on a GPU copies, so that nobody has to read counts from there."""
    return counts if device.type == "cpu" else list(copy_to(torch.stack(counts), device).unbind())
