"""Steps planned ahead or not, and what they go by, for tests that compare the two."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest

from hecate.engine.step_plans import StepPlans
from hecate.parallel.loops import jit


@contextmanager
def plans_ahead(wanted: bool) -> Iterator[None]:
    """Plan ahead or not; where no machine code is ready, by plain Python alone, with which it is known that none comes."""
    alone = nullcontext() if jit.state() == "ready" else jit.plain_python()
    with alone, pytest.MonkeyPatch.context() as patch:
        if not wanted:
            patch.setattr(StepPlans, "begin_ahead", lambda *_: None)
        yield


def plans_of(plans: StepPlans) -> list[Any]:
    """What the step that was begun last goes by, as lists."""
    found: list[Any] = [sorted((str(unit), mode) for unit, mode in plans.chosen_modes.items())]
    for unit_plan in plans.units.values():
        plan = unit_plan.plan
        assert plan is not None
        found += [plan.placement.where_ED.tolist(), plan.loads_ED.tolist(), None if plan.quota_ED is None else plan.quota_ED.tolist()]
    return found


def steps_planned(plans: StepPlans) -> list[int]:
    """The steps planned ahead, and those planned anew."""
    return [plans.made_ahead, plans.made_anew]
