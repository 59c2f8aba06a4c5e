"""A key of another trainer's is answered with hecate's key, or with why there is none."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hecate.config import load_config, other_names
from hecate.config.problems import ConfigError
from hecate.config.schema import LEAVES
from tests.rooms import ROOT


def test_every_answer_names_keys_that_exist() -> None:
    assert other_names.KEYS.keys() <= set(LEAVES)
    for name, answer in other_names.known_names():
        for key in re.findall(r"\b(?:model|data|lora|moe|fssdp|eval)\.[a-z_]+(?:\.[a-z_]+)*", answer):
            assert key in LEAVES, (name, key)


def test_no_name_is_a_key_of_hecates_own_or_answered_twice() -> None:
    names = [name for name, _ in other_names.known_names()]
    assert len(names) == len(set(names)) >= 100
    assert not {name for name in names if name in LEAVES}


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("per_device_train_batch_size=4", "write micro_batch_size"),
        ("sequence_len=4096", "write data.seq_len"),
        ("lora_r=8", "write lora.r"),
        ("--per-device-train-batch-size=4", "write micro_batch_size"),
        ("training.bf16=true", "write model.dtype=bfloat16, or leave auto"),
        ("load_in_4bit=true", "not supported: quantised base weights; leave it out"),
        ("--max_steps=3", "write max_steps=... without signs before it"),
        ("max_step=3", "did you mean max_steps?"),
    ],
)
def test_on_the_command_line(given: str, hint: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(_file(tmp_path, ""), [given])
    assert [problem.hint for problem in caught.value.problems if problem.what == "unknown key"] == [hint]


def test_a_whole_file_of_another_trainer_is_answered_at_once(tmp_path: Path) -> None:
    lines = ["base_model: llama", "lora_r: 8", "deepspeed: zero2.json", "datasets: [{path: a.jsonl, type: alpaca}]", "load_in_4bit: true"]
    with pytest.raises(ConfigError) as caught:
        load_config(_file(tmp_path, "\n".join(lines)))
    answers = {problem.key: (problem.line, problem.hint) for problem in caught.value.problems if problem.what == "unknown key"}
    assert answers["base_model"] == (1, "write model.name_or_path")
    assert answers["lora_r"] == (2, "write lora.r")
    sharded = "experts are sharded always, and with moe.family=moe_lora all else by model.shard_non_experts=true"
    assert answers["deepspeed"] == (3, f"leave it out; {sharded}")
    assert answers["datasets"] == (4, "write data.train")
    assert answers["load_in_4bit"] == (5, "not supported: quantised base weights; leave it out")


def test_the_documented_table_is_the_one_that_answers() -> None:
    """What is not supported is a table of docs/use/support.md, which tests/docs/test_support.py holds."""
    text = (ROOT / "docs" / "use" / "other_trainers.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ((?:`[a-z0-9_]+`(?:, )?)+) \| (.*) \|$", text, re.MULTILINE)
    listed = [(name.strip("`"), answer) for names, answer in rows for name in names.split(", ")]
    answers = [
        (name, answer.removeprefix("write ")) for name, answer in other_names.known_names() if not answer.startswith("not supported: ")
    ]
    assert sorted(listed) == answers


def _file(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text or "max_steps: 1\n", encoding="utf-8")
    return path
