"""Expert loads: how many tokens each rank sent to each expert, and what the next iteration will probably bring."""

from __future__ import annotations

from collections import deque

import numpy as np

from hecate.parallel.units import Unit, parse_unit


class LoadHistory:
    """The last `window` iterations' loads of every layer; predicts the next by their mean (Hecate §3.2, w = 5).

    A unit's loads are a LoadMatrix: int64 [source ranks, experts], token-slots routed from each rank to each expert.
    """

    def __init__(self, window: int) -> None:
        assert window >= 1, window
        self._steps: deque[dict[Unit, np.ndarray]] = deque(maxlen=window)

    def record(self, loads: dict[Unit, np.ndarray]) -> None:
        """Append one iteration: unit -> int64 [source ranks, experts]."""
        self._steps.append(loads)

    def predict(self, unit: Unit) -> np.ndarray | None:
        """float64 [source ranks, experts], or None before the first iteration."""
        if not self._steps:
            return None
        return np.mean([step[unit] for step in self._steps], axis=0)

    def snapshot(self) -> list[dict[Unit, np.ndarray]]:
        """The iterations held now, for `restore`; loads are never changed in place."""
        return list(self._steps)

    def restore(self, steps: list[dict[Unit, np.ndarray]]) -> None:
        """Be as at a `snapshot`."""
        self._steps.clear()
        self._steps.extend(steps)

    def redeal(self, world_size: int) -> None:
        """Of loads that other ranks have sent, say that each of `world_size` ranks sent the same share: totals stay."""
        self.restore([{unit: _redealt(loads_SE, world_size) for unit, loads_SE in step.items()} for step in self._steps])

    def state_dict(self) -> list[dict[str, list[list[int]]]]:
        """JSON-able; units as their texts."""
        return [{str(unit): loads.tolist() for unit, loads in step.items()} for step in self._steps]

    def load_state_dict(self, state: list[dict[str, list[list[int]]]]) -> None:
        self._steps.clear()
        for step in state:
            self.record({parse_unit(text): np.asarray(loads, dtype=np.int64) for text, loads in step.items()})


def _redealt(loads_SE: np.ndarray, world_size: int) -> np.ndarray:
    if len(loads_SE) == world_size:
        return loads_SE
    share_E, rest_E = np.divmod(loads_SE.sum(0), world_size)
    return share_E + (np.arange(world_size)[:, None] < rest_E)


def imbalance(loads_D: np.ndarray) -> float:
    """Largest over mean load of the ranks; 1.0 is perfect, and what an idle layer counts as."""
    mean = loads_D.mean()
    return float(loads_D.max() / mean) if mean > 0 else 1.0
