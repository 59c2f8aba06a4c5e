"""What `benchmarks.federated` makes of its rounds; and one of its runs, over a tiny model."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from benchmarks.federated import QUICK, TRAINING, by_arm, nested, settings_of, tables, train, wanted
from benchmarks.federated_cases import ARMS, CELLM, GOALS, SEEDS, TASKS, Arm, Round, Run
from hecate.config import load_config
from hecate.data.files.synthetic_tasks import write_tasks
from testing.tiny_run import save_random_llama, write_samples

ROUND = Round(dict.fromkeys(TASKS, 1.0), dict.fromkeys(TASKS, 0.5), aggregation_error=0.7, average_error=1.0, bytes_up=100, bytes_down=100)


def run_of(arm: str, seed: int, loss: float, **changes: float) -> Run:
    return Run(arm, seed, (ROUND, replace(ROUND, union=dict.fromkeys(TASKS, loss), **changes)), 60.0, "abc")  # type: ignore[arg-type]


def verdicts(system: str, runs: list[Run]) -> list[str]:
    return [goal.verdict(by_arm(runs)) for goal in GOALS if goal.system == system]


def test_lora_fair_must_be_better_with_every_seed_and_in_every_round() -> None:
    others = [run_of(arm, seed, 1.0) for arm in ("fedavg", "ffa") for seed in (1, 2)]
    residual, loss = verdicts("lora_fair", [*others, run_of("lora_fair", 1, 0.9), run_of("lora_fair", 2, 0.9)])
    assert residual == f"met (2 of {len(SEEDS)} seeds): 0.70 to 0.70 of averaging's"
    assert loss.startswith(f"met (2 of {len(SEEDS)} seeds): in 2 of 2 seeds; lora_fair 0.9000")
    residual, loss = verdicts("lora_fair", [*others, run_of("lora_fair", 1, 0.9, aggregation_error=0.9), run_of("lora_fair", 2, 1.1)])
    assert residual.startswith("missed")
    assert residual.endswith("0.70 to 0.90 of averaging's")
    assert loss.startswith(f"missed (2 of {len(SEEDS)} seeds): in 1 of 2 seeds")


def test_cellm_is_held_to_its_dense_run() -> None:
    dense = [run_of(name, 1, 1.0) for name in CELLM if name != "cellm 0.1"]
    assert verdicts("cellm", dense) == ["open: no runs yet of cellm 0.1"] * 2
    few = run_of("cellm 0.1", 1, 1.03)
    traffic, loss = verdicts("cellm", [*dense, replace(few, rounds=tuple(replace(one, bytes_up=15, bytes_down=15) for one in few.rounds))])
    assert traffic.startswith("met")
    assert "cellm 0.1: 0.150 of the bytes" in traffic
    assert loss.startswith("missed")
    assert loss.endswith("ratio 1.030")


def test_a_recording_has_each_arm_with_each_seed_and_reads_what_it_wrote() -> None:
    runs = [(arm.name, seed) for arm, seed in wanted(quick=False)]
    assert len(set(runs)) == len(runs) == len(ARMS) * len(SEEDS)
    assert {name for goal in GOALS for name in goal.needs} <= {arm.name for arm in ARMS}
    row = asdict(run_of("ffa", 1, 1.0))
    assert Round(**row["rounds"][0]) == ROUND
    assert "  ffa" not in tables([run_of("fedavg", 1, 1.0)]).partition("\n\n")[0]


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)
def test_the_recipe_of_an_arm_is_accepted(arm: Arm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    save_random_llama(tmp_path / "model", **sizes)
    (tmp_path / "data").mkdir()
    for task in TASKS:
        for part in ("train", "eval"):
            write_samples(tmp_path / "data" / f"{task}.{part}.jsonl", ["w"], str.upper)
    monkeypatch.chdir(tmp_path)
    given = {**TRAINING, "model.name_or_path": "model", "output_dir": "runs", **settings_of(arm, 1, QUICK)}
    (tmp_path / "recipe.yaml").write_text(json.dumps(nested(given)))
    config = load_config(tmp_path / "recipe.yaml", claim_output=False)
    assert [client.r for client in config.rounds.clients] == list(arm.ranks or (None,) * len(TASKS))


@pytest.mark.slow
def test_an_arm_of_a_tiny_model(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    save_random_llama(tmp_path / "model", **sizes)
    write_tasks(tmp_path / "data", TASKS, train_size=20, eval_size=4, seed=0)
    training = {**TRAINING, "model.dtype": "float32", "nproc": 1}
    arm = Arm("flora", next(one for one in ARMS if one.name == "flora").settings, (4, 2, 2, 1, 1))
    run = train(arm, 1, QUICK, tmp_path, str(tmp_path / "model"), training)
    assert len(run.rounds) == QUICK.rounds
    assert all(one.aggregation_error < 1e-6 < one.average_error for one in run.rounds)
    assert run.rounds[1].bytes_down > run.rounds[0].bytes_down == 0, "clients of a first round begin anew"
