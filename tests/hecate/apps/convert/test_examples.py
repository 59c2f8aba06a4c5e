"""Public example files of the three trainers, as their keys and values: nothing is dropped silently, and those that hecate can train
become recipes that `hecate plan` accepts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from hecate.apps.convert.convert import Converted, convert, trainer_of, write
from hecate.apps.foresee.plan import run_plan
from hecate.config import load_config
from hecate.parallel.loops.jit import plain_python

HERE = Path(__file__).parent
TRAINERS = {"axolotl": "axolotl", "llama_factory": "LLaMA-Factory", "trl": "TRL"}
SETS: dict[tuple[str, str], dict[str, Any]] = {
    (trainer, name): case
    for stem, trainer in TRAINERS.items()
    for name, case in yaml.safe_load((HERE / f"{stem}.yaml").read_text(encoding="utf-8")).items()
    if not name.startswith("_")
}
INFO = {
    "identity": {"file_name": "identity.json"},
    "alpaca_en_demo": {"file_name": "alpaca_en_demo.json"},
    "c4_demo": {"file_name": "c4_demo.jsonl", "columns": {"prompt": "text"}},
    "mllm_demo": {"file_name": "mllm_demo.json", "formatting": "sharegpt", "columns": {"messages": "messages", "images": "images"}},
    "dpo_en_demo": {"file_name": "dpo_en_demo.json", "ranking": True, "columns": {"chosen": "chosen", "rejected": "rejected"}},
}
"""what LLaMA-Factory's data/dataset_info.json says of the data sets of its examples"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with LLaMA-Factory's folder data."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(INFO))
    for name in ("identity", "alpaca_en_demo"):
        (tmp_path / "data" / f"{name}.json").write_text(json.dumps([{"instruction": "Say a.", "input": "", "output": "a"}] * 3))
    (tmp_path / "data" / "c4_demo.jsonl").write_text('{"text": "a"}\n' * 3)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def converted(case: dict[str, Any]) -> tuple[Converted, list[str]]:
    """The example, without what its user must drop; and what is refused."""
    made = convert(Path("theirs.yaml"), case["file"], case.get("drop", ()))
    return made, made.refused


def test_there_are_enough_of_each() -> None:
    counts = {trainer: sum(of == trainer for of, _ in SETS) for trainer in TRAINERS.values()}
    assert counts["axolotl"] >= 12
    assert counts["LLaMA-Factory"] >= 12
    assert counts["TRL"] >= 6


@pytest.mark.parametrize(("trainer", "name"), SETS)
def test_an_example_is_recognised_and_each_key_is_answered(trainer: str, name: str, folder: Path) -> None:
    case = SETS[trainer, name]
    assert trainer_of(case["file"]) == trainer
    made, refused = converted(case)
    assert set(case["file"]) == {key for key in made.answers if not key.startswith("[")}
    assert sorted(refused) == sorted(case.get("refused", []))
    lines = made.table().splitlines()
    assert all(any(line.split()[0] == key for line in lines if line.startswith("  ")) for key in case["file"])


def test_nine_of_ten_that_train_text_become_recipes(folder: Path) -> None:
    """Quantised bases are dropped by name (`drop`), which their users must decide."""
    trained = {name: case for name, case in SETS.items() if case["trains"] == "lora"}
    accepted = []
    for (trainer, name), case in trained.items():
        made, refused = converted(case)
        if refused:
            continue
        out = folder / f"{len(accepted)}.yaml"
        write(made, Path("theirs.yaml"), out)
        config = load_config(out, [f"model.name_or_path={case['base']}"], claim_output=False, inputs=False)
        assert config.moe.one_pair_each or config.moe.kind.of_moe_base, (trainer, name)
        accepted.append(name)
    assert len(accepted) >= 0.9 * len(trained), set(trained) - {(trainer, name) for trainer, name in trained if name in accepted}


@pytest.mark.parametrize(
    ("trainer", "name"),
    [
        ("axolotl", "llama-3/lora-1b.yml"),
        ("axolotl", "mistral/mixtral.yml"),
        ("LLaMA-Factory", "train_lora/qwen3_lora_sft.yaml"),
        ("TRL", "gpt-oss-recipes configs/sft_lora.yaml"),
    ],
)
def test_plan_takes_the_recipe(trainer: str, name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = SETS[trainer, name]
    write(converted(case)[0], Path("theirs.yaml"), folder / "recipe.yaml")
    config = load_config(folder / "recipe.yaml", [f"model.name_or_path={case['base']}"], claim_output=False, inputs=False)
    with plain_python():
        run_plan(config, topology="h100-node", ranks=None, loads="dirichlet_drift", json_path=None)
    assert "Memory of rank " in capsys.readouterr().out
