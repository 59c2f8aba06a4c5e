"""The best evaluation of a run, and how long there was no better one, beside transformers' own Trainer and callback."""

from __future__ import annotations

import json
import math
import random
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import EarlyStoppingCallback, Trainer

from hecate.optim.best_model import BestModel


def after_all(values: list[float], metric: str = "loss", threshold: float = 0.0) -> BestModel:
    """After evaluations at steps 10, 20 ..."""
    best = BestModel()
    for number, value in enumerate(values, start=1):
        best = best.after(metric, value, 10 * number, threshold=threshold)
    return best


def by_transformers(values: list[float], metric: str, threshold: float) -> list[tuple[Any, int | None, int]]:
    """(best value, its step, evaluations without an improvement) after each evaluation, by `Trainer` and `EarlyStoppingCallback`."""
    args = SimpleNamespace(metric_for_best_model="it", greater_is_better=metric == "exact", save_strategy="steps")
    state = SimpleNamespace(best_metric=None, best_global_step=None, global_step=0)
    callback = EarlyStoppingCallback(early_stopping_patience=10**6, early_stopping_threshold=threshold)
    trainer, found = SimpleNamespace(args=args, state=state), []
    for value in values:
        state.global_step += 10
        callback.on_evaluate(args, state, SimpleNamespace(), {"eval_it": value})
        Trainer._determine_best_metric(trainer, {"eval_it": value}, trial=None)
        found.append((state.best_metric, state.best_global_step, callback.early_stopping_patience_counter))
    return found


@pytest.mark.parametrize("metric", ["loss", "exact"])
@pytest.mark.parametrize("threshold", [0.0, 0.125, 0.5])
def test_it_is_what_transformers_says(metric: str, threshold: float) -> None:
    rng = random.Random(f"{metric} {threshold}")
    for _ in range(40):
        values = [rng.randrange(0, 16) / 8 for _ in range(rng.randrange(1, 12))]  # eighths, whose differences are exact
        wanted = by_transformers(values, metric, threshold)
        for count, (value, step, without) in enumerate(wanted, start=1):
            best = after_all(values[:count], metric, threshold)
            assert (best.value, best.step, best.without) == (value, step, without), values[:count]


@pytest.mark.parametrize(
    ("values", "metric", "threshold", "value", "step", "without"),
    [
        ([3.0, 2.0, 2.5, 2.0], "loss", 0.0, 2.0, 20, 2),
        ([0.25, 0.5, 0.5], "up.exact", 0.0, 0.5, 20, 1),
        ([3.0, 2.75, 2.5], "up.loss", 0.25, 2.5, 30, 2),  # each is the best, and none improves by more than a quarter
        ([math.nan, 3.0, math.inf], "loss", 0.0, 3.0, 20, 1),
        ([math.nan, math.nan], "loss", 0.0, None, None, 2),
        ([-math.inf], "loss", 0.0, None, None, 1),
        ([], "loss", 0.0, None, None, 0),
    ],
)
def test_some_by_hand(values: list[float], metric: str, threshold: float, value: float | None, step: int | None, without: int) -> None:
    best = after_all(values, metric, threshold)
    assert (best.value, best.step, best.without) == (value, step, without)


def test_an_evaluation_counts_once_and_another_metric_begins_anew() -> None:
    best = after_all([3.0, 2.0, 2.5])
    assert best.after("loss", 1.0, 30) == best, "it is done again after a loss"
    other = best.after("up.loss", 5.0, 30)
    assert (other.metric, other.value, other.step, other.without) == ("up.loss", 5.0, 30, 0)


def test_it_goes_through_json_and_nothing_else_does() -> None:
    for best in (BestModel(), after_all([3.0, 2.0, 2.5]), after_all([math.nan])):
        assert BestModel.from_json(json.loads(json.dumps(asdict(best), allow_nan=False))) == best
    assert BestModel.from_json({}) == BestModel()
    for wrong in ({"step": "1"}, {"value": 1.0}, {"without": True}, {"metric": None}, {"value": 1.0, "step": 2.0}, {"patience": 3}):
        with pytest.raises((TypeError, ValueError)):
            BestModel.from_json(wrong)
