"""The schedules at their corners, worked by hand."""

import pytest

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
