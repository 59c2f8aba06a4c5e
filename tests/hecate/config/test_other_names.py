"""A key of another trainer's is answered with hecate's key, or with why there is none; and only where the meaning is the same."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from hecate.apps.convert.meanings import HINTS
from hecate.config import load_config, other_names
from hecate.config.problems import ConfigError
from hecate.config.schema import LEAVES
from tests.rooms import ROOT

COMING = {"data.eval_share", "data.roles_to_train", "lr_scheduler_kwargs.min_lr_rate", "data.train_on_eos"}
"""keys that are in work while this is written"""


def test_every_answer_names_keys_that_exist() -> None:
    for name, answer in HINTS.items():
        for key in re.findall(r"\b(?:model|data|lora|moe|fssdp|eval)\.[a-z_]+(?:\.[a-z_]+)*", answer):
            assert key in {*LEAVES, *COMING}, (name, key)


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
        # What once was answered by the nearest spelling, with another meaning:
        ("do_train=true", "leave it out; the verb says it: hecate train, hecate eval"),
        ("val_size=0.1", "write data.eval_share, the share of data.train that is held out"),
        ("lora_target_linear=true", "leave it out; lora.target_modules has all linears of a decoder layer unless it is given"),
        ("use_unsloth=true", "leave it out; how it is computed changes nothing; kernels chooses hecate's way"),
        (
            "train_on_prompt=true",
            "not supported: a loss over other roles; data.roles_to_train names them where it is a key; leave it out",
        ),
        ("train_on_eos=all", "write data.train_on_eos"),
        # and what had no hint:
        ("roles_to_train=[assistant]", "write data.roles_to_train"),
        ("evals_per_epoch=4", "write eval_steps=N, a number of steps between evaluations"),
        ("trust_remote_code=true", "leave it out; models are transformers' own classes, and no code of a model's folder runs"),
        ("num_experts_per_tok=2", "write moe.top_k"),
        ("lora_bias=all", "not supported: training biases beside the adapters; leave it out"),
        ("neftune=5", "not supported: noise on embeddings; leave it out"),
        ("adapter_name=mine", "leave it out; a run has one adapter, output_dir/adapter"),
        ("plot_loss=true", "leave it out; it changes what is shown; `hecate report` draws the run"),
    ],
)
def test_on_the_command_line(given: str, hint: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(_file(tmp_path, ""), [given])
    assert [problem.hint for problem in caught.value.problems if problem.what == "unknown key"] == [hint]


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        ("adamw_torch", "write adamw"),
        ("adamw_torch_fused", "write adamw"),
        ("paged_adamw_32bit", "write adamw"),
        ("paged_adamw_8bit", "write adamw_8bit"),
        ("adamw_bnb_8bit", "write adamw_8bit"),
        ("lion_8bit", "write lion, whose moments have more bits"),
    ],
)
def test_optimizers_by_transformers_names(value: str, hint: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(_file(tmp_path, ""), [f"optim={value}"])
    assert [problem.hint for problem in caught.value.problems if problem.key == "optim"] == [hint]


def test_keys_of_theirs_in_a_file_of_hecates(tmp_path: Path) -> None:
    lines = ["model: {name_or_path: m}", "lora_r: 8", "deepspeed: zero2.json", "load_in_4bit: true"]
    with pytest.raises(ConfigError) as caught:
        load_config(_file(tmp_path, "\n".join(lines)))
    answers = {problem.key: (problem.line, problem.hint) for problem in caught.value.problems if problem.what == "unknown key"}
    assert answers["lora_r"] == (2, "write lora.r")
    sharded = "experts are sharded always, and with moe.family=moe_lora all else by model.shard_non_experts=true"
    assert answers["deepspeed"] == (3, f"leave it out; {sharded}; for plain LoRA each rank holds the base")
    assert answers["load_in_4bit"] == (4, "not supported: quantised base weights; leave it out")


def test_without_the_app_there_are_no_hints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(other_names, "_APP", "hecate.apps.not_there")
    assert other_names.key_hint("lora_r") == ""
    assert other_names.value_hint("optim", "adamw_torch") == ""
    assert other_names.whole_file("axo.yml") == ""


def test_the_documented_table_is_the_one_that_answers() -> None:
    """If this fails: python docs/make_other_trainers.py. What is not supported is in docs/use/support.md (tests/docs/test_support.py)."""
    program = runpy.run_path(str(ROOT / "docs" / "make_other_trainers.py"))
    assert program["PAGE"].read_text(encoding="utf-8") == program["page"]()


def _file(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text or "max_steps: 1\n", encoding="utf-8")
    return path
