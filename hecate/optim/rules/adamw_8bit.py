"""AdamW with moments of 8 bits (arXiv 2110.02861), as bitsandbytes computes it, of each matrix: no block of moments crosses two."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hecate.parallel.values.optimizer_state import ParameterSpec, StateSpec, of_each

if TYPE_CHECKING:
    from hecate.optim.adamw import AdamW
    from hecate.optim.rule import Step, Stepped

_FEWEST, _BLOCK = 4096, 256
"""The numbers of a matrix from which its moments have 8 bits, and those of a block, which has a scale: bitsandbytes' own."""


def _of_one(parameter: ParameterSpec) -> dict[str, StateSpec]:
    numel = parameter.numel
    moment = StateSpec(parameter.shape, "float32" if numel < _FEWEST else "uint8")
    scales = {} if numel < _FEWEST else dict.fromkeys(("absmax1", "absmax2"), StateSpec((-(-numel // _BLOCK),), "float32"))
    return {"state1": moment, "state2": moment, **scales, "step": StateSpec((), "float32")}


def _step(_settings: None, adamw: AdamW, _peak: float) -> Step:
    from hecate.optim.bitsandbytes_steps import byte_values, in_memory, updates
    from hecate.optim.rule import stepped_tensors

    def step(stepped: Sequence[Stepped], learning_rate: float) -> None:
        for decay, group in adamw.by_decay(stepped_tensors(stepped)):
            for one in group:
                one.state["step"] += 1
                memory, betas = in_memory(one.gradient, one.value, one.state["state1"], one.state["state2"]), (adamw.beta1, adamw.beta2)
                rates = (adamw.epsilon, int(one.state["step"]), learning_rate)
                if "absmax1" in one.state:
                    scales = (*byte_values(one.value.device), one.state["absmax1"], one.state["absmax2"])
                    updates().optimizer_update_8bit_blockwise("adam", *memory, *betas, 0.0, 0.0, *rates, *scales, decay)
                else:
                    *memory, square = memory
                    updates().optimizer_update_32bit("adam", *memory, betas[0], *rates, square, betas[1], weight_decay=decay)

    return step


STATE, STEP, PACKAGE = of_each(_of_one), _step, "bitsandbytes"
