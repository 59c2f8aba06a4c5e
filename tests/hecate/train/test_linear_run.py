"""A run with experts over linears, from its configuration to its adapter, and what is done with that."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from hecate.config import load_config
from hecate.model.base import BaseChoice
from hecate.ranks.groups import ExpertGroups
from hecate.ranks.ranks import Ranks
from hecate.train.inference import _with_adapter
from hecate.train.training import Training
from testing.tiny_run import make_workshop

RECIPE = Path(__file__).parents[3] / "configs" / "recipes" / "mola.yaml"
LINEARS = ("moe.unit=linear", "moe.num_experts=null", "moe.allocation=[2,3]", "lora.target_modules=[q_proj,v_proj,down_proj]")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workshop(tmp_path_factory.mktemp("workshop"))


def training(workshop: Path, group: dist.ProcessGroup, name: str, *overrides: str) -> tuple[Training, Ranks]:
    given = [*LINEARS, "data.eval=[]", "eval.generate=false", f"output_dir={workshop}/runs/{name}", *overrides]
    ranks = Ranks(0, 1, torch.device("cpu"), ExpertGroups(group, group))
    return Training(load_config(workshop / "config.yaml", given, claim_output=False), ranks), ranks


def test_from_configuration_to_adapter_and_back(workshop: Path, one_rank: dist.ProcessGroup) -> None:
    """Trained, saved and resumed; exported; applied to the base model; and begun with."""
    run, ranks = training(workshop, one_rank, "whole")
    losses = [run.train_one().result.loss for _ in range(3)]
    assert losses[-1] < losses[0]
    run.save()
    again, _ = training(workshop, one_rank, "whole", "resume=true")
    assert again.train_one().result.loss == run.train_one().result.loss

    folder = run.parts.output.replace(workshop / "runs" / "whole", run.parts.moe, ranks)
    base, moe = _with_adapter(folder, ranks, BaseChoice(dtype="float32"))
    ids = torch.arange(20)[None]
    logits = []
    for model, engine in ((run.parts.base.model, run.parts.moe.engine), (base.model, moe.engine)):
        with engine.evaluation(), torch.no_grad():
            logits.append(model(input_ids=ids).logits)
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-5, atol=1e-5)

    begun, _ = training(workshop, one_rank, "begun", f"lora.init_from={folder}")
    begun.parts.output.replace(workshop / "runs" / "begun", begun.parts.moe, ranks)
    ours, theirs = (load_file(workshop / "runs" / name / "adapter" / "adapter_model.safetensors") for name in ("begun", "whole"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_recipe_is_read(workshop: Path) -> None:
    data = [f"data.train=[{workshop}/up.train.jsonl]", f"data.eval=[{workshop}/up.eval.jsonl]"]
    config = load_config(RECIPE, [f"model.name_or_path={workshop}/model", *data, f"output_dir={workshop}/runs/recipe"], claim_output=False)
    assert config.moe.kind.over_linears
    assert [config.moe.experts_per_layer(30).count(experts) for experts in (2, 4, 6, 8)] == [8, 7, 8, 7]
