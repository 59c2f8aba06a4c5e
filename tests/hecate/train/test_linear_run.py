"""A run with experts over linears, from its configuration to its adapter, and what is done with that."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from hecate.apps.answers.opened import with_adapter
from hecate.config import load_config
from hecate.errors import UserError
from hecate.model.base import BaseChoice
from hecate.ranks.groups import ExpertGroups
from hecate.ranks.ranks import Ranks
from hecate.train.training import Training
from testing.tiny_run import make_workshop

RECIPE = Path(__file__).parents[3] / "configs" / "recipes" / "mola.yaml"
LINEARS = ("moe.unit=linear", "moe.num_experts=null", "moe.allocation=[2,3]", "lora.target_modules=[q_proj,v_proj,down_proj]")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workshop(tmp_path_factory.mktemp("workshop"))


def training(workshop: Path, group: dist.ProcessGroup, name: str, *overrides: str, plain: bool = False) -> tuple[Training, Ranks]:
    given = [*(() if plain else LINEARS), "data.eval=[]", "eval.generate=false", f"output_dir={workshop}/runs/{name}", *overrides]
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
    base, moe = with_adapter(folder, ranks, BaseChoice(dtype="float32"))
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
    with pytest.raises(UserError, match=r"has moe\.router {'score': 'softmax'}, but .* has {'score': 'sigmoid'}\n  give moe.router as"):
        training(workshop, one_rank, "other", f"lora.init_from={folder}", "moe.router.score=sigmoid")


RANKS = ("moe.allocation=null", "moe.num_experts=3", "lora.r=[4,1,2]", "lora.alpha=8")


def test_ranks_that_differ_leave_a_padded_adapter(workshop: Path, one_rank: dist.ProcessGroup) -> None:
    """The scales of experts, 8 / rank, are folded into B, whose file says 8 / 4 for all; what is read back trains on as it was."""
    given = [*LINEARS[:1], LINEARS[3], *RANKS]
    run, ranks = training(workshop, one_rank, "ranks", *given, plain=True)
    for _ in range(2):
        run.train_one()
    folder = run.parts.output.replace(workshop / "runs" / "ranks", run.parts.moe, ranks)
    tensors = load_file(folder / "adapter_model.safetensors")
    held = {f"{unit}.{expert}": chunk.detach() for (unit, expert), chunk in run.parts.moe.engine.shards.named_parameters().items()}
    path = "base_model.model.model.layers.0.self_attn.q_proj"
    for expert, rank in enumerate((4, 1, 2)):
        a, b = (tensors[f"{path}.lora_{matrix}_{expert}.weight"] for matrix in "AB")
        assert [int(row.any()) for row in a] == [1] * rank + [0] * (4 - rank)
        of_a, of_b = held[f"0.self_attn.q_proj.{expert}"].split([a.numel(), b.numel()])
        assert torch.equal(a.flatten(), of_a)
        assert b.any()
        torch.testing.assert_close(b.flatten(), of_b * (4 / rank), rtol=1e-6, atol=0)
    begun, _ = training(workshop, one_rank, "again", *given, f"lora.init_from={folder}", plain=True)
    for (unit, expert), chunk in begun.parts.moe.engine.shards.named_parameters().items():
        torch.testing.assert_close(chunk.detach(), held[f"{unit}.{expert}"], rtol=1e-6, atol=0)
    smaller = [one if not one.startswith("lora.r=") else "lora.r=[4,1,1]" for one in given]
    with pytest.raises(
        UserError, match=r"has lora\.r \[4, 1, 2\], but the configuration has \[4, 1, 1\]\n  give lora\.r as the adapter has it"
    ):
        training(workshop, one_rank, "smaller", *smaller, f"lora.init_from={folder}", plain=True)
    alike = [one if not one.startswith("lora.r=") else "lora.r=4" for one in given]  # whose rows beyond 1 would never have trained
    with pytest.raises(UserError, match=r"has lora\.r \[4, 1, 2\], but the configuration has 4\n  give lora\.r as the adapter has it"):
        training(workshop, one_rank, "alike", *alike, f"lora.init_from={folder}", plain=True)


def test_training_begins_with_a_lora_whose_modules_have_their_whole_names(workshop: Path, one_rank: dist.ProcessGroup) -> None:
    """As PEFT writes them where all linears are adapted; one that is for some of the layers only is another adapter."""
    given = ["moe.unit=linear", "moe.num_experts=1", "moe.top_k=1", "lora.target_modules=[q_proj,down_proj]"]
    run, ranks = training(workshop, one_rank, "named", *given, plain=True)
    run.train_one()
    folder = run.parts.output.replace(workshop / "runs" / "named", run.parts.moe, ranks)
    config = folder / "adapter_config.json"
    described = json.loads(config.read_text())
    whole = sorted(one.path for one in run.parts.base.linears if one.name in ("q_proj", "down_proj"))
    for targets in (whole, r".*\.(q_proj|down_proj)"):
        config.write_text(json.dumps({**described, "target_modules": targets}))
        begun, _ = training(workshop, one_rank, "named-again", *given, f"lora.init_from={folder}", plain=True)
        for key, chunk in run.parts.moe.engine.shards.named_parameters().items():
            assert torch.equal(begun.parts.moe.engine.shards.named_parameters()[key], chunk)
    for targets in (whole[1:], [*whole, "lm_head"]):
        config.write_text(json.dumps({**described, "target_modules": targets}))
        with pytest.raises(UserError, match=r"has lora\.target_modules .*, but the configuration has \['down_proj', 'q_proj'\]"):
            training(workshop, one_rank, "named-other", *given, f"lora.init_from={folder}", plain=True)


def test_an_ordinary_lora_does_not_replace_a_fixed_a(workshop: Path, one_rank: dist.ProcessGroup) -> None:
    """Nor in a layer whose linears have no experts, whose plain pairs are looked at first."""
    given = [LINEARS[0], "moe.num_experts=[0,1]", "moe.top_k=1", "lora.pairs=fixed_a", "lora.target_modules=[q_proj]"]
    run, ranks = training(workshop, one_rank, "fixed", *given, plain=True)
    folder = run.parts.output.replace(workshop / "runs" / "fixed", run.parts.moe, ranks)
    training(workshop, one_rank, "fixed-again", *given, f"lora.init_from={folder}", plain=True)
    with pytest.raises(UserError, match=r"the adapter's A of expert .* is not the one that the configured seed draws"):
        training(workshop, one_rank, "fixed-other", *given, "seed=9", f"lora.init_from={folder}", plain=True)


def test_the_recipe_is_read(workshop: Path) -> None:
    data = [f"data.train=[{workshop}/up.train.jsonl]", f"data.eval=[{workshop}/up.eval.jsonl]"]
    config = load_config(RECIPE, [f"model.name_or_path={workshop}/model", *data, f"output_dir={workshop}/runs/recipe"], claim_output=False)
    assert config.moe.kind.over_linears
    assert [config.moe.experts_per_layer(30).count(experts) for experts in (2, 4, 6, 8)] == [8, 7, 8, 7]
