"""A soak's plans come from a seed; and a short one ends as a run without faults does."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.soak import KINDS, LEG_STEPS, RANKS, Soaked, carried_out, compare, leg_of, poison, problem_of_leg
from hecate.apps.check.drill.outcome import Scope
from hecate.apps.check.drill.ranks import Launched
from hecate.apps.check.drill.run import drill_folder

LEGS = [leg_of(number, 0) for number in range(50)]


def test_legs_are_the_same_in_each_call_and_meet_everything() -> None:
    legs = [leg_of(number, 8 * number) for number in range(200)]
    assert legs[:9] == [leg_of(number, 8 * number) for number in range(9)]
    assert (legs[0].kind, legs[0].ranks) == ("none", RANKS)
    assert set(Counter(leg.kind for leg in legs)) == set(KINDS)
    assert {leg.ranks for leg in legs} == set(range(1, RANKS + 1))
    for leg in legs:
        assert all(8 * leg.number <= (one.step or 0) < 8 * leg.number + LEG_STEPS for one in leg.injected)


def test_a_loss_is_no_number_in_the_same_steps_however_legs_are_cut() -> None:
    steps = [one.step for one in poison(0, 100)]
    assert steps == [one.step for one in (*poison(0, 33), *poison(33, 100))]
    assert 0 < len(steps) < 15


def test_a_leg_that_lost_some_ranks_must_not_end_early(tmp_path: Path) -> None:
    leg = next(leg for leg in LEGS if leg.kind == "kill" and len(leg.injected) < leg.ranks)
    assert problem_of_leg(leg, Launched(1, "it is over", tmp_path, []))
    assert not problem_of_leg(leg, Launched(0, "", tmp_path, []))
    full = next(leg for leg in LEGS if leg.kind == "disk")
    assert not problem_of_leg(full, Launched(2, "No space left on device", tmp_path, []))
    assert problem_of_leg(full, Launched(2, "Traceback (most recent call last)", tmp_path, []))


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux: /proc and fork")
def test_a_few_legs_end_as_a_run_without_faults(tmp_path: Path) -> None:
    """One leg of each kind; another learning rate in the run without faults is seen."""
    with drill_folder() as made:
        scope, output, found = Scope(str(tmp_path), str(made.workshop), quick=False, start=made.start), tmp_path / "soaked", Soaked()
        first = 0
        for kind in ("none", "kill", "disk", "stop", "launcher"):
            leg = next(leg for leg in (leg_of(number, first) for number in range(100)) if leg.kind == kind)
            run = carried_out(scope, output, leg, first)
            assert not problem_of_leg(leg, run), run.log
            found.legs[leg.kind] += 1
            found.faults.update(one["what"] for one in run.trace if one["what"] in ("kill", "stop"))
            first = found.steps = max(int(path.name.partition("-")[2]) for path in output.glob("checkpoint-*") if path.name.count(".") == 0)
        compare(scope, output, found)
        assert not found.problems
        compare(scope, output, found, ("save_steps=2", "learning_rate=2e-2"))
        assert found.problems
