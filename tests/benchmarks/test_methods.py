"""What `benchmarks.methods` makes of its runs, without training anything."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from benchmarks.method_cases import GOALS, LONG, METHODS, SEEDS, SHORT, Run
from benchmarks.method_speed import BESIDE, NAMES, rows_of
from benchmarks.methods import by_method, load_spread, wanted
from hecate.config import load_config

CONFIGS = Path(__file__).parents[2] / "configs"
MOS = next(goal for goal in GOALS if goal.system == "mos")


def run_of(method: str, seed: int, loss: float) -> Run:
    return Run(method, seed, SHORT, 1, loss, {"gcd": 0.5, "sum": 1.0}, 1.0, 1.0, 1.0, 1.0, 0.0)


def test_loads_spread_by_unit_over_several_steps() -> None:
    """One unit is even over both steps, of the other one expert has all: a standard deviation as large as the mean."""
    assert load_spread([{"0": [4, 0], "1": [8, 0]}, {"0": [0, 4], "1": [8, 0]}]) == pytest.approx(0.5)


def test_a_goal_is_judged_by_the_seeds_that_all_its_systems_have() -> None:
    """MoS is below LoRA of rank 2 with both seeds, and 1 % above rank 16; with seed 2 alone it is not below."""
    runs = [run_of("mos", seed, 1.01) for seed in (1, 2)] + [run_of("lora_r16", seed, 1.0) for seed in (1, 2)]
    assert MOS.verdict(by_method(runs)) == "open: no runs yet of lora_r2"
    assert MOS.verdict(by_method([*runs, run_of("lora_r2", 3, 2.0)])) == "open: no runs yet of the same seeds"
    met = MOS.verdict(by_method([*runs, *(run_of("lora_r2", seed, 1.02) for seed in (1, 2))]))
    assert met.startswith(f"met (2 of {len(SEEDS)} seeds): below r 2 in 2 of 2; 1.010")
    assert MOS.verdict(by_method([*runs, run_of("lora_r2", 1, 1.02), run_of("lora_r2", 2, 1.0)])).startswith("missed (2 of")


def test_after_400_steps_the_better_learning_rate_of_each_system_counts() -> None:
    """LoRA has 0.7 at its first rate and LLaVA-MoLE 0.72 at its second, where the others of both are worse."""
    exact = {"lora_r8": 0.7, "lora_r8_slower": 0.6, "llava_mole": 0.65, "llava_mole_slower": 0.72}
    goal = next(goal for goal in GOALS if goal.system == "llava_mole")
    runs = [replace(run_of(name, 1, 1.0), steps=LONG, accuracy={"gcd": share}) for name, share in exact.items()]
    assert goal.verdict(by_method(runs)) == "met (1 of 3 seeds): exact 0.720 beside 0.700"
    assert goal.verdict(by_method(runs[:3])) == "open: no runs yet of llava_mole_slower"


def test_every_goal_names_systems_that_are_trained_for_as_many_steps() -> None:
    steps = {method.name: method.steps for method in METHODS}
    assert all(goal.steps in steps[name] for goal in GOALS for name in goal.needs)


@pytest.mark.parametrize("name", ["nola", "allora", "ffa_lora"])
def test_a_recipe_under_a_system_s_name_is_what_is_measured(name: str) -> None:
    """But for data, for where results go, and for the balance loss, which one pair has none of."""
    settings = next(method.settings for method in METHODS if method.name == name)
    recipe, measured = (
        load_config(CONFIGS / where, overrides, claim_output=False, inputs=False)
        for where, overrides in (
            (f"recipes/{name}.yaml", []),
            ("quickstart.yaml", [f"{key}={value}" for key, value in settings.items()]),
        )
    )
    own = {"data": measured.data, "output_dir": measured.output_dir, "eval": measured.eval}
    moe = replace(recipe.moe, router_aux_loss_coef=measured.moe.router_aux_loss_coef)
    assert replace(recipe, moe=moe, **own) == measured


def test_a_recording_has_each_system_with_each_seed_once_and_reads_what_it_wrote() -> None:
    runs = [(method.name, seed, size.steps) for method, seed, size in wanted([], quick=False)]
    assert len(set(runs)) == len(runs) == len(SEEDS) * sum(len(method.steps) for method in METHODS)
    assert Run(**asdict(run_of("mos", 1, 1.0))).exact == 0.75


def test_a_step_is_the_first_quartile_of_all_turns_over_that_of_lora() -> None:
    """LoRA's quartile lies a quarter of the way from 2 to 4 s; the other system's steps are twice as long."""
    rows = rows_of({BESIDE: [4.0, 2.0, 9.0, 5.0], "allora": [8.0, 4.0, 18.0, 10.0]})
    assert [row["step_seconds"] for row in rows] == [2.5, 5.0]
    assert [row[f"of_{BESIDE}"] for row in rows] == [1.0, 2.0]
    assert set(NAMES) <= {method.name for method in METHODS}
