"""Adafactor (arXiv 1804.04235), as torch computes it, of each matrix: a number for each row and each column in the place of moments."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from hecate.parallel.values.optimizer_state import ParameterSpec, StateSpec, of_each

if TYPE_CHECKING:
    from hecate.optim.adamw import AdamW
    from hecate.optim.rule import Step, Stepped


def _of_one(parameter: ParameterSpec) -> dict[str, StateSpec]:
    *above, last = parameter.shape
    factors = {"row_var": StateSpec((*above, 1)), "col_var": StateSpec((*above[:-1], 1, last))}
    return (factors if above else {"variance": StateSpec(parameter.shape)}) | {"step": StateSpec((), "float32")}


def _step(_settings: None, adamw: AdamW, _peak: float) -> Step:
    from torch.optim import Adafactor

    from hecate.optim.rule import step_with, stepped_tensors

    def step(stepped: Sequence[Stepped], learning_rate: float) -> None:
        for decay, group in adamw.by_decay(stepped_tensors(stepped)):
            step_with(partial(Adafactor, lr=learning_rate, weight_decay=decay), group)

    return step


STATE, STEP = of_each(_of_one), _step
