"""The schedules at their corners, worked by hand."""

from types import SimpleNamespace
from typing import Any

import pytest

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


@pytest.mark.parametrize("max_steps", [*range(1, 60), 997, 12345])
@pytest.mark.parametrize("warmup", [0, 1, 7, 49])
def test_a_number_of_steps_is_that_number(max_steps: int, warmup: int) -> None:
    config: Any = SimpleNamespace(
        learning_rate=2.0, lr_scheduler_type="constant", max_steps=max_steps, warmup_ratio=0.0, warmup_steps=warmup
    )
    rate = learning_rate(config)
    assert [rate.of(step) for step in range(warmup)] == [2.0 * (step + 1) / (warmup + 1) for step in range(warmup)]
    assert rate.of(warmup) == 2.0
