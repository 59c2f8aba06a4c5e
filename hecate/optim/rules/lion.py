"""Lion (arXiv 2302.06675), as bitsandbytes computes it with a moment of 32 bits. Each number is stepped by itself, so chunks as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hecate.parallel.values.optimizer_state import ParameterSpec, StateSpec

if TYPE_CHECKING:
    from hecate.optim.adamw import AdamW
    from hecate.optim.rule import Step, Stepped


def _state(parameter: ParameterSpec) -> dict[str, StateSpec]:
    return {"state1": StateSpec(parameter.shape, "float32")}


def _step(_settings: None, adamw: AdamW, _peak: float) -> Step:
    from hecate.optim.bitsandbytes_steps import in_memory, updates

    rates = (adamw.beta1, 0.0, 1)  # no epsilon, and a count of steps that only other optimizers read

    def step(stepped: Sequence[Stepped], learning_rate: float) -> None:
        for decay, group in adamw.by_decay(stepped):
            for one in group:
                memory = in_memory(one.gradient, one.value, one.state["state1"])
                updates().optimizer_update_32bit("lion", *memory, *rates, learning_rate, beta2=adamw.beta2, weight_decay=decay)

    return step


STATE, STEP, PACKAGE = _state, _step, "bitsandbytes"
