"""hecate convert: the keys of an entry of axolotl's `datasets`, of LLaMA-Factory's dataset_info.json, and the splits of local data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hecate.apps.convert.convert import convert, write
from hecate.config import load_config

AXOLOTL = {"base_model": "m", "adapter": "lora", "lora_target_linear": True, "val_set_size": 0.1}
TRL = {"model_name_or_path": "m", "use_peft": True, "eval_strategy": "steps", "eval_steps": 10}
DEFAULTS = {
    "type": "chat_template",
    "ds_type": "json",
    "split": "train",
    "name": None,
    "data_files": None,
    "field_messages": "messages",
    "message_property_mappings": {"role": "role", "content": "content"},
    "message_field_training": "training",
    "message_field_training_detail": "train_detail",
    "field_system": "system",
    "field_tools": "tools",
    "field_thinking": "reasoning_content",
    "template_thinking_key": "reasoning_content",
    "split_thinking": False,
    "chat_template": "tokenizer_default",
    "chat_template_jinja": None,
    "conversation": None,
    "roles": {"user": ["human", "user"], "assistant": ["gpt", "assistant"], "system": ["system"], "tool": ["tool"]},
    "roles_to_train": ["assistant"],
    "train_on_eos": "turn",
    "train_on_eot": "turn",
    "drop_system_message": False,
    "shards": 1,
    "shards_idx": None,
    "preprocess_shards": 4,
    "revision": "main",
    "trust_remote_code": True,
    "temperature": None,
    "logprobs_field": None,
    "input_transform": None,
}
"""values that axolotl takes of itself, or that change nothing"""


def answer(*entries: dict[str, Any], **more: Any) -> Any:
    return convert(Path("theirs.yaml"), {**AXOLOTL, "datasets": [{"path": "a.jsonl", **entry} for entry in entries], **more}).answers[
        "datasets"
    ]


def test_keys_that_say_the_default_change_nothing() -> None:
    plain = answer({"type": "chat_template"})
    given = answer(DEFAULTS)
    assert (given.kind, given.gives) == (plain.kind, plain.gives)
    assert "roles_to_train, train_on_eos" in given.text, "each key is answered"
    assert plain.gives == {"data.train": [{"path": "a.jsonl", "format": "messages"}]}


@pytest.mark.parametrize(
    ("given", "made"),
    [
        ({"roles_to_train": ["assistant", "human"]}, {"roles_to_train": ["assistant", "user"]}),
        ({"roles_to_train": []}, {"roles_to_train": []}),
        ({"train_on_eos": "last"}, {"train_on_eos": "last"}),
        ({"train_on_eos": "none"}, {"train_on_eos": "none"}),
        ({"train_on_eos": "all", "train_on_eot": "all"}, {"train_on_eos": "all"}),
        ({"field_tools": "functions", "field_messages": "talk"}, {"fields": {"messages": "talk", "tools": "functions"}}),
        ({"path": "json", "data_files": "b.jsonl"}, {"path": "b.jsonl"}),
    ],
)
def test_keys_of_an_entry_are_carried_over(given: dict[str, Any], made: dict[str, Any]) -> None:
    wanted = {"path": "a.jsonl", "format": "messages", **made}
    assert answer({"type": "chat_template", **given}).gives == {"data.train": [wanted]}


def test_each_entry_learns_what_it_says() -> None:
    made = answer({"type": "chat_template", "roles_to_train": ["user"]}, {"path": "b.jsonl", "type": "chat_template"}).gives["data.train"]
    assert [one.get("roles_to_train") for one in made] == [["user"], None]


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ({"shards": 8}, "a.jsonl: shards 8: hecate reads whole files"),
        ({"revision": "v2"}, "name a folder with that revision"),
        ({"drop_system_message": True}, "take the system turns out of the records"),
        ({"message_field_training": "learn"}, "message_field_training learn: call it train in the records"),
        ({"split_thinking": True}, "write the thoughts into reasoning_content"),
        ({"train_on_eot": "last"}, "train_on_eot last: hecate has one mark of a turn's end"),
        ({"split": "train[:5%]"}, "hecate reads whole files, not train[:5%]"),
        ({"split": "test"}, "a.jsonl: has no split test of its own: name the file with those records"),
        (
            {"roles": {"assistant": ["bot"]}},
            "roles bot: call it assistant in the records; of that hecate knows assistant, function_call, gpt",
        ),
        ({"message_property_mappings": {"tool_calls": "calls"}}, "tool_calls: call it tool_calls in the records, not calls"),
        ({"type": {"field_instruction": "q"}}, "write the prompts into the records"),
        ({"chat_template": "chatml", "path": "A/b"}, ""),
        ({"of_a_later_version": 3}, "hecate's data have no such of_a_later_version"),
        ({"train_on_eos": "some"}, "data.train[0].train_on_eos must be one of"),
    ],
)
def test_what_an_entry_asks_for_in_vain_is_said(given: dict[str, Any], what: str) -> None:
    found = answer({"type": "chat_template", **given})
    assert (found.kind == "refused") is bool(what), found
    assert what in found.text


def test_entries_have_one_chat_template(tmp_path: Path) -> None:
    one, other = tmp_path / "one.jinja", tmp_path / "other.jinja"
    for file in (one, other):
        file.write_text("{{ messages }}")
    entries = [{"type": "chat_template", "chat_template_jinja": str(file)} for file in (one, other)]
    assert answer(entries[0]).gives["data.chat_template"] == str(one)
    assert "data.chat_template" not in answer(entries[0], chat_template_jinja=str(one)).gives  # the file's own key carries it
    own = {"type": "chat_template", "chat_template": "tokenizer_default"}
    assert answer(own, {"type": "chat_template", "path": "b.jsonl"}).kind == "carried over"
    assert answer(own, chat_template_jinja=str(one)).text.endswith("the tokenizer's own: train on one of them")
    assert answer(*entries).text.startswith("chat_template: all data have one")


def test_several_data_files_are_several_items() -> None:
    made = answer({"path": "json", "data_files": ["x/a.jsonl", "y/a.jsonl"]}).gives["data.train"]
    assert made == [{"path": "x/a.jsonl"}, {"path": "y/a.jsonl", "name": "a-2"}]


def test_trl_never_evaluates_on_training_data(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{}")
    (tmp_path / "whole").mkdir()
    file = str(tmp_path / "a.jsonl")
    for path, more in (
        (file, {}),
        (str(tmp_path / "whole"), {}),
        (file, {"dataset_test_split": "train"}),
        ("A/b", {"dataset_test_split": "train"}),
    ):
        made = convert(Path("f"), {**TRL, "dataset_name": path, **more})
        assert "data.eval" not in made.recipe
        assert made.recipe["data.eval_share"] == 0.05
        assert "held out in its place: change it" in made.answers["dataset_name"].text
    assert (
        not {"data.eval", "data.eval_share", "eval_steps"}
        & convert(Path("f"), {**TRL, "dataset_name": file, "eval_strategy": "no"}).recipe.keys()
    )


@pytest.mark.parametrize("inside", ["", "data/"])
def test_splits_of_a_local_folder(inside: str, tmp_path: Path) -> None:
    (tmp_path / inside).mkdir(exist_ok=True)
    for split in ("train", "test"):
        (tmp_path / f"{inside}{split}-0.jsonl").write_text("{}")
    made = convert(Path("f"), {**TRL, "dataset_name": str(tmp_path)}).recipe
    assert made["data.train"] == [{"path": f"{tmp_path}/{inside}train*"}]
    assert made["data.eval"] == [{"path": f"{tmp_path}/{inside}test*"}]
    assert answer({"path": str(tmp_path), "split": "test"}).gives == {"data.train": [{"path": f"{tmp_path}/{inside}test*"}]}


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        ({"evals_per_epoch": 4}, {"eval_steps": 50}),
        ({"eval_strategy": "epoch"}, {"eval_steps": 50}),
        ({"eval_steps": 0.25}, {"eval_steps": 50}),
        ({}, {"eval_steps": 50}),
        ({"eval_steps": 7, "saves_per_epoch": 1}, {"eval_steps": 7, "save_steps": 500}),
    ],
)
def test_early_stopping_has_evaluations_where_an_epoch_has_no_known_number_of_steps(
    given: dict[str, Any], steps: dict[str, int], tmp_path: Path
) -> None:
    file = {
        **AXOLOTL,
        "datasets": [{"path": "a.jsonl"}],
        "num_epochs": 2,
        "early_stopping_patience": 3,
        "metric_for_best_model": "eval_loss",
    }
    made = convert(Path("f.yaml"), {**file, **given})
    assert steps.items() <= made.recipe.items()
    write(made, Path("f.yaml"), tmp_path / "r.yaml")
    config = load_config(tmp_path / "r.yaml", ["model.name_or_path=llama-3-8b"], claim_output=False, inputs=False)
    assert (config.eval_steps, config.best_metric) == (steps["eval_steps"], "loss")
    stands_in = {key: number for key, number in steps.items() if number in (50, 500)}
    text = (tmp_path / "r.yaml").read_text()
    for key, number in stands_in.items():
        assert f"# {key}={number}; how many steps an epoch has is not known" in text
        assert f"{key}={number}; how many steps an epoch has is not known" in made.table()


@pytest.mark.parametrize(
    ("entry", "what"),
    [
        ({"ranking": False, "split": "train", "formatting": "openai", "tags": {"role_tag": "role", "content_tag": "content"}}, ""),
        ({"formatting": "sharegpt", "tags": {"user_tag": "user", "assistant_tag": "assistant"}}, ""),
        ({"num_samples": None, "columns": {"prompt": "q", "images": None}}, ""),
        ({"formatting": "sharegpt", "tags": {"assistant_tag": "bot"}}, "its assistant_tag is bot, and hecate reads gpt or assistant"),
        ({"ranking": True}, "a has ranking"),
        ({"folder": "part"}, "a has folder"),
        ({"split": "test"}, "has no split test of its own"),
    ],
)
def test_keys_of_dataset_info(entry: dict[str, Any], what: str, tmp_path: Path) -> None:
    (tmp_path / "dataset_info.json").write_text(json.dumps({"a": {"file_name": "a.json", **entry}}))
    file = {"model_name_or_path": "m", "stage": "sft", "dataset": "a", "template": "qwen", "dataset_dir": str(tmp_path)}
    found = convert(Path("f"), file).answers["dataset"]
    assert (found.kind == "refused") is bool(what), found
    assert what in found.text


@pytest.mark.parametrize(
    ("key", "value", "kind"),
    [
        ("mix_strategy", "concat", "the default already"),
        ("mix_strategy", "interleave_over", "refused"),
        ("enable_thinking", True, "the default already"),
        ("enable_thinking", False, "refused"),
        ("media_dir", "data", "left out"),
        ("preprocessing_batch_size", 1000, "left out"),
        ("eval_on_each_dataset", True, "left out"),
        ("interleave_probs", "0.5,0.5", "refused"),
        ("default_system", "Be kind.", "refused"),
    ],
)
def test_keys_beside_llama_factorys_data(key: str, value: Any, kind: str) -> None:
    file = {"model_name_or_path": "m", "stage": "sft", "dataset": "a", "template": "qwen", key: value}
    assert convert(Path("f"), file).answers[key].kind == kind
