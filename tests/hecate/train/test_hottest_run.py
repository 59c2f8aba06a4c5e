"""A run that trains the hottest experts of another run's recorded loads, through the command line."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from hecate.parallel.values.traces import load_trace
from testing.answering import answer
from testing.byte_tokenizer import build_byte_tokenizer
from testing.tiny_run import write_samples
from tests.hecate.train.command_line import losses, run
from tests.plain_moe_lora import EXPERTS, save_tiny

CHOSEN = 2


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with experts, data, a configuration, and the run `traced`, which has recorded its loads."""
    folder, tokenizer = tmp_path_factory.mktemp("hottest"), build_byte_tokenizer()
    save_tiny("qwen3_moe", folder / "model", vocab_size=len(tokenizer), eos_token_id=257, bos_token_id=256, pad_token_id=257)
    tokenizer.save_pretrained(folder / "model")
    write_samples(folder / "up.train.jsonl", [f"w{n % 7}x{n}" for n in range(40)], str.upper)
    config: dict[str, Any] = {
        "model": {"name_or_path": f"{folder}/model", "dtype": "float64"},
        "data": {"train": f"{folder}/up.train.jsonl", "seq_len": 64},
        "output_dir": f"{folder}/runs/unset",
        "max_steps": 4,
        "learning_rate": 1e-2,
        "lora": {"r": 2, "dropout": 0.1},
        "moe": {"family": "moe_lora"},
        "save_steps": 2,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    run("train", folder / "config.yaml", f"output_dir={folder}/runs/traced", "nproc=2", "max_steps=2", "trace=true")
    return folder


def hottest(loads: Path) -> list[list[int]]:
    """Counted one number after another."""
    trace, found = load_trace(loads), []
    for layer in range(len(trace.units)):
        count: Counter[int] = Counter()
        for step in range(len(trace.steps)):
            for expert in range(EXPERTS):
                count[expert] += sum(trace.loads[step, layer, expert].tolist())
        found.append(sorted(sorted(range(EXPERTS), key=lambda expert: (-count[expert], expert))[:CHOSEN]))
    return found


def with_numbers(adapter: Path) -> list[list[int]]:
    """The experts of each layer whose pairs are not zero."""
    tensors, found = load_file(adapter / "adapter_model.safetensors"), []
    for layer in range(2):
        b = tensors[f"base_model.model.model.layers.{layer}.mlp.experts.lora_B.weight"]
        found.append([expert for expert in range(EXPERTS) if b.view(len(b), -1, EXPERTS)[:, :, expert].any()])
    return found


def test_they_are_found_once_and_the_rest_of_the_run_needs_no_loads(workshop: Path) -> None:
    """Four ranks begin, one goes on from the run's own folder, and the adapter is read by the other commands."""
    runs, loads = workshop / "runs", workshop / "runs" / "copied-loads"
    shutil.copytree(runs / "traced" / "loads", loads)
    wanted = hottest(loads)
    assert wanted[0] != wanted[1], "layers that are alike would not show whose experts are whose"
    given = [workshop / "config.yaml", f"lora.hottest_experts={CHOSEN}", f"lora.loads={loads}"]
    run("train", *given, f"output_dir={runs}/whole", "nproc=1")
    run("train", *given, f"output_dir={runs}/parts", "nproc=4", "lr_scheduler_type=constant", "max_steps=2")
    run("train", *given, f"output_dir={runs}/straight", "nproc=4", "lr_scheduler_type=constant")
    run("train", *given, f"output_dir={runs}/parts", "nproc=4", "lr_scheduler_type=constant", "max_steps=2", "resume=true")
    shutil.rmtree(loads)
    saved = yaml.safe_load((runs / "parts" / "config.yaml").read_text())["lora"]
    assert (saved["experts"], saved["hottest_experts"], saved["loads"]) == (wanted, None, None)
    run("train", runs / "parts", "nproc=1", "max_steps=4", "resume=true")
    assert torch.tensor(losses(workshop, "parts")).sub(torch.tensor(losses(workshop, "straight"))).abs().max() <= 1e-10
    assert with_numbers(runs / "parts" / "adapter") == with_numbers(runs / "whole" / "adapter") == wanted
    run("export", runs / "parts" / "checkpoint-2", "-o", workshop / "at-2")
    assert with_numbers(workshop / "at-2") == wanted
    assert isinstance(answer(runs / "parts" / "adapter", "w1x1", system=None, model=None, max_new_tokens=4), str)


def test_a_resumed_run_with_other_experts_is_refused(workshop: Path) -> None:
    runs = workshop / "runs"
    given = [workshop / "config.yaml", f"output_dir={runs}/changed", "nproc=1"]
    run("train", *given, "lora.experts=[[0],[1]]", "max_steps=2")
    said = run("train", *given, "lora.experts=[[0],[2]]", "max_steps=2", "resume=true", status=2).stderr
    assert "lora.experts: [[0], [1]] then, [[0], [2]] now" in said
    loads = f"lora.loads={runs}/traced/loads"
    said = run("train", *given, "lora.hottest_experts=3", loads, "max_steps=2", "resume=true", status=2).stderr
    assert "lora.experts: [[0], [1]] then, " in said
