"""Predict the next step's loads from those of the last steps.

Every predictor is a weighted mean of them, which knows no more of a step than how long ago it was. Which one is best depends on the layer:
the mean where loads only scatter, the last step where they move. So each layer goes by the predictor that has been least wrong about the
loads that came. Frozen replicas stay for many steps, and a plan that followed each step's loads would move them again and again; layers
that have them go by the mean of all steps that are kept. Both are pure functions of the loads, so every rank comes to the same prediction.
`python -m benchmarks.prediction` compares the predictors.

Shapes: S steps, oldest first; P predictors, L layers, E experts, D ranks as sources.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

DECAYS: dict[str, float] = {"mean": 1.0, "slow": 0.7, "quick": 0.4, "last": 0.0}
"""predictor -> the weight of a step over that of the step after it: 1, the mean of all; 0, the last alone; between, exponential means"""
KEPT_WINDOWS = 2
"""how many windows of steps are kept: a step is predicted from one, and predictors are judged by the steps of another"""

# Machines of a job may have different processors. Products, sums and quotients of two numbers are the same on all of them, to the bit;
# powers, and matrix products, need not be.


def weights(num_steps: int) -> np.ndarray:
    """float64 [predictors, steps]: what each of the last steps counts in each prediction. A predictor's weights sum to 1."""
    decay_P = np.array(list(DECAYS.values()))
    by_age = [np.ones(len(decay_P))]
    for _ in range(num_steps - 1):
        by_age.append(by_age[-1] * decay_P)
    weight_PS = np.stack(by_age[::-1], axis=1)
    return np.asarray(weight_PS / weight_PS.sum(1, keepdims=True))


def prediction_errors(loads_SLE: np.ndarray, window: int) -> np.ndarray:
    """Return how wrong each predictor would have been about the last steps, `window` of them at most.

    Args:
        loads_SLE: assignments of all ranks to each expert.
        window: the most steps from which a step is predicted.

    Returns:
        float64 [predictors, layers]: the share of a step's assignments that came to other experts than was predicted (the total variation
        distance of the two distributions), summed over the steps. A step without one before it does not count.
    """
    steps, layers, _ = loads_SLE.shape
    error_PL = np.zeros((len(DECAYS), layers))
    for step in range(max(1, steps - window), steps):
        before_SLE = loads_SLE[max(0, step - window) : step]
        predicted_PLE = weighted_sum(weights(len(before_SLE)).T[..., None, None], before_SLE)
        error_PL += np.abs(_shares(predicted_PLE) - _shares(loads_SLE[step])).sum(-1) / 2
    return error_PL


def best_predictors(totals_SLE: np.ndarray, window: int) -> list[str]:
    """The predictor of each layer that has been least wrong about the last steps; of equal ones the first in `DECAYS`.

    Args:
        totals_SLE: assignments of all ranks to each expert.
    """
    names = list(DECAYS)
    return [names[index] for index in prediction_errors(totals_SLE, window).argmin(0)]


def best_weights(totals_SLE: np.ndarray, window: int) -> np.ndarray:
    """float64 [layers, steps]: what each of the last steps, `window` of them at most, counts in the prediction that was least wrong.

    Args:
        totals_SLE: of the last steps, of which there is one at least, and of those by which predictors are judged.
    """
    names = list(DECAYS)
    return weights(min(len(totals_SLE), window))[[names.index(name) for name in best_predictors(totals_SLE, window)]]


def predicted_loads(loads_SLED: np.ndarray, window: int, *, lasting: bool = False) -> np.ndarray:
    """float64 [layers, experts, ranks]: the next step's loads.

    Args:
        loads_SLED: of the last steps, of which there is one at least; those before the last `KEPT_WINDOWS` windows are left out.
        window: the most steps from which a step is predicted.
        lasting: what is planned from the prediction stays for many steps, as frozen replicas do.
    """
    kept_SLED = loads_SLED[-KEPT_WINDOWS * window :]
    if lasting:
        return np.asarray(kept_SLED.mean(0))
    weight_LS = best_weights(kept_SLED.sum(-1), window)
    return weighted_sum(weight_LS.T[..., None, None], kept_SLED[-window:])


def weighted_sum(weight_S: Sequence[Any] | np.ndarray, loads_S: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
    """float64, over the first dimension; all others are broadcast together."""
    total = weight_S[0] * loads_S[0]
    for weight, loads in zip(weight_S[1:], loads_S[1:], strict=True):
        total = total + weight * loads
    return np.asarray(total)


def _shares(loads_LE: np.ndarray) -> np.ndarray:
    total = loads_LE.sum(-1, keepdims=True)
    return np.divide(loads_LE, total, out=np.zeros(loads_LE.shape), where=total > 0)
