"""Expert loads: how many assignments each rank sent to each expert, and a prediction of the next iteration's loads.

An *assignment* is a token together with one of its top-k experts, so a token makes k of them. Loads count assignments, never tokens.
A layer's loads are [experts, source ranks] everywhere in memory: in the history, in `PlanInput`, in flows and cost model; files that
keep another order (docs/use/traces.md, the history in a checkpoint) are converted where they are read and written.

Shapes: E experts, D ranks as sources.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from hecate.parallel.values.predictors import KEPT_WINDOWS, best_weights, weighted_sum
from hecate.parallel.values.units import Unit, parse_unit


class LoadHistory:
    """The last iterations' loads of every layer, from which the next one's are predicted (`hecate.parallel.values.predictors`).

    A unit's loads of an iteration are int64 [experts, source ranks].

    Args:
        window: the most iterations from which the next is predicted. `KEPT_WINDOWS` times as many are kept.
    """

    def __init__(self, window: int) -> None:
        assert window >= 1, window
        self.window = window
        self._steps: deque[dict[Unit, np.ndarray]] = deque(maxlen=KEPT_WINDOWS * window)
        self._totals: deque[dict[Unit, np.ndarray]] = deque(maxlen=KEPT_WINDOWS * window)
        """the assignments of all ranks to each expert, int64 [experts]: summed once, since each step is looked at many times"""

    def record(self, loads: dict[Unit, np.ndarray]) -> None:
        """Append one iteration: unit -> int64 [experts, source ranks]."""
        self._steps.append(loads)
        self._totals.append({unit: loads_ED.sum(1) for unit, loads_ED in loads.items()})

    def copy(self) -> LoadHistory:
        """One that holds the same iterations, and records others apart from this one."""
        other = LoadHistory(self.window)
        other._steps.extend(self._steps)
        other._totals.extend(self._totals)
        return other

    def recent(self, units: Sequence[Unit]) -> np.ndarray | None:
        """int64 [iterations, units, experts, source ranks], oldest first, of units with the same number of experts; None before the first
        iteration."""
        return np.stack([[step[unit] for unit in units] for step in self._steps]) if self._steps else None

    def predict(self, units: Sequence[Unit], *, lasting: bool = False) -> np.ndarray | None:
        """float64 [units, experts, source ranks], or None before the first iteration.

        Args:
            units: with the same number of experts.
            lasting: see `predicted_loads`.
        """
        steps = list(self._steps)
        if not steps:
            return None
        if lasting:
            return np.stack([np.mean([step[unit] for step in steps], axis=0) for unit in units])
        weight_LS = best_weights(np.stack([[totals[unit] for unit in units] for totals in self._totals]), self.window)
        last = steps[-self.window :]
        return np.stack([weighted_sum(weight_S, [step[unit] for step in last]) for unit, weight_S in zip(units, weight_LS, strict=True)])

    def snapshot(self) -> list[dict[Unit, np.ndarray]]:
        """The iterations held now, for `restore`; loads are never changed in place."""
        return list(self._steps)

    def restore(self, steps: list[dict[Unit, np.ndarray]]) -> None:
        """Hold the iterations of a `snapshot` again."""
        self._steps.clear()
        self._totals.clear()
        for step in steps:
            self.record(step)

    def redeal(self, world_size: int) -> None:
        """Spread each expert's loads evenly over `world_size` source ranks, in place of those that sent them: totals stay."""
        self.restore([{unit: _redealt(loads_ED, world_size) for unit, loads_ED in step.items()} for step in self._steps])

    def state_dict(self) -> list[dict[str, list[list[int]]]]:
        """JSON-able: units as their texts, a unit's loads as one list a source rank."""
        return [{str(unit): loads_ED.T.tolist() for unit, loads_ED in step.items()} for step in self._steps]

    def load_state_dict(self, state: list[dict[str, list[list[int]]]]) -> None:
        """Hold the iterations of a `state_dict`. Raises AttributeError, TypeError or ValueError if it is none."""
        steps = [{parse_unit(text): np.array(loads, dtype=np.int64).T.copy() for text, loads in step.items()} for step in state]
        if any(loads_ED.ndim != 2 or (loads_ED < 0).any() for step in steps for loads_ED in step.values()):
            raise ValueError("loads must be lists of counts, one for each source rank")
        self.restore(steps)


def _redealt(loads_ED: np.ndarray, world_size: int) -> np.ndarray:
    if loads_ED.shape[1] == world_size:
        return loads_ED
    share_E1, rest_E1 = np.divmod(loads_ED.sum(1, keepdims=True), world_size)
    return share_E1 + (np.arange(world_size) < rest_E1)


def imbalance(loads_D: np.ndarray) -> float:
    """Largest over mean load of the ranks; 1.0 is perfect, and what an idle layer counts as."""
    mean = loads_D.mean()
    return float(loads_D.max() / mean) if mean > 0 else 1.0
