"""AdamW (arXiv 1711.05101), as torch computes it."""

from __future__ import annotations

from typing import Any

from hecate.parallel.values.optimizer_state import ParameterSpec, StateSpec


def _state(parameter: ParameterSpec) -> dict[str, StateSpec]:
    """Two moments and the number of steps, which torch counts in float32."""
    return {"exp_avg": StateSpec(parameter.shape), "exp_avg_sq": StateSpec(parameter.shape), "step": StateSpec((), "float32")}


def _step(_settings: None, adamw: Any, _peak: float) -> Any:
    return adamw.step


STATE, STEP = _state, _step
