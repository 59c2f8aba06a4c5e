"""hecate convert: their values as hecate's, what is refused, and what the command line says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from hecate.apps.convert import meanings
from hecate.apps.convert.answer import Theirs, carry, off
from hecate.apps.convert.convert import convert, convert_file, trainer_of, write
from hecate.apps.convert.datasets import on_hub
from hecate.apps.convert.values import has_experts
from hecate.config import load_config
from hecate.config.problems import ConfigError
from hecate.config.schema import LEAVES
from hecate.errors import UserError
from testing.commands import run_hecate
from testing.tiny_run import make_workshop

AXOLOTL = {"base_model": "m", "adapter": "lora", "datasets": [{"path": "a.jsonl", "type": "alpaca"}], "lora_target_linear": True}
FACTORY = {"model_name_or_path": "m", "stage": "sft", "dataset": "a", "template": "qwen"}
TRL = {"model_name_or_path": "m", "dataset_name": "./a.jsonl", "use_peft": True}
MOE = {"base_model": "mistralai/Mixtral-8x7B-v0.1"}


def recipe(file: dict[str, Any], **more: Any) -> dict[str, Any]:
    return dict(convert(Path("theirs.yaml"), {**file, **more}).recipe)


def refusal(file: dict[str, Any], key: str, value: Any) -> str:
    answer = convert(Path("theirs.yaml"), {**file, key: value}).answers[key]
    assert answer.kind == "refused", answer
    return answer.text


@pytest.mark.parametrize(
    ("file", "given", "made"),
    [
        (AXOLOTL, {"learning_rate": "2e-5"}, {"learning_rate": "2e-5", "adapter": "lora"}),
        (AXOLOTL, {"warmup_steps": 10}, {"warmup_steps": 10}),
        (AXOLOTL, {"warmup_steps": 0.1}, {"warmup_ratio": 0.1}),
        (AXOLOTL, {"num_epochs": 3, "max_steps": 50}, {"max_steps": 50}),
        (AXOLOTL, {"max_steps": 50, "save_steps": 0.25}, {"save_steps": 13}),
        (AXOLOTL, {"wandb_project": "mine", "report_to": ["tensorboard"]}, {"report_to": ["tensorboard", "wandb"]}),
        (AXOLOTL, {"lora_target_linear": None, "lora_target_modules": ["q_proj"]}, {"lora.target_modules": ["q_proj"]}),
        (AXOLOTL, MOE, {"moe.family": "moe_lora", "moe.router_aux_loss_coef": 0.0, "hub": True}),
        (
            AXOLOTL,
            {**MOE, "lora_target_linear": None, "lora_target_modules": ["q_proj", "w1", "w2", "w3"]},
            {"lora.target_modules": ["q_proj", "gate_proj", "down_proj", "up_proj"]},
        ),
        (
            AXOLOTL,
            {"datasets": [{"path": "c.jsonl", "type": "sharegpt"}, {"path": "d/c.jsonl", "type": "completion", "field": "body"}]},
            {
                "data.train": [
                    {"path": "c.jsonl", "format": "sharegpt"},
                    {"path": "d/c.jsonl", "format": "text", "fields": {"text": "body"}, "name": "c-2"},
                ]
            },
        ),
        (AXOLOTL, {"datasets": [{"path": "A/b", "split": "train_sft"}]}, {"data.train": [{"path": "A/b/data/train_sft-*"}], "hub": True}),
        (TRL, {"max_length": 512}, {"lora.target_modules": ["q_proj", "v_proj"], "data.on_bad_sample": "truncate", "seed": 42}),
        (TRL, {"lr_scheduler_type": "constant"}, {"lr_scheduler_type": "constant", "learning_rate": 2e-5, "micro_batch_size": 8}),
    ],
)
def test_values(file: dict[str, Any], given: dict[str, Any], made: dict[str, Any]) -> None:
    assert made.items() <= recipe(file, **given).items() or recipe(file, **given) == made


def test_what_trainers_take_otherwise_is_carried_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    info = {"a": {"file_name": "a.json", "formatting": "sharegpt", "columns": {"messages": "talk"}, "tags": {"role_tag": "role"}}}
    info["b"] = {"file_name": "b.json", "columns": {"prompt": "q", "response": "output"}}
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(info))
    made = recipe(FACTORY | {"dataset": "b"})
    assert made["data.train"] == [{"path": "data/b.json", "name": "b", "format": "alpaca", "fields": {"instruction": "q"}}]
    assert (made["lora.r"], made["lora.dropout"], made["data.packing"], made["learning_rate"]) == (8, 0.0, False, 5e-5)
    assert recipe(FACTORY | {"dataset": "b", "lora_rank": 4})["lora.alpha"] == 8
    assert "role and value" in refusal(FACTORY, "dataset", "a")  # tags of both kinds
    assert refusal(FACTORY, "dataset", "c") == "c is not in data/dataset_info.json"


def test_a_limit_of_samples_is_left_out_where_files_are_shorter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text('{"a": {"file_name": "a.json"}}')
    (tmp_path / "data" / "a.json").write_text("[{}, {}, {}]")
    assert convert(Path("f"), FACTORY | {"max_samples": 3}).answers["max_samples"].text == "no data set has more: 3"
    assert "--drop max_samples" in refusal(FACTORY, "max_samples", 2)


@pytest.mark.parametrize(
    ("file", "key", "value", "what"),
    [
        (AXOLOTL, "load_in_4bit", True, "--drop load_in_4bit"),
        (AXOLOTL, "adapter", None, "hecate trains adapters and experts, no dense model as it is"),
        (AXOLOTL, "rl", "dpo", "not supported: training by preferences"),
        (AXOLOTL, "datasets", [3], "its value has a form that is not known here"),
        (AXOLOTL, "max_steps", "many", "its value has a form that is not known here"),
        (AXOLOTL, "no_such_key", 3, "no_such_key is not known here"),
        (AXOLOTL, "lora_modules_to_save", ["lm_head"], "not supported: training modules beside the adapters"),
        (AXOLOTL, "plugins", ["mine.Plugin"], "hecate runs no code that a file names: mine.Plugin"),
        (AXOLOTL, "datasets", [{"path": "A/b", "split": "train[:20%]"}], "hecate reads whole files, not train[:20%]"),
        (AXOLOTL, "datasets", [{"path": "a.jsonl", "type": "stepwise"}], "type stepwise"),
        (AXOLOTL, "sequence_len", 1, "data.seq_len must be >= 2"),
        (AXOLOTL, "lr_scheduler", "cosine_with_restarts", "lr_scheduler_type must be one of cosine"),
        (AXOLOTL, "train_on_inputs", True, "the loss is over answers"),
        ({**AXOLOTL, **MOE, "lora_target_linear": None}, "lora_target_modules", ["q_proj"], "name gate_proj, up_proj and down_proj, too"),
        (TRL, "model_revision", "v2", "write a folder with it"),
        (TRL, "dataset_mixture", {"datasets": [{"path": "a.jsonl"}], "test_split_size": 9}, "take test_split_size out"),
    ],
)
def test_what_hecate_cannot_do_is_refused(file: dict[str, Any], key: str, value: Any, what: str) -> None:
    assert what in refusal(file, key, value)


def test_nothing_is_written_while_a_key_is_refused_and_drop_names_only_such(tmp_path: Path) -> None:
    file, out = tmp_path / "axo.yml", tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(AXOLOTL | {"load_in_4bit": True, "sequence_len": 64}))
    with pytest.raises(UserError, match="1 keys are refused, and nothing is written\n  to leave them out: --drop load_in_4bit"):
        write(convert_file(file), file, out)
    assert not out.exists()
    with pytest.raises(UserError, match="--drop seed: no key of that name is refused\n  those that are: load_in_4bit"):
        convert_file(file, ["seed"])
    write(convert_file(file, ["load_in_4bit"]), file, out)
    assert load_config(out, ["model.name_or_path=llama-3-8b"], claim_output=False, inputs=False).data.seq_len == 64
    with pytest.raises(UserError, match="exists, and is not written over"):
        write(convert_file(file, ["load_in_4bit"]), file, out)


def test_keys_that_do_not_go_together_leave_no_recipe(tmp_path: Path) -> None:
    file, out = tmp_path / "axo.yml", tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(AXOLOTL | {"output_dir": "a/b c"}))
    with pytest.raises(ConfigError, match="output_dir"):
        write(convert_file(file), file, out)
    assert not out.exists()


def test_a_chat_template_that_is_a_text_becomes_a_file(tmp_path: Path) -> None:
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    made = convert(Path("f.yaml"), TRL | {"chat_template": template})
    write(made, Path("f.yaml"), tmp_path / "r.yaml")
    assert (tmp_path / "r.jinja").read_text() == template
    assert yaml.safe_load((tmp_path / "r.yaml").read_text())["data"]["chat_template"] == str(tmp_path / "r.jinja")


@pytest.mark.parametrize("values", [{"model": {"name_or_path": "m"}, "base_model": "m", "datasets": []}, {"lora_r": 8}, {}])
def test_what_is_no_other_trainers_file(values: dict[str, Any]) -> None:
    assert trainer_of(values) is None
    with pytest.raises(UserError, match="is neither axolotl's"):
        convert(Path("f.yaml"), values)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for name, content in {"list.yaml": "[1]", "bad.yaml": "a: [", "none.yaml": None}.items():
        if content is not None:
            (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match="give the YAML file of another trainer"):
            convert_file(tmp_path / name)


def test_train_shows_the_whole_table(tmp_path: Path) -> None:
    """More keys than the 20 that a list of problems shows."""
    keys = {f"unknown_{i}": i + 1 for i in range(30)}
    file = tmp_path / "axo.yml"
    file.write_text(yaml.safe_dump({**AXOLOTL, **keys}))
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    text = str(caught.value)
    assert f"{file}: is a configuration of axolotl; hecate convert {file} -o RECIPE.yaml makes a recipe of it:" in text
    assert all(f"  {key} " in text for key in (*AXOLOTL, *keys))
    assert convert_file(file).table() in text


def test_what_a_user_of_axolotl_writes_is_answered_by_what_it_means() -> None:
    """Keys of the file of a tester who knew axolotl alone, where the table refused keys that change nothing, or gave a wrong reason."""
    given = {"liger_rope": True, "liger_fused_linear_cross_entropy": True, "shuffle_merged_datasets": True, "loss_watchdog_threshold": 5.0}
    answers = convert(
        Path("f"), AXOLOTL | given | {"val_set_size": 0.1, "evals_per_epoch": 4, "deepspeed": None, "wandb_entity": None}
    ).answers
    assert not {key for key in given if answers[key].kind == "refused"}
    assert answers["evals_per_epoch"].kind == "to be checked"
    assert answers["evals_per_epoch"].gives == {"eval_steps": 50}
    assert answers["deepspeed"].text == answers["wandb_entity"].text == "nothing is given"
    assert "no key stops a run at a finite loss" in answers["loss_watchdog_threshold"].text
    in_order = convert(Path("f"), AXOLOTL | {"shuffle_merged_datasets": False}).answers["shuffle_merged_datasets"]
    assert in_order.kind == "refused"


def test_the_verb(tmp_path: Path) -> None:
    file = tmp_path / "axo.yml"
    file.write_text(yaml.safe_dump(AXOLOTL | {"load_in_8bit": True}))
    shown = run_hecate(["convert", str(file)], timeout=120)
    assert shown.returncode == 2
    assert "refused (1):\n  load_in_8bit" in shown.stdout
    made = run_hecate(["convert", str(file), "-o", str(tmp_path / "r.yaml"), "--drop", "load_in_8bit"], timeout=120)
    assert made.returncode == 0, made.stderr
    assert f"wrote {tmp_path / 'r.yaml'}" in made.stdout


def test_the_table_of_meanings() -> None:
    """No name stands twice, none but those with values of their own is hecate's, and hints name keys that exist."""
    assert set(meanings.SAME) <= set(LEAVES)
    tables = (meanings.SAME.values(), meanings.LEFT, meanings.NOT_SUPPORTED, meanings.CONVERTED)
    names = [name for table in tables for group in table for name in group.split()]
    assert len(names) == len(set(names)) >= 250
    assert not {name for name in meanings.HINTS if name in LEAVES} - {"adapter", "optim"}
    for trainer in meanings.DEFAULTS:
        assert meanings.defaults(trainer).keys() <= set(names) | set(LEAVES)


