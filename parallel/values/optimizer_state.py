"""What an optimizer keeps of a parameter beside it, as shapes without numbers: moments, factors of moments, counts of steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from hecate.parallel.values.layout import TensorSpec

_BYTES = {"float32": 4, "uint8": 1}


@dataclass(frozen=True)
class StateSpec:
    """One tensor that an optimizer keeps of a parameter. What has no dimension is one number, such as a count of steps."""

    shape: tuple[int, ...]
    dtype: str | None = None
    """`float32` or `uint8`; None: the parameter's own"""


@dataclass(frozen=True)
class ParameterSpec:
    """A parameter that an optimizer steps, without its numbers."""

    shape: tuple[int, ...]
    kind: str | None = None
    """see `hecate.optim.rule.kind_of_parameter`"""
    chunk: tuple[TensorSpec, ...] = ()
    """the tensors that lie in an expert's chunk, which is flat, in this order; empty for other parameters"""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


State = Callable[[ParameterSpec], dict[str, StateSpec]]
"""what an optimizer keeps of a parameter, by name"""


def of_each(state: State) -> State:
    """What an optimizer keeps that steps each tensor of an expert's chunk by itself. Their names are TENSOR.NAME."""

    def of_all(parameter: ParameterSpec) -> dict[str, StateSpec]:
        if not parameter.chunk:
            return state(parameter)
        return {f"{one.name}.{name}": spec for one in parameter.chunk for name, spec in state(ParameterSpec(one.shape)).items()}

    return of_all


def expert_spec(chunk: tuple[TensorSpec, ...]) -> ParameterSpec:
    """An expert of these tensors."""
    return ParameterSpec((sum(tensor.numel for tensor in chunk),), chunk=chunk)


@cache
def owner_bytes(state: State, parameter: ParameterSpec, number_bytes: int) -> float:
    """The bytes of a parameter whose numbers have `number_bytes`, and of what is kept of it; tensors of no dimension are not counted."""
    kept = [spec for spec in state(parameter).values() if spec.shape]
    return float(number_bytes * parameter.numel + sum(math.prod(spec.shape) * _BYTES.get(spec.dtype or "", number_bytes) for spec in kept))


def kept_tensors(state: State, parameter: ParameterSpec) -> int:
    """The number of tensors that are kept of a parameter, those of no dimension not counted."""
    return sum(bool(spec.shape) for spec in state(parameter).values())
