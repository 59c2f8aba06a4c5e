"""The schedules at their corners, worked by hand; and beside transformers' own."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import get_scheduler

from hecate.optim.from_config import learning_rate
from hecate.optim.optimizer import schedule


def test_warm_up_rises_in_equal_parts_to_the_peak() -> None:
    factor = schedule("constant", max_steps=10, warmup_ratio=0.3)
    assert [factor(step) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize(("kind", "middle"), [("cosine", 0.5), ("linear", 0.5), ("constant", 1.0)])
def test_courses_after_the_warm_up(kind: str, middle: float) -> None:
    factor = schedule(kind, max_steps=8, warmup_ratio=0.0)
    assert factor(0) == 1.0
    assert factor(4) == pytest.approx(middle)
    assert factor(8) == pytest.approx(1.0 if kind == "constant" else 0.0)


def test_cosine_is_above_linear_before_the_middle_and_below_after() -> None:
    cosine, linear = schedule("cosine", 100, 0.0), schedule("linear", 100, 0.0)
    assert cosine(25) > linear(25)
    assert cosine(75) < linear(75)


@pytest.mark.parametrize("warmup", [0, 5])
@pytest.mark.parametrize(
    ("kind", "ours", "theirs"),
    [
        ("cosine", {}, ("cosine", {})),
        ("linear", {}, ("linear", {})),
        ("constant", {}, ("constant_with_warmup", {})),
        ("constant_with_warmup", {}, ("constant_with_warmup", {})),
        ("inverse_sqrt", {}, ("inverse_sqrt", {})),
        ("cosine_with_min_lr", {"min_lr_rate": 0.15}, ("cosine_with_min_lr", {"min_lr_rate": 0.15})),
        ("wsd", {"decay_ratio": 0.27}, ("warmup_stable_decay", {"num_decay_steps": 14})),
        ("wsd", {"decay_ratio": 0.27, "min_lr_rate": 0.1}, ("warmup_stable_decay", {"num_decay_steps": 14, "min_lr_ratio": 0.1})),
    ],
)
def test_after_the_warm_up_they_are_transformers_own(kind: str, ours: dict[str, float], theirs: tuple[str, dict], warmup: int) -> None:
    steps, optimizer = 50, torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    name, options = theirs
    wanted = get_scheduler(name, optimizer, warmup, steps, scheduler_specific_kwargs=dict(options)).lr_lambdas[0]
    factor = schedule(kind, steps, warmup / steps, **ours)
    assert [factor(step) for step in range(warmup, steps + 3)] == pytest.approx(
        [1.0 if kind == "constant" else wanted(min(step, steps) if kind != "inverse_sqrt" else step) for step in range(warmup, steps + 3)],
        rel=1e-12,
        abs=1e-15,
    )
    assert factor(0) == 1 / (warmup + 1)


def test_the_last_step_of_a_fall_is_the_first_after_it() -> None:
    wsd = schedule("wsd", 10, 0.2, min_lr_rate=0.2, decay_ratio=0.5)
    assert [wsd(step) for step in (2, 4, 5)] == [1.0, 1.0, 1.0]
    assert wsd(6) == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi / 5)))
    assert [wsd(step) for step in (10, 11)] == pytest.approx([0.2, 0.2])


@pytest.mark.parametrize("max_steps", [*range(1, 60), 997, 12345])
@pytest.mark.parametrize("warmup", [0, 1, 7, 49])
def test_a_number_of_steps_is_that_number(max_steps: int, warmup: int) -> None:
    rest = SimpleNamespace(min_lr_rate=None, decay_ratio=None)
    given = {"learning_rate": 2.0, "lr_scheduler_type": "constant", "max_steps": max_steps, "warmup_ratio": 0.0, "warmup_steps": warmup}
    config: Any = SimpleNamespace(**given, lr_scheduler_kwargs=rest)
    rate = learning_rate(config)
    assert [rate.of(step) for step in range(warmup)] == [2.0 * (step + 1) / (warmup + 1) for step in range(warmup)]
    assert rate.of(warmup) == 2.0
