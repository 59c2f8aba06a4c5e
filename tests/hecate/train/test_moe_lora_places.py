"""Adapters of runs with LoRA at a part of an MoE model's experts, or at another rank there: PEFT and hecate compute the same with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from hecate.cli import app
from hecate.config import load_config
from hecate.errors import UserError
from hecate.launch import local_launcher, node_launcher
from hecate.launch.ray_job import driver
from hecate.model.sizes.run_shape import run_shape
from hecate.ranks.ranks import join_ranks
from hecate.report.run_report import trainable_rows
from hecate.train.training import Training
from testing.tiny_run import write_samples
from tests.hecate.adapters.exporting import IDS, LIMIT, export, hecate_logits, logits_of, save_moe, transformers_logits

LOGITS = "logits.pt"
PLACES: dict[str, tuple[str, ...]] = {
    "gate alone": ("lora.target_modules=[q_proj,gate_proj,down_proj]",),
    "up alone": ("lora.target_modules=[up_proj]",),
    "a rank divided": ("lora.target_modules=[q_proj,gate_proj,up_proj,down_proj]", "lora.moe_rank_scaling=true"),
    "a rank divided, scaled by its root": (
        *("lora.target_modules=[q_proj,o_proj,gate_proj,up_proj]", "lora.moe_rank_scaling=true", "lora.use_rslora=true"),
    ),
    "a rank divided, of experts alone": ("lora.target_modules=[up_proj,down_proj]", "lora.moe_rank_scaling=true"),
    "chosen experts": ("lora.target_modules=[q_proj,gate_proj,up_proj]", "lora.experts=[0,3]"),
    "other experts in each layer": ("lora.target_modules=[gate_proj,down_proj]", "lora.experts=[[4],[0,1]]"),
}
"""The models' tokens visit 2 experts, and r is 4."""


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("places")
    save_moe("qwen3_moe", folder / "model")
    write_samples(folder / "up.train.jsonl", [f"w{n}" for n in range(20)], str.upper)
    config: dict[str, Any] = {
        "model": {"name_or_path": f"{folder}/model", "dtype": "float64"},
        "data": {"train": f"{folder}/up.train.jsonl", "seq_len": 64},
        "output_dir": f"{folder}/unset",
        "max_steps": 1,
        "lora": {"r": 4, "alpha": 6.0},
        "moe": {"family": "moe_lora"},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return folder


def adapter_of_a_run(workshop: Path, out: Path, *overrides: str, changed: bool = True) -> Path:
    """The adapter of a run before its first step, beside the logits that the run computes.

    Args:
        changed: with random numbers in the place of what it began with.
    """
    config = load_config(workshop / "config.yaml", [*overrides, f"output_dir={out}"], claim_output=False)
    random = torch.Generator().manual_seed(1)
    with join_ranks() as ranks:
        begun = Training(config, ranks)
        of_experts = begun.parts.moe.engine.shards.named_parameters().values()
        trained = [one for one in of_experts if one.any()]  # the pair of an expert that was not chosen is all zero
        for parameter in (*trained, *begun.parts.moe.replicated_parameters().values()) if changed else ():
            parameter.data.normal_(0, 0.3, generator=random)
        with begun.parts.moe.engine.evaluation(), torch.no_grad():
            head = begun.parts.base.head
            torch.save(head.logits(head.hidden(IDS, None, torch.arange(IDS.shape[1])[None])), out / LOGITS)
        begun.parts.output.replace(out, begun.parts.moe, ranks)
    return out / "adapter"


@pytest.fixture(scope="module", params=PLACES)
def made(request: pytest.FixtureRequest, workshop: Path) -> tuple[Path, tuple[str, ...]]:
    overrides = PLACES[request.param]
    return adapter_of_a_run(workshop, workshop / request.param.replace(" ", "_").replace(",", ""), *overrides), overrides


@pytest.mark.filterwarnings("error:.*_pattern keys did not match")
def test_all_readers_compute_the_same(workshop: Path, made: tuple[Path, tuple[str, ...]], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    adapter, _ = made
    base = AutoModelForCausalLM.from_pretrained(workshop / "model", dtype=torch.float64, experts_implementation="eager")
    plain = logits_of(base)
    wanted = logits_of(peft.PeftModel.from_pretrained(base, adapter).eval())
    assert float((wanted - plain).abs().max()) > 1e-2, "the adapter does nothing"
    torch.testing.assert_close(torch.load(adapter.parent / LOGITS), wanted, **LIMIT)
    torch.testing.assert_close(hecate_logits(adapter), wanted, **LIMIT)
    torch.testing.assert_close(transformers_logits(export(adapter, "merged", tmp_path / "merged")), wanted, **LIMIT)
    for form in ("per-expert", "peft"):
        torch.testing.assert_close(hecate_logits(export(adapter, form, tmp_path / form)), wanted, **LIMIT)


def test_a_run_begins_with_such_an_adapter_bit_for_bit(workshop: Path, made: tuple[Path, tuple[str, ...]], tmp_path: Path) -> None:
    adapter, overrides = made
    again = adapter_of_a_run(workshop, tmp_path, *overrides, f"lora.init_from={adapter}", changed=False)
    theirs, ours = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, again))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)


