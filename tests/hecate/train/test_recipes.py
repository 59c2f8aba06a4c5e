"""The recipes of published systems: each is a configuration of the one trainer, here over a tiny model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hecate.checkpoint.manifest import read_manifest
from hecate.config import Config, load_config
from hecate.forecast.run_shape import run_shape
from hecate.parallel.expert_kinds import LoraShape
from hecate.train.inference import answer
from tests.hecate.train.command_line import records, run, workshop

__all__ = ["workshop"]  # a fixture

RECIPES = Path(__file__).parents[3] / "configs" / "recipes"
SYSTEMS = {
    "ffa_lora": LoraShape(8, 2.0, 0.0, "fixed_a"),
    "allora": LoraShape(8, 1.0, 0.0, eta=2.0),
    "nola": LoraShape(16, 1.0, 0.0, "nola", bases=256),
}
every = pytest.mark.parametrize("name", SYSTEMS)
B, A = 2 * 48 + 32, 2 * 32 + 48
"""the numbers of an expert's B and A of rank 1, with hidden 32 and FFN 48"""
TRAINED = {"ffa_lora": 8 * B, "allora": 8 * (A + B), "nola": 3 * 2 * 256}


def given(workshop: Path, name: str) -> list[str]:
    data = f"data.train=[{workshop}/up.train.jsonl,{workshop}/echo.train.jsonl]"
    sizes = ["data.seq_len=64", "micro_batch_size=2", "moe.num_experts=3", "max_steps=4", "save_steps=2", "learning_rate=1e-2"]
    return [f"model.name_or_path={workshop}/model", "model.dtype=float32", data, f"output_dir={workshop}/runs/{name}", "nproc=2", *sizes]


def loaded(workshop: Path, name: str) -> Config:
    return load_config(RECIPES / f"{name}.yaml", given(workshop, name), claim_output=False)


@every
def test_a_recipe_is_planned_by_what_it_trains(workshop: Path, name: str) -> None:
    config = loaded(workshop, name)
    assert config.lora.shape == SYSTEMS[name]
    (group,) = run_shape(config, None, 2).groups
    assert (group.cost.trainable_bytes, group.cost.reduced_bytes, group.cost.state_bytes) == (
        4 * TRAINED[name],
        4 * TRAINED[name],
        12 * TRAINED[name],
    )
    assert group.cost.assignment_flops == 2 * SYSTEMS[name].rank * (A + B)


@pytest.mark.slow
@every
def test_a_recipe_trains_resumes_and_leaves_an_ordinary_adapter(workshop: Path, name: str) -> None:
    """Of each of 2 x 3 experts the other rank gets the chunk and sends the gradient back: as many bytes as planners reckon with."""
    where = RECIPES / f"{name}.yaml"
    run("train", where, *given(workshop, name), "fssdp.policy=full")
    steps = records(workshop, name, "step")
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert steps[0]["bytes_sent"] == 2 * 3 * 2 * 4 * TRAINED[name]
    folder = workshop / "runs" / name / "adapter"
    adapter = load_file(folder / "adapter_model.safetensors")
    tensor = "mixlora.layers.1.mlp.up_proj.experts.{}.lora_{}.weight"
    assert torch.equal(adapter[tensor.format(0, "A")], adapter[tensor.format(2, "A")]) == (name == "ffa_lora")
    assert not torch.equal(adapter[tensor.format(0, "B")], adapter[tensor.format(2, "B")])
    description = json.loads((folder / "adapter_config.json").read_text())
    assert description["lora_alpha"] / description["r"] == SYSTEMS[name].scale
    drawn = read_manifest(workshop / "runs" / name / "checkpoint-4").meta["drawn"]
    assert bool(drawn) == (name != "allora")
    assert description["hecate"]["extra"].get("drawn", "") == drawn
    assert isinstance(answer(folder, "w1x1", system=None, model=None, max_new_tokens=4), str)

    again = workshop / "runs" / f"{name}-again"
    shutil.copytree(workshop / "runs" / name, again)
    shutil.rmtree(again / "adapter")
    shutil.rmtree(again / "checkpoint-4")
    resumed = [str(again / "config.yaml"), f"output_dir={again}", "resume=true"]
    run("train", *resumed)
    assert all(torch.equal(value, adapter[key]) for key, value in load_file(again / "adapter" / "adapter_model.safetensors").items())
    other = {"ffa_lora": "seed=2", "allora": "lora.eta=1.5", "nola": "lora.nola.bases=255"}[name]
    refused = run("train", *resumed, other, status=2).stderr
    assert other.partition("=")[0] in refused
