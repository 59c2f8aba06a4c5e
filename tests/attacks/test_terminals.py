"""Wherever somebody's text stands, no command passes an order in it on to the terminal: names, keys, values, answers, messages."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hecate.cli import _command
from testing.tiny_run import make_workshop
from tests.terminal_orders import orders

TITLE, CLEAR = "\x1b]0;owned\x07", "\x1b[2J"


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workshop(tmp_path_factory.mktemp("workshop"))


def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["hecate", *arguments])
    with pytest.raises(SystemExit):
        _command()
    read = capsys.readouterr()
    return read.out + read.err


def in_a_key_of_a_configuration(folder: Path, workshop: Path) -> list[str]:
    (folder / "a.yaml").write_text('"\\e]0;owned\\a": 1\nlearning_rate: x\n', encoding="utf-8")
    return ["train", str(folder / "a.yaml")]


def in_the_name_of_a_configuration(folder: Path, workshop: Path) -> list[str]:
    (folder / f"{CLEAR}.yaml").write_text("learning_rate: x\n", encoding="utf-8")
    return ["train", str(folder / f"{CLEAR}.yaml")]


def in_an_override(folder: Path, workshop: Path) -> list[str]:
    return ["train", str(workshop / "config.yaml"), f"{TITLE}=1", f"output_dir={folder}/{CLEAR}"]


def in_a_key_of_the_data(folder: Path, workshop: Path) -> list[str]:
    (folder / "a.jsonl").write_text(json.dumps({TITLE: 1}) + "\n", encoding="utf-8")
    return ["train", str(workshop / "config.yaml"), f"data.train={folder}/a.jsonl", f"output_dir={folder}/run"]


def in_a_role_of_the_data(folder: Path, workshop: Path) -> list[str]:
    (folder / "a.jsonl").write_text(json.dumps({"messages": [{"role": TITLE, "content": CLEAR}]}) + "\n", encoding="utf-8")
    return ["train", str(workshop / "config.yaml"), f"data.train={folder}/a.jsonl", f"output_dir={folder}/run"]


def in_the_name_of_a_data_file(folder: Path, workshop: Path) -> list[str]:
    (folder / f"{CLEAR}.jsonl").write_text("{", encoding="utf-8")
    return ["train", str(workshop / "config.yaml"), f"data.train={folder}/{CLEAR}.jsonl", f"output_dir={folder}/run"]


def in_a_status(folder: Path, workshop: Path) -> list[str]:
    value = {"state": CLEAR, "ended": None, "detail": TITLE, "notes": [{"when": 0, "text": TITLE}]}
    (folder / "status.json").write_text(json.dumps(value), encoding="utf-8")
    return ["status", str(folder)]


def in_an_adapters_description(folder: Path, workshop: Path) -> list[str]:
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": TITLE, "base_model_name_or_path": CLEAR}), encoding="utf-8")
    return ["generate", str(folder), "a"]


def in_the_name_of_a_tensor(folder: Path, workshop: Path) -> list[str]:
    value = {"peft_type": "LORA", "base_model_name_or_path": str(workshop / "model"), "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(value), encoding="utf-8")
    save_file({TITLE: torch.ones(1), CLEAR: torch.ones(1)}, folder / "adapter_model.safetensors")
    return ["generate", str(folder), "a"]


def in_a_models_configuration(folder: Path, workshop: Path) -> list[str]:
    (folder / "config.json").write_text(json.dumps({"model_type": TITLE, "architectures": [CLEAR]}), encoding="utf-8")
    (folder / "model.safetensors").touch()
    return ["generate", str(folder), "a"]


def in_the_index_of_a_model(folder: Path, workshop: Path) -> list[str]:
    (folder / "config.json").write_text((workshop / "model" / "config.json").read_text(), encoding="utf-8")
    (folder / "a.safetensors").touch()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": TITLE}}), encoding="utf-8")
    return ["generate", str(folder), "a"]


def in_a_sweep(folder: Path, workshop: Path) -> list[str]:
    (folder / "sweep.yaml").write_text('run: "\\e[2J"\n"\\e]0;owned\\a": 1\n', encoding="utf-8")
    return ["sweep", str(folder / "sweep.yaml")]


def in_a_topology(folder: Path, workshop: Path) -> list[str]:
    (folder / "t.yaml").write_text('"\\e]0;owned\\a": 1\nnodes: "\\e[2J"\n', encoding="utf-8")
    return ["plan", str(workshop / "config.yaml"), "--topology", str(folder / "t.yaml")]


def in_the_name_of_a_checkpoint(folder: Path, workshop: Path) -> list[str]:
    (folder / f"checkpoint-{CLEAR}").mkdir()
    (folder / "checkpoint-1").mkdir()
    (folder / "checkpoint-1" / "manifest.json").write_text(json.dumps({"format": TITLE}), encoding="utf-8")
    return ["checkpoint", "list", str(folder)]


def in_metrics(folder: Path, workshop: Path) -> list[str]:
    (folder / "metrics.jsonl").write_text(json.dumps({"kind": TITLE, "step": 1, CLEAR: 1}) + "\n", encoding="utf-8")
    return ["report", str(folder)]


PLANTED: tuple[Callable[[Path, Path], list[str]], ...] = (
    in_a_key_of_a_configuration,
    in_the_name_of_a_configuration,
    in_an_override,
    in_a_key_of_the_data,
    in_a_role_of_the_data,
    in_the_name_of_a_data_file,
    in_a_status,
    in_an_adapters_description,
    in_the_name_of_a_tensor,
    in_a_models_configuration,
    in_the_index_of_a_model,
    in_a_sweep,
    in_a_topology,
    in_the_name_of_a_checkpoint,
    in_metrics,
)


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_what_is_planted_is_shown_and_not_obeyed(
    tmp_path: Path, workshop: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], plant: Callable[..., list[str]]
) -> None:
    found = said(monkeypatch, capsys, *plant(tmp_path, workshop))
    assert found.strip(), "nothing was said"
    assert "Traceback" not in found
    assert orders(found) == []