@pytest.mark.parametrize("form", ["peft", "per-expert"])
def test_a_run_begins_with_what_export_has_made_of_chosen_experts(workshop: Path, tmp_path: Path, form: str) -> None:
    own = (*PLACES["other experts in each layer"], "lora.alpha=4")  # the scale 1, as per-expert folds it into B
    adapter = adapter_of_a_run(workshop, tmp_path / "first", *own)
    exported = export(adapter, form, tmp_path / form)
    again = adapter_of_a_run(workshop, tmp_path / "again", *own, f"lora.init_from={exported}", changed=False)
    torch.testing.assert_close(torch.load(again.parent / LOGITS), torch.load(adapter.parent / LOGITS), **LIMIT)


def test_of_one_half_the_other_has_no_numbers_and_nothing_trains_for_it(workshop: Path, tmp_path: Path) -> None:
    adapter = adapter_of_a_run(workshop, tmp_path, "lora.target_modules=[gate_proj]")
    (b,) = (one for name, one in load_file(adapter / "adapter_model.safetensors").items() if "layers.0" in name and "lora_B" in name)
    gate, up = b.chunk(2)
    assert gate.all()
    assert not up.any()
    config, both = (
        load_config(workshop / "config.yaml", [f"lora.target_modules=[{names}]", f"output_dir={tmp_path}/x"], claim_output=False)
        for names in ("gate_proj", "gate_proj,up_proj")
    )
    of_half, of_both = (run_shape(one, None, 2).groups[0].cost.chunk_numel for one in (config, both))
    assert (of_half, of_both) == (4 * (16 + 20), 4 * (16 + 40))


def test_only_chosen_experts_have_numbers(workshop: Path, tmp_path: Path) -> None:
    adapter = adapter_of_a_run(workshop, tmp_path, *PLACES["chosen experts"])
    (b,) = (one for name, one in load_file(adapter / "adapter_model.safetensors").items() if "layers.1.mlp" in name and "lora_B" in name)
    assert [bool(of_expert.any()) for of_expert in b.view(len(b), 4, 5).unbind(2)] == [True, False, False, True, False]


def test_each_layer_may_have_experts_of_its_own(workshop: Path, tmp_path: Path) -> None:
    tensors = load_file(adapter_of_a_run(workshop, tmp_path, *PLACES["other experts in each layer"]) / "adapter_model.safetensors")
    for layer, chosen in enumerate([[4], [0, 1]]):
        at = f"base_model.model.model.layers.{layer}.mlp.experts"
        for a, b in ((tensors[f"{at}{base}.lora_A.weight"], tensors[f"{at}{base}.lora_B.weight"]) for base in ("", ".base_layer")):
            assert [expert for expert in range(5) if a.view(5, 4, -1)[expert].any()] == chosen
            assert [expert for expert in range(5) if b.view(len(b), 4, 5)[:, :, expert].any()] == chosen


def test_the_configuration_says_which_rank_linears_and_experts_have(workshop: Path, tmp_path: Path) -> None:
    adapter = adapter_of_a_run(workshop, tmp_path, *PLACES["a rank divided"])
    said, tensors = json.loads((adapter / "adapter_config.json").read_text()), load_file(adapter / "adapter_model.safetensors")
    assert (said["r"], said["rank_pattern"], said["lora_alpha"]) == (2, {"q_proj": 4}, 6)
    at = "base_model.model.model.layers.0"
    assert len(tensors[f"{at}.self_attn.q_proj.lora_A.weight"]) == 4
    assert len(tensors[f"{at}.mlp.experts.lora_A.weight"]) == 5 * 2


