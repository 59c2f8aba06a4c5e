"""A run of Mixture of Shards with one pair for each linear, from its configuration to an ordinary LoRA that PEFT reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from hecate.config import load_config
from hecate.errors import UserError
from hecate.forecast.pool_check import check_pools
from hecate.model.base import BaseChoice
from hecate.ranks.groups import ExpertGroups
from hecate.ranks.ranks import Ranks
from hecate.train.inference import _with_adapter
from hecate.train.training import Training
from testing.tiny_run import make_workshop

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
    ours = logits(run.parts.base.model, run.parts.moe.engine)
    base, moe = _with_adapter(folder, ranks, BaseChoice(dtype="float32"))
    torch.testing.assert_close(logits(base.model, moe.engine), ours, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(peft_logits(workshop, folder), ours, rtol=1e-5, atol=1e-5)


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
    with pytest.raises(UserError, match=r"lora\.init_from: .*/adapter has lora\.r 2, but the configuration has 4"):
        training(workshop, one_rank, "other", "lora.r=4", "lora.alpha=16", f"lora.init_from={folder}")


def test_pools_that_the_model_s_sizes_forbid_are_refused_before_any_process_starts(workshop: Path) -> None:
    def config(*overrides: str) -> Any:
        given = merged(*ONE_PAIR, *SHARDS, f"output_dir={workshop}/runs/refused", *overrides)
        return load_config(workshop / "config.yaml", given, claim_output=False)

    check_pools(config())
    with pytest.raises(UserError, match=r"lora\.shards\.per_vector: 5 does not divide the 32 inputs and the 32 outputs of one of"):
        check_pools(config("lora.shards.per_vector=5"))
    with pytest.raises(UserError, match=r"the shards of 8 public vectors .*, but its pool has 2\n"):
        check_pools(config("lora.r=9"))
    with pytest.raises(UserError, match=r"per_vector: 5 does not divide the 32 inputs and the 48 outputs of gate_proj"):
        check_pools(config("moe.unit=ffn", "moe.num_experts=2", "lora.shards.per_vector=5", "lora.target_modules=[gate_proj]"))


def test_the_recipe_is_the_paper_s_system(workshop: Path) -> None:
    data = [f"data.train=[{workshop}/up.train.jsonl]", f"data.eval=[{workshop}/up.eval.jsonl]"]
    config = load_config(RECIPE, [f"model.name_or_path={workshop}/model", *data, f"output_dir={workshop}/runs/recipe"], claim_output=False)
    assert config.moe.one_pair_each
    assert (config.moe.output, config.moe.trains_routers) == ("lora", False)
    assert config.lora.shape.source == "shards"
