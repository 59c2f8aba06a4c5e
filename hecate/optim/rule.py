"""Gradient rules: what a step does to a parameter, from its gradient and from what earlier steps have left. They are made by the files of
`hecate.optim.rules`.

A rule is a value. What it keeps of each parameter is held, saved, sent to backups and moved with the experts by `ExpertOptimizer`, which
reads no more of it than names, shapes and types. An expert is one flat chunk, on its owner and on its backup alike; a rule steps it as a
whole, or each of the tensors that lie in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor
from torch.optim import Optimizer

from hecate.model.sizes.base_shape import LAYER
from hecate.parallel.values.layout import TensorSpec
from hecate.parallel.values.optimizer_state import ParameterSpec, State


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
    """The kind of the parameter (`kind_of_parameter`); None of an expert's chunk."""
    chunk: tuple[TensorSpec, ...] = ()
    """The tensors that lie in an expert's chunk, in this order; empty for other parameters."""

    @property
    def spec(self) -> ParameterSpec:
        """The parameter without its numbers."""
        return ParameterSpec(tuple(self.value.shape), self.kind, self.chunk)

    def cut(self, flat: Tensor) -> dict[str, Tensor]:
        """The views of an expert's tensors, by name, in a tensor that is laid out as its chunk: its value, its gradient, or a state."""
        parts = flat.split([spec.numel for spec in self.chunk])
        return {spec.name: part.view(spec.shape) for spec, part in zip(self.chunk, parts, strict=True)}


Step = Callable[[Sequence[Stepped], float], None]


@dataclass(frozen=True)
class GradientRule:
    """How parameters are stepped.

    All ranks that step a parameter must come to the same bits: an expert's owner and the rank of its backup, or every rank. So what a
    step does to a parameter may depend on nothing but its own `Stepped`, and those of parameters that are on the same ranks.
    """

    state_specs: State
    """Returns the tensors that are kept of a parameter from its first step on, by name, in the order in which they travel.

    Tensors of no dimension are kept on the CPU, others with their parameter. Of a parameter that tensor parallelism cuts, those of its
    shape are cut with it.
    """
    step: Step
    """Steps parameters, which are all that have a gradient on this rank, at a learning rate. Autograd records nothing of it."""


def stepped_tensors(stepped: Iterable[Stepped]) -> list[Stepped]:
    """The tensors of experts' chunks, as views, with what is kept of each (`of_each`); and other parameters as they are."""
    found: list[Stepped] = []
    for one in stepped:
        values, gradients = (one.cut(one.value), one.cut(one.gradient)) if one.chunk else ({}, {})
        for name, value in values.items():
            state = {key.removeprefix(name)[1:]: kept for key, kept in one.state.items() if key.rpartition(".")[0] == name}
            found.append(replace(one, name=f"{one.name}.{name}", value=value, gradient=gradients[name], state=state, chunk=()))
        found += [] if one.chunk else [one]
    return found


def step_with(make: Callable[[list[Tensor]], Optimizer], stepped: Sequence[Stepped]) -> None:
    """Have an optimizer of torch step parameters. It finds what it keeps of them, by its own names, where `Stepped.state` has it.

    Args:
        make: returns the optimizer of these values. It holds nothing from one step to the next.
    """
    if not stepped:
        return
    values = [one.value.detach() for one in stepped]
    optimizer = make(values)
    for value, one in zip(values, stepped, strict=True):
        value.grad = one.gradient
        optimizer.state[value] = one.state
    optimizer.step()


def kind_of_parameter(name: str, parameter: Tensor) -> str | None:
    """`routers`, `biases` or `norms`; `embeddings` for other matrices outside the decoder layers, the output layer's among them; None: one
    within. `name` is what checkpoints call a replicated parameter."""
    if name.endswith(".router"):
        return "routers"
    if name.endswith(".bias"):
        return "biases"
    if parameter.dim() == 1:
        return "norms"
    if name.startswith("layers.") and ".router." in name:
        return "routers"
    return None if LAYER.search(name) else "embeddings"
