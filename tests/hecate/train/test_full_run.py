"""Whole runs of full experts through the command line: an upcycled model trains, is killed, resumes, and is exported as a Mixtral."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import hecate.cli.models
import hecate.model.files.memory_check
from hecate.config import DataSource
from hecate.data.encode import encode_source
from hecate.errors import UserError
from testing.answering import answer
from tests.hecate.train.command_line import kill_rank_1_after, losses, records, run, train_arguments, workshop

__all__ = ["workshop"]  # a fixture

FULL = ("moe.family=full", "moe.upcycle_noise=0.1", "model.train_non_experts=true", "learning_rate=3e-3", "eval.generate=false")


@pytest.fixture(scope="module")
def whole(workshop: Path) -> Path:
    run(*train_arguments(workshop, "full", *FULL))
    return workshop / "runs" / "full"


def test_a_run_learns_and_leaves_a_mixtral(workshop: Path, whole: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    steps = records(workshop, "full", "step")
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.05
    assert not (whole / "adapter").exists()
    model, info = AutoModelForCausalLM.from_pretrained(whole / "model", output_loading_info=True)
    assert type(model).__name__ == "MixtralForCausalLM"
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert (model.config.num_local_experts, model.config.num_experts_per_tok) == (3, 2)
    AutoTokenizer.from_pretrained(whole / "model")
    # The held-out loss that the run measured at its end, by the model that it left.
    (last,) = records(workshop, "full", "eval")[-1:]
    assert held_out_loss(model, workshop) == pytest.approx(last["sources"]["up.eval"]["loss"], rel=1e-4)
    report = json.loads((whole / "trainable.json").read_text(encoding="utf-8"))
    assert sum(row["count"] * row["numel"] for row in report["rows"]) == sum(parameter.numel() for parameter in model.parameters())


def test_the_model_that_a_run_leaves_is_evaluated_and_answers(workshop: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    hecate.cli.models.evaluate(workshop / "config.yaml", [f"output_dir={whole}", *FULL[:-1]])
    shown = capsys.readouterr().out
    for name, score in records(workshop, "full", "eval")[-1]["sources"].items():
        assert f"{score['loss']:.3f}" in next(line for line in shown.splitlines() if name in line)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(whole / "model"), AutoTokenizer.from_pretrained(whole / "model")
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "w1x1"}], tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
    wanted = tokenizer.decode(model.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :], skip_special_tokens=True)
    assert answer(whole / "model", "w1x1", system=None, model=None, max_new_tokens=4) == wanted.strip()


def test_a_model_that_does_not_fit_is_not_loaded(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hecate.model.files.memory_check, "free_bytes", lambda _: 1000)
    with pytest.raises(UserError, match="the whole model in one process"):
        answer(whole / "model", "w1x1", system=None, model=None, max_new_tokens=4)


def held_out_loss(model: Any, workshop: Path) -> float:
    """Of up.eval, by transformers alone."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(workshop / "model")
    source = encode_source(DataSource(path=str(workshop / "up.eval.jsonl"), name="up"), tokenizer, seq_len=64, vocab_size=len(tokenizer))
    total = labels = 0.0
    with torch.no_grad():
        for index in range(len(source)):
            sample = source[index]
            ids, targets = (torch.from_numpy(part).long() for part in (sample.input_ids, sample.targets))
            logits = model(ids[None]).logits[0]
            total += float(torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum"))
            labels += int((targets != -100).sum())
    return total / labels


@pytest.mark.slow
def test_a_killed_run_continues_bit_for_bit(workshop: Path, whole: Path) -> None:
    arguments = train_arguments(workshop, "full-killed", *FULL, "save_steps=2", "eval.on_start=false")
    assert "rank 1 of 2 was killed by SIGKILL" in kill_rank_1_after("step 3/", arguments)
    run(*arguments, "resume=true")
    assert losses(workshop, "full-killed") == losses(workshop, "full")
    for file in sorted(whole.glob("model/*.safetensors")):
        with safe_open(file, "pt") as ours, safe_open(workshop / "runs/full-killed/model" / file.name, "pt") as theirs:
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours.get_tensor(name), theirs.get_tensor(name)) for name in ours.keys())  # noqa: SIM118
