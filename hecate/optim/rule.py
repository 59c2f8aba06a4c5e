"""Gradient rules: what a step does to a parameter, from its gradient and from what earlier steps have left. AdamW is one; others are in
`hecate.optim.rules`.

A rule is a value. What it keeps of each parameter is held, saved, sent to backups and moved with the experts by `ExpertOptimizer`, which
reads no more of it than names, shapes and types. An expert is stepped as one flat chunk, on its owner and on its backup alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from hecate.parallel.comm.reshard import RowSpec
from hecate.parallel.values.layout import TensorSpec


@dataclass(frozen=True, eq=False)
class Stepped:
    """A parameter that a step changes, with its gradient and what the rule keeps of it."""

    name: str
    """The parameter's name in checkpoints: an expert's, such as `3.7`, or that of a replicated parameter."""
    value: Tensor
    """The parameter, changed in place."""
    gradient: Tensor
    """The gradient, summed over all ranks, and clipped."""
    state: dict[str, Tensor]
    """The tensors of `GradientRule.state_specs`, changed in place; all zero in the parameter's first step."""
    kind: str | None
    """The kind of the parameter: `routers`, `biases` or `norms`; None: a matrix, or an expert's chunk."""
    chunk: tuple[TensorSpec, ...] = ()
    """The tensors that lie in an expert's chunk, in this order; empty for other parameters."""

    def cut(self, flat: Tensor) -> dict[str, Tensor]:
        """The views of an expert's tensors, by name, in a tensor that is laid out as its chunk: its value, its gradient, or a state."""
        parts = flat.split([spec.numel for spec in self.chunk])
        return {spec.name: part.view(spec.shape) for spec, part in zip(self.chunk, parts, strict=True)}


class GradientRule(Protocol):
    """How parameters are stepped.

    All ranks that step a parameter must come to the same bits: an expert's owner and the rank of its backup, or every rank. So what a
    step does to a parameter may depend on nothing but its own `Stepped`, and those of parameters that are on the same ranks.
    """

    def state_specs(self, parameter: RowSpec) -> dict[str, RowSpec]:
        """The tensors that are kept of a parameter like this from its first step on, by name, in the order in which they travel.

        Tensors of no dimension are kept on the CPU, others with their parameter. Of a parameter that tensor parallelism cuts, those of its
        shape are cut with it.
        """

    def step(self, stepped: Sequence[Stepped], learning_rate: float) -> None:
        """Step these parameters, which are all that have a gradient on this rank. Autograd records nothing of it."""


def kind_of_parameter(name: str, parameter: Tensor) -> str | None:
    """`routers`, `biases` or `norms`, or None for another matrix. `name` is what checkpoints call a replicated parameter."""
    if name.endswith(".router"):
        return "routers"
    if name.endswith(".bias"):
        return "biases"
    if parameter.dim() == 1:
        return "norms"
    return "routers" if name.startswith("layers.") and ".router." in name else None