@pytest.mark.parametrize("verb", ["train", "launch", "ray"])
@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (("lora.r=5", "lora.moe_rank_scaling=true"), "lora.moe_rank_scaling: lora.r is 5"),
        (("lora.experts=[0,5]",), "lora.experts: 5, but layer 0 of the model has 5 experts"),
        (("lora.hottest_experts=2", "lora.loads={adapter}"), "has no recorded loads"),
        (
            ("lora.experts=[0,1,2,4]", "lora.init_from={adapter}"),
            "has numbers for expert 3 of layer 0, which is not among those that train",
        ),
    ],
)
def test_before_any_rank_starts(
    workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str, overrides: tuple[str, ...], text: str
) -> None:
    adapter = adapter_of_a_run(workshop, tmp_path / "begun", "lora.target_modules=[gate_proj]")

    def started(*_: object, **__: object) -> int:
        raise AssertionError("ranks were started")

    monkeypatch.setattr(local_launcher, "launch_local", started)
    monkeypatch.setattr(node_launcher, "launch", started)
    monkeypatch.setattr(driver, "connected", started)
    given = [f"{workshop}/config.yaml", "nproc=1", f"output_dir={tmp_path}/new", "lora.target_modules=[gate_proj]"]
    given += ["--address", "127.0.0.1:9"] if verb == "ray" else []
    done = CliRunner().invoke(app, [verb, *given, *(one.format(adapter=adapter) for one in overrides)])
    assert isinstance(done.exception, UserError), done.exception
    assert text in str(done.exception)
    if verb == "ray":  # a driver that fails later leaves the process in a folder that is gone
        return
    done = CliRunner().invoke(app, [verb, *given, "lora.experts=[0,1,2,3,4]", f"lora.init_from={adapter}"])
    assert str(done.exception) == "ranks were started", "what is right is refused, too"


def test_only_experts_that_train_are_counted_and_have_optimizer_state(workshop: Path, tmp_path: Path) -> None:
    """Also after weight decay and clipping, which change what has a gradient."""
    given = (*PLACES["other experts in each layer"], "weight_decay=0.1", f"output_dir={tmp_path}/run")
    with join_ranks() as ranks:
        begun = Training(load_config(workshop / "config.yaml", given, claim_output=False), ranks)
        begun.train_one()
        kept, counted = begun.parts.optimizer.state_tensors(), {row.name: row.count for row in trainable_rows(begun.parts.moe)}
    assert (counted["layers.0.experts"], counted["layers.1.experts"]) == (1, 2)
    with_state = {name.split("/")[1] for name in kept if name.startswith("owned/") and name.endswith("/exp_avg")}
    assert with_state == {"0.4", "1.0", "1.1"}
    assert {name for name, one in kept.items() if name.count("/") == 1 and name.startswith("owned/") and one.any()} == {
        f"owned/{name}" for name in with_state
    }


@pytest.mark.parametrize(
    ("overrides", "texts"),
    [
        (
            ("lora.r=5", "lora.moe_rank_scaling=true"),
            ("lora.moe_rank_scaling: lora.r is 5", "by the 2 experts that a token visits", "a multiple of 2, such as 4"),
        ),
        (
            (*PLACES["a rank divided"][:1], "lora.init_from={divided}"),
            ("lora.moe_rank_scaling, rank of experts 2, but the configuration has 4",),
        ),
        (
            ("lora.target_modules=[q_proj,gate_proj,down_proj]", "lora.moe_rank_scaling=true", "lora.init_from={divided}"),
            ("names gate_proj without up_proj, but", "has numbers for up_proj", "name both"),
        ),
        (("lora.experts=[4,5]",), ("lora.experts: 5, but layer 0 of the model has 5 experts", "numbers from 0 to 4")),
        (("lora.experts=[[4],[5]]",), ("lora.experts: 5, but layer 1 of the model has 5 experts",)),
        (("lora.experts=[[4],[]]",), ("lora.experts[1]: is [], but layer 1 of the model has 5 experts", "one of them at least")),
        (("lora.experts=[[4]]",), ("lora.experts: has lists for 1 layers, but the model has 2 decoder layers", "one for each")),
        (
            (*PLACES["a rank divided"], "lora.experts=[0,1]", "lora.init_from={divided}"),
            ("/adapter has numbers for expert 2 of layer 0, which is not among those that train", "lora.experts"),
        ),
        (
            (*PLACES["a rank divided"], "lora.experts=[[0,1,2,3,4],[0,1,2,3]]", "lora.init_from={divided}"),
            ("/adapter has numbers for expert 4 of layer 1, which is not among those that train",),
        ),
    ],
)
def test_what_does_not_fit_is_refused(workshop: Path, tmp_path: Path, overrides: tuple[str, ...], texts: tuple[str, ...]) -> None:
    divided = adapter_of_a_run(workshop, tmp_path / "divided", *PLACES["a rank divided"])
    with pytest.raises(UserError) as caught:
        adapter_of_a_run(workshop, tmp_path / "refused", *(one.format(divided=divided) for one in overrides))
    message = str(caught.value)
    assert all(text in message for text in texts), message
    assert len(message.splitlines()) <= 8
