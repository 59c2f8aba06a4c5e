"""Which predictor a layer goes by, and what it says."""

from __future__ import annotations

import numpy as np
import pytest

from hecate.parallel.simulate.workloads import WORKLOADS
from hecate.parallel.values.predictors import best_predictors, predicted_loads, prediction_errors, weights

WINDOW = 5


def of_one_layer(*steps: list[int]) -> np.ndarray:
    """[steps, 1, experts, 1]"""
    return np.array(steps, dtype=np.int64)[:, None, :, None]


def test_weights_by_hand() -> None:
    mean, slow, quick, last = weights(3)
    assert mean.tolist() == pytest.approx([1 / 3] * 3)
    assert slow.tolist() == pytest.approx([0.49 / 2.19, 0.7 / 2.19, 1 / 2.19])
    assert quick.tolist() == pytest.approx([0.16 / 1.56, 0.4 / 1.56, 1 / 1.56])
    assert last.tolist() == [0, 0, 1]


def test_errors_by_hand() -> None:
    """The second step has a quarter of its tokens elsewhere than the first one; the third is as the second, though of fewer tokens."""
    loads_SLE = of_one_layer([8, 0], [6, 2], [3, 1])[..., 0]
    error_PL = prediction_errors(loads_SLE, WINDOW)
    # Each predictor knows but one step first. Then the mean expects an eighth elsewhere, and the last step nothing.
    assert error_PL[[0, 3], 0].tolist() == pytest.approx([0.25 + 0.125, 0.25])
    assert prediction_errors(loads_SLE[:2], 1).tolist() == [[0.25]] * 4, "one step says the same to all of them"


def test_each_layer_goes_by_its_own_predictor() -> None:
    """One layer swings about its mean, the other changes for good and stays."""
    swinging = of_one_layer(*[[60, 40], [40, 60]] * 5)
    settling = of_one_layer(*[[90, 10]] * 7, *[[10, 90]] * 3)
    both = np.concatenate([swinging, settling], axis=1)
    assert best_predictors(both.sum(-1), WINDOW) == ["mean", "last"]
    predicted_LED = predicted_loads(both, WINDOW)
    assert predicted_LED[:, :, 0].tolist() == [[pytest.approx(48), pytest.approx(52)], [10, 90]]


def test_what_lasts_is_planned_for_the_mean_of_all_that_is_kept() -> None:
    settling = of_one_layer([0, 1000], *[[90, 10]] * 7, *[[10, 90]] * 3)
    assert predicted_loads(settling, WINDOW, lasting=True)[0, :, 0].tolist() == [66, 34]


@pytest.mark.parametrize(("workload", "expected"), [("lognormal", {"mean", "slow"}), ("dirichlet_drift", {"last", "quick"})])
def test_loads_that_scatter_and_loads_that_drift(workload: str, expected: set[str]) -> None:
    loads = WORKLOADS[workload](10, 4, 4, 16, 4096, 2, 0)
    assert set(best_predictors(loads.sum(-1), WINDOW)) <= expected


def test_a_layer_without_any_token_is_predicted_to_have_none() -> None:
    assert predicted_loads(of_one_layer([0, 0], [0, 0]), WINDOW).tolist() == [[[0], [0]]]
