"""What `benchmarks.methods` makes of its runs, without training anything."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from benchmarks.method_cases import GOALS, LONG, LOSS, METHODS, SEEDS, SHORT, Goal, Run
from benchmarks.methods import by_method, load_spread, wanted
from benchmarks.whole_run import FIVE_TASKS
from hecate.config import load_config

CONFIGS = Path(__file__).parents[2] / "configs"


def run_of(method: str, seed: int, loss: float) -> Run:
    return Run(method, seed, SHORT, 1, loss, {"gcd": 0.5, "sum": 1.0}, 1.0, 1.0, 1.0, 1.0, 0.0, "abc")


def test_loads_spread_by_unit_over_several_steps() -> None:
    """One unit is even over both steps, of the other one expert has all: a standard deviation as large as the mean."""
    assert load_spread([{"0": [4, 0], "1": [8, 0]}, {"0": [0, 4], "1": [8, 0]}]) == pytest.approx(0.5)


def verdict(losses: dict[str, list[float]], factor: float = 1.0) -> str:
    """Of a goal of `ours` and `ours_slower` beside the best of all others."""
    rivals = tuple(name for name in losses if not name.startswith("ours"))
    goal = Goal("ours", "", SHORT, LOSS, ("ours", "ours_slower"), rivals, factor=factor)
    return goal.verdict(by_method([run_of(name, seed, loss) for name, of in losses.items() for seed, loss in enumerate(of, 1)]))


def test_a_goal_is_decided_only_beyond_the_spread_of_seeds() -> None:
    """The rival's mean is 1.0, and its seeds spread by 0.1, more than ours."""
    rival, narrow = [0.9, 1.0, 1.1], [-0.01, 0.0, 0.01]

    def beside(mean: float) -> str:
        return verdict({"rival": rival, "ours": [mean + one for one in narrow]}).partition(":")[0]

    assert [beside(mean) for mean in (0.88, 0.92, 1.08, 1.12)] == ["met", *["not decided by this recording"] * 2, "missed"]
    assert verdict({"rival": rival, "ours": [1.0, 1.0, 1.0]}, factor=1.2).startswith("met: ours 1.000 ± 0.000, rival 1.000 ± 0.100")


def test_a_goal_takes_the_best_of_both_sides() -> None:
    """Beside a rival that was badly chosen nothing is met."""
    bad, good, ours, worse = [3.0] * 3, [1.0] * 3, [2.0] * 3, [2.5] * 3
    assert verdict({"bad": bad, "ours": ours}).startswith("met: ours 2.000")
    assert (
        verdict({"bad": bad, "good": good, "ours": worse, "ours_slower": ours}) == "missed: ours_slower 2.000 ± 0.000, good 1.000 ± 0.000"
    )


def test_a_goal_waits_for_all_seeds_of_its_rivals_and_of_one_of_ours() -> None:
    whole = [1.0] * len(SEEDS)
    assert verdict({"rival": whole[1:], "ours": whole}) == "open: seeds are missing of ours_slower, rival"
    assert verdict({"rival": whole, "ours": whole[1:]}) == "open: seeds are missing of ours, ours_slower"
    assert verdict({"rival": whole, "ours": whole}).endswith("(seeds are missing of ours_slower)")


def test_a_goal_without_rivals_has_a_target_of_its_own() -> None:
    loads = next(goal for goal in GOALS if not goal.rivals)
    of_seeds = [
        replace(run_of("smora", seed, 1.0), steps=LONG, load_spread=spread) for seed, spread in zip(SEEDS, (0.35, 0.45, 0.55), strict=True)
    ]
    assert loads.verdict(by_method(of_seeds)).startswith("not decided by this recording: smora 0.45 ± 0.10")


def test_every_goal_names_systems_that_are_trained_for_as_many_steps() -> None:
    steps = {method.name: method.steps for method in METHODS}
    assert all(goal.steps in steps[name] for goal in GOALS for name in (*goal.ours, *goal.rivals))


@pytest.mark.parametrize("name", ["nola", "allora", "ffa_lora"])
def test_a_recipe_under_a_system_s_name_is_what_is_measured(name: str) -> None:
    """But for data, for where results go, and for the balance loss, which one pair has none of."""
    settings = next(method.settings for method in METHODS if method.name == name)
    recipe, measured = (
        load_config(where, overrides, claim_output=False, inputs=False)
        for where, overrides in (
            (CONFIGS / "recipes" / f"{name}.yaml", []),
            (FIVE_TASKS, [f"{key}={value}" for key, value in settings.items()]),
        )
    )
    own = {"data": measured.data, "output_dir": measured.output_dir, "eval": measured.eval}
    moe = replace(recipe.moe, router_aux_loss_coef=measured.moe.router_aux_loss_coef)
    assert replace(recipe, moe=moe, **own) == measured


def test_a_recording_has_each_system_with_each_seed_once_and_reads_what_it_wrote() -> None:
    runs = [(method.name, seed, size.steps) for method, seed, size in wanted([], quick=False)]
    assert len(set(runs)) == len(runs) == len(SEEDS) * sum(len(method.steps) for method in METHODS)
    assert Run(**asdict(run_of("mos", 1, 1.0))).exact == 0.75
