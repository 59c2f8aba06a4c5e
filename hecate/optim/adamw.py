"""AdamW (arXiv 1711.05101) as a gradient rule: torch's own computation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from hecate.optim.rule import Stepped
from hecate.optim.rules.adamw import STATE
from hecate.parallel.comm.device_tables import copy_to
from hecate.parallel.values.optimizer_state import ParameterSpec, StateSpec


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """A `GradientRule`."""

    weight_decay: float
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    exclude: tuple[str, ...] = ()
    """The kinds of parameters without weight decay (`Stepped.kind`)."""

    def state_specs(self, parameter: ParameterSpec) -> dict[str, StateSpec]:
        return STATE(parameter)

    def by_decay(self, stepped: Sequence[Stepped]) -> Iterator[tuple[float, list[Stepped]]]:
        """The weight decays, and the parameters that each is for; nothing for none."""
        for decay, excluded in ((self.weight_decay, False), (0.0, True)):
            if group := [parameter for parameter in stepped if (parameter.kind in self.exclude) == excluded]:
                yield decay, group

    def step(self, stepped: Sequence[Stepped], learning_rate: float) -> None:
        for decay, group in self.by_decay(stepped):
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
                weight_decay=decay,
                eps=self.epsilon,
                maximize=False,
            )
            if group[0].value.device.type != "cpu":
                torch._foreach_add_(counts, 1)


def _beside(counts: list[Tensor], device: torch.device) -> list[Tensor]:
    """The counts of steps, where torch's fused step needs them: on a GPU copies, so that nobody has to read counts from there."""
    return counts if device.type == "cpu" else list(copy_to(torch.stack(counts), device).unbind())
