"""The recipes of published systems: each is a configuration of the one trainer, here over a tiny model."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hecate.checkpoint.manifest import read_manifest
from hecate.config import load_config
from hecate.model.sizes.run_shape import run_shape
from hecate.parallel.values.expert_kinds import LoraShape
from testing.answering import answer
from tests.hecate.train.command_line import records, run, workshop

__all__ = ["workshop"]  # a fixture

RECIPES = Path(__file__).parents[3] / "configs" / "recipes"
SYSTEMS = {
    "ffa_lora": LoraShape(8, 2.0, 0.0, "fixed_a"),
    "allora": LoraShape(8, 1.0, 0.0, gradient_rule="row_norm", eta=2.0),
    "nola": LoraShape(16, 2.0, 0.0, "nola", bases=256),
}
every = pytest.mark.parametrize("name", SYSTEMS)
GATED, DOWN, SQUARE, NARROW = (32, 48), (48, 32), (32, 32), (32, 16)
"""inputs and outputs of gate and up, of down, of queries and output, and of keys and values"""
FFN, LINEARS = [GATED, GATED, DOWN], [GATED, GATED, DOWN, SQUARE, SQUARE, NARROW, NARROW]
OVER = {"each linear": (), "a mixture in each FFN": ("moe.unit=ffn", "moe.num_experts=3", "moe.top_k=2")}
"""what a recipe trains, and the mixture that its head offers beside it"""


def given(workshop: Path, name: str, *overrides: str) -> list[str]:
    data = f"data.train=[{workshop}/up.train.jsonl,{workshop}/echo.train.jsonl]"
    rate = 1e-1 if name.startswith("nola") and not overrides else 1e-2  # one pair's few coefficients have little effect
    sizes = ["data.seq_len=64", "micro_batch_size=2", "max_steps=4", "save_steps=2", f"learning_rate={rate}"]
    model = [f"model.name_or_path={workshop}/model", "model.dtype=float32", "nproc=2"]
    return [*model, data, f"output_dir={workshop}/runs/{name}", *sizes, *overrides]


def trained(name: str, linears: list[tuple[int, int]]) -> int:
    """The numbers that the pairs of these linears train."""
    of_linear = {
        "ffa_lora": lambda inputs, outputs: 8 * outputs,
        "allora": lambda inputs, outputs: 8 * (inputs + outputs),
        "nola": lambda inputs, outputs: 2 * 256,
    }[name]
    return sum(of_linear(*linear) for linear in linears)


@every
def test_a_recipe_trains_one_pair_for_each_linear_and_nothing_beside_it(workshop: Path, name: str) -> None:
    config = load_config(RECIPES / f"{name}.yaml", given(workshop, name), claim_output=False)
    assert config.lora.shape == SYSTEMS[name]
    shape = run_shape(config, None, 2)
    assert shape.replicated_parameters == 0
    assert {group.experts for group in shape.groups} == {1}
    expected = Counter(trained(name, [linear]) for linear in (FFN if name == "nola" else LINEARS) for _ in range(2))
    assert sum((Counter({int(group.cost.trainable_bytes) // 4: group.number}) for group in shape.groups), Counter()) == expected
    assert all(group.cost.trainable_bytes == group.cost.reduced_bytes == group.cost.state_bytes / 3 for group in shape.groups)


@pytest.mark.slow
@pytest.mark.parametrize("over", OVER)
@every
def test_a_recipe_trains_resumes_and_leaves_an_ordinary_adapter(workshop: Path, name: str, over: str) -> None:
    """Of each pair in 2 layers the other rank gets the chunk and sends the gradient back: as many bytes as planners reckon with."""
    where, mixture, folder_name = RECIPES / f"{name}.yaml", bool(OVER[over]), f"{name} over {over}".replace(" ", "-")
    run("train", where, *given(workshop, folder_name, *OVER[over]), "fssdp.policy=full")
    steps = records(workshop, folder_name, "step")
    assert steps[-1]["loss"] < steps[0]["loss"]
    numbers = 3 * trained(name, FFN) if mixture else trained(name, FFN if name == "nola" else LINEARS)
    assert steps[0]["bytes_sent"] == 2 * 2 * 4 * numbers
    folder = workshop / "runs" / folder_name / "adapter"
    adapter = load_file(folder / "adapter_model.safetensors")
    if mixture:
        tensor = "mixlora.layers.1.mlp.up_proj.experts.{}.lora_{}.weight"
        assert torch.equal(adapter[tensor.format(0, "A")], adapter[tensor.format(2, "A")]) == (name == "ffa_lora")
        assert not torch.equal(adapter[tensor.format(0, "B")], adapter[tensor.format(2, "B")])
    else:
        of_peft = re.compile(r"base_model\.model\.model\.layers\.[01]\.(self_attn|mlp)\.[a-z]+_proj\.lora_[AB]\.weight")
        assert all(of_peft.fullmatch(key) for key in adapter)
    description = json.loads((folder / "adapter_config.json").read_text())
    assert description["lora_alpha"] / description["r"] == SYSTEMS[name].scale
    drawn = read_manifest(workshop / "runs" / folder_name / "checkpoint-4").meta["drawn"]
    assert bool(drawn) == (name != "allora")
    assert description["hecate"]["extra"].get("drawn", "") == drawn
    assert isinstance(answer(folder, "w1x1", system=None, model=None, max_new_tokens=4), str)

    again = workshop / "runs" / f"{folder_name}-again"
    shutil.copytree(workshop / "runs" / folder_name, again)
    shutil.rmtree(again / "adapter")
    shutil.rmtree(again / "checkpoint-4")
    resumed = [str(again / "config.yaml"), f"output_dir={again}", "resume=true"]
    run("train", *resumed)
    assert all(torch.equal(value, adapter[key]) for key, value in load_file(again / "adapter" / "adapter_model.safetensors").items())
    other = {"ffa_lora": "seed=2", "allora": "lora.eta=1.5", "nola": "lora.nola.bases=255"}[name]
    refused = run("train", *resumed, other, status=2).stderr
    assert other.partition("=")[0] in refused