def test_defaults_are_those_of_transformers() -> None:
    """TRL's own, which differ, were read in trl 1.16.0; LLaMA-Factory takes transformers' where it has none of its own."""
    from transformers import TrainingArguments

    fields = TrainingArguments.__dataclass_fields__
    for trainer, own in (("LLaMA-Factory", set()), ("TRL", {"learning_rate", "logging_steps", "gradient_checkpointing"})):
        for name, value in meanings.defaults(trainer).items():
            if name in fields and name not in own:
                assert fields[name].default == value, (trainer, name)


@pytest.mark.parametrize(
    ("path", "hub"), [("A/b", True), ("A/b/data/train-*", True), ("a.jsonl", False), ("./A/b", False), ("/A/b", False), ("here/b", False)]
)
def test_names_on_the_hub(path: str, hub: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert on_hub(path) is hub


@pytest.mark.parametrize(
    ("name", "experts"),
    [("mistralai/Mixtral-8x7B-v0.1", True), ("Qwen/Qwen3-30B-A3B", True), ("allenai/OLMoE-1B-7B", True), ("Qwen/Qwen3-8B", False)],
)
def test_a_model_with_experts_is_known_by_its_name_or_its_folder(name: str, experts: bool, tmp_path: Path) -> None:
    assert has_experts(Theirs("axolotl", {"base_model": name})) is experts
    (tmp_path / "config.json").write_text(json.dumps({"num_experts": 8 if experts else None}))
    assert has_experts(Theirs("TRL", {"model_name_or_path": str(tmp_path)})) is experts


def test_values_are_hecates_or_refused_in_its_words() -> None:
    assert carry({"lora.r": 8, "seed": 0}).gives == {"lora.r": 8}
    assert carry({"seed": 0}).kind == "the default already"
    assert carry({"no.key": 1}).text == "this version of hecate has no no.key"
    assert carry({"seed": "x"}).text == "seed must be an integer, got x"
    assert off("no")
    assert not off("lora")


def test_a_recipe_trains(tmp_path: Path) -> None:
    """The lengths and the schedule are those of the file: two steps of warm-up, then half a cosine."""
    make_workshop(tmp_path)
    file = AXOLOTL | {"base_model": "./model", "datasets": [{"path": "./up.train.jsonl"}], "output_dir": "out", "num_epochs": 1}
    file |= {"lora_r": 4, "max_steps": 4, "warmup_steps": 2, "learning_rate": "1e-3", "sequence_len": 64, "sample_packing": True}
    (tmp_path / "axo.yml").write_text(yaml.safe_dump(file))
    made = run_hecate(["convert", "axo.yml", "-o", "recipe.yaml"], folder=tmp_path, timeout=120)
    assert made.returncode == 0, made.stderr
    done = run_hecate(["train", "recipe.yaml", "nproc=1"], folder=tmp_path, timeout=240)
    assert done.returncode == 0, done.stderr
    steps = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    rates = [one["learning_rate"] for one in steps if one["kind"] == "step"]
    assert rates == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3, 5e-4])
    adapter = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert (adapter["peft_type"], adapter["r"], adapter["lora_dropout"]) == ("LORA", 4, 0.0)
