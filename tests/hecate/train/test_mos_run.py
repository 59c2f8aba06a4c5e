"""A run of Mixture of Shards with one pair for each linear, from its configuration to an ordinary LoRA that PEFT reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from hecate.adapters.trained_output import begin_with_adapter
from hecate.apps.answers.opened import with_adapter
from hecate.apps.foresee.dry_run import forecast
from hecate.config import load_config
from hecate.errors import UserError
from hecate.model.base import BaseChoice
from hecate.model.sizes.memory import MemoryPart
from hecate.model.sizes.pair_check import check_pair_sizes
from hecate.model.sizes.run_shape import run_shape
from hecate.ranks.groups import ExpertGroups
from hecate.ranks.ranks import Ranks
from hecate.report.summary import training_report
from hecate.train.training import Training
from testing.answering import answer
from testing.tiny_run import make_workshop
from tests.hecate.train import command_line

RECIPE = Path(__file__).parents[3] / "configs" / "recipes" / "mos.yaml"
ONE_PAIR = ("moe.unit=linear", "moe.num_experts=1", "moe.top_k=1", "lora.target_modules=[q_proj,v_proj,down_proj]")
SHARDS = ("lora.pairs=shards", "lora.r=3")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workshop(tmp_path_factory.mktemp("workshop"))


def merged(*overrides: str) -> list[str]:
    """Of several values of a key the last one."""
    return [f"{key}={value}" for key, value in dict(override.split("=", 1) for override in overrides).items()]


def training(workshop: Path, group: dist.ProcessGroup, name: str, *overrides: str) -> tuple[Training, Ranks]:
    given = merged(*ONE_PAIR, "data.eval=[]", "eval.generate=false", f"output_dir={workshop}/runs/{name}", *overrides)
    ranks = Ranks(0, 1, torch.device("cpu"), ExpertGroups(group, group))
    return Training(load_config(workshop / "config.yaml", given, claim_output=False), ranks), ranks


def logits(model: Any, engine: Any = None) -> torch.Tensor:
    ids = torch.arange(20)[None]
    with torch.no_grad():
        if engine is None:
            return model(input_ids=ids).logits
        with engine.evaluation():
            return model(input_ids=ids).logits


def peft_logits(workshop: Path, folder: Path) -> torch.Tensor:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(workshop / "model", dtype=torch.float32).eval()
    return logits(PeftModel.from_pretrained(base, str(folder)).eval())


def test_from_configuration_to_an_adapter_that_peft_reads(workshop: Path, one_rank: dist.ProcessGroup) -> None:
    """Trained, saved and resumed; exported without any router; read by PEFT and by this program, with the same logits."""
    run, ranks = training(workshop, one_rank, "mos", *SHARDS)
    assert set(run.parts.optimizer.replicated) == set(), "no router is trained"
    assert training_report(run.facts().trainable)[0].splitlines()[:3] == [
        "trains 768 parameters, 3.1 kB",  # of 2 layers 2 x (32 + 32 + 32 + 16 + 48 + 32)
        "pools of all layers: 768 parameters, 3.1 kB",
        "  2 blocks x 128 parameters and 2 blocks x 96 parameters and 2 blocks x 160 parameters, 6 on rank 0",
    ]
    losses = [run.train_one().result.loss for _ in range(3)]
    assert losses[-1] < losses[0]
    run.save()
    again, _ = training(workshop, one_rank, "mos", *SHARDS, "resume=true")
    assert again.train_one().result.loss == run.train_one().result.loss

    folder = run.parts.output.replace(workshop / "runs" / "mos", run.parts.moe, ranks)
    tensors = load_file(folder / "adapter_model.safetensors")
    assert len(tensors) == 2 * 3 * 2
    assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in tensors)
    assert tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"].shape == (3, 32)
    assert json.loads((folder / "adapter_config.json").read_text())["hecate"]["extra"]["drawn"] == run.parts.drawn_digest
    assert_read_alike(workshop, folder, run, ranks)


def assert_read_alike(workshop: Path, folder: Path, run: Training, ranks: Ranks) -> None:
    """This program and PEFT make the run's logits of its adapter."""
    ours = logits(run.parts.base.model, run.parts.moe.engine)
    base, moe = with_adapter(folder, ranks, BaseChoice(dtype="float32"))
    torch.testing.assert_close(logits(base.model, moe.engine), ours, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(peft_logits(workshop, folder), ours, rtol=1e-5, atol=1e-5)


OTHERS = {
    "fixed_a": ("lora.pairs=fixed_a",),
    "nola": ("lora.pairs=nola", "lora.nola.bases=16", "learning_rate=0.1"),
    "row_norm": ("lora.gradient_rule=row_norm", "lora.eta=2.0", "lora.alpha=null", "lora.dropout=0"),
}


@pytest.mark.parametrize("system", OTHERS)
def test_peft_reads_one_pair_for_each_linear_whatever_trained_it(workshop: Path, one_rank: dist.ProcessGroup, system: str) -> None:
    run, ranks = training(workshop, one_rank, system, "lora.r=3", *OTHERS[system])
    before = logits(run.parts.base.model, run.parts.moe.engine)
    for _ in range(3):
        run.train_one()
    assert (logits(run.parts.base.model, run.parts.moe.engine) - before).abs().max() > 1e-3, "little was trained"
    folder = run.parts.output.replace(workshop / "runs" / system, run.parts.moe, ranks)
    assert_read_alike(workshop, folder, run, ranks)


def test_plain_pairs_begin_with_such_an_adapter(workshop: Path, one_rank: dist.ProcessGroup) -> None:
    """Layer 0 has plain adapters on every rank. What PEFT reads is what training begins with."""
    some = ("moe.num_experts=[0,1]", "lora.r=2")
    run, ranks = training(workshop, one_rank, "plain", *some)
    for _ in range(2):
        run.train_one()
    folder = run.parts.output.replace(workshop / "runs" / "plain", run.parts.moe, ranks)
    torch.testing.assert_close(peft_logits(workshop, folder), logits(run.parts.base.model, run.parts.moe.engine), rtol=1e-5, atol=1e-5)
    begun, _ = training(workshop, one_rank, "begun", *some, f"lora.init_from={folder}")
    assert logits(begun.parts.base.model, begun.parts.moe.engine).equal(logits(run.parts.base.model, run.parts.moe.engine))
    begun.train_one()
    begin_with_adapter(begun.parts.config, begun.parts.base, begun.parts.moe)
    assert logits(begun.parts.base.model, begun.parts.moe.engine).equal(logits(run.parts.base.model, run.parts.moe.engine))
    with pytest.raises(UserError, match=r"lora\.init_from: .*/adapter has lora\.r 2, but the configuration has 4"):
        training(workshop, one_rank, "other", "lora.r=4", "lora.alpha=16", f"lora.init_from={folder}")


def test_pools_that_the_model_s_sizes_forbid_are_refused_before_any_process_starts(workshop: Path) -> None:
    def config(*overrides: str) -> Any:
        given = merged(*ONE_PAIR, *SHARDS, f"output_dir={workshop}/runs/refused", *overrides)
        return load_config(workshop / "config.yaml", given, claim_output=False)

    check_pair_sizes(config())
    with pytest.raises(UserError, match=r"lora\.shards\.per_vector: 5 does not divide the 32 inputs and the 32 outputs of one of"):
        check_pair_sizes(config("lora.shards.per_vector=5"))
    with pytest.raises(UserError, match=r"the shards of 8 public vectors .*, but its pool has 2\n"):
        check_pair_sizes(config("lora.r=9"))
    with pytest.raises(UserError, match=r"per_vector: 5 does not divide the 32 inputs and the 48 outputs of gate_proj"):
        check_pair_sizes(config("moe.unit=ffn", "moe.num_experts=2", "lora.shards.per_vector=5", "lora.target_modules=[gate_proj]"))


UNITS = {
    "linear": ((), 2 * 2 * (64 + 48 + 48 + 64 + 3 * 80)),
    "ffn": (("moe.unit=ffn", "moe.num_experts=3", "moe.top_k=2"), 2 * 3 * 2 * 3 * 80),
}
"""by the unit, what differs from the recipe, and the numbers of all pools: layers x experts x equivalent rank x inputs and outputs"""


@pytest.mark.slow
@pytest.mark.parametrize("unit", UNITS)
def test_the_recipe_trains_resumes_and_sends_what_is_planned(workshop: Path, unit: str) -> None:
    """Of two ranks each gets the other's blocks once a step, whatever the number of micro-steps, and sends their gradients back once."""
    differs, numbers = UNITS[unit]
    data = f"data.train=[{workshop}/up.train.jsonl,{workshop}/echo.train.jsonl]"
    sizes = ["lora.r=3", "data.seq_len=64", "max_steps=4", "save_steps=2", "learning_rate=3e-2", "fssdp.policy=full"]
    sizes += ["data.eval=[]", "eval.on_start=false", "eval.generate=false"]
    given = [f"model.name_or_path={workshop}/model", "model.dtype=float32", data, "nproc=2", *sizes, *differs]
    name = f"recipe-{unit}"
    where = f"output_dir={workshop}/runs/{name}"
    command_line.run("train", RECIPE, *given, where)
    steps = command_line.records(workshop, name, "step")
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert [step["bytes_sent"] for step in steps] == [2 * 4 * numbers] * 4
    planned = forecast(run_shape(load_config(RECIPE, [*given, where], claim_output=False), None, 2), "balanced").policies[0]
    others = planned_all_reduce(planned.memory)
    assert (planned.policy, planned.bytes.near - others) == ("full", 2 * 4 * numbers)

    folder = workshop / "runs" / name / "adapter"
    whole = load_file(folder / "adapter_model.safetensors")
    assert isinstance(answer(folder, "w1x1", system=None, model=None, max_new_tokens=4), str)
    again = workshop / "runs" / f"{name}-again"
    shutil.copytree(workshop / "runs" / name, again)
    shutil.rmtree(again / "adapter")
    shutil.rmtree(again / "checkpoint-4")
    resumed = [str(again / "config.yaml"), f"output_dir={again}", "resume=true"]
    command_line.run("train", *resumed)
    assert all(torch.equal(value, whole[key]) for key, value in load_file(again / "adapter" / "adapter_model.safetensors").items())
    assert "seed" in command_line.run("train", *resumed, "seed=2", status=2).stderr


def planned_all_reduce(memory: list[MemoryPart]) -> float:
    """Bytes that both ranks send of the gradients of what every rank trains alike: as many as it has numbers, of four bytes, to and fro."""
    (alike,) = [part.bytes_PD for part in memory if part.name == "routers, adapters, moments"]
    return 2 * float(alike[0, 0]) / 3


def test_the_recipe_is_the_paper_s_system(workshop: Path) -> None:
    data = [f"data.train=[{workshop}/up.train.jsonl]", f"data.eval=[{workshop}/up.eval.jsonl]"]
    config = load_config(RECIPE, [f"model.name_or_path={workshop}/model", *data, f"output_dir={workshop}/runs/recipe"], claim_output=False)
    assert config.moe.one_pair_each
    assert (config.moe.output, config.moe.trains_routers) == ("lora", False)
    assert config.lora.shape.source == "shards"
