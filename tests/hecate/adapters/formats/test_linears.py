"""Adapters of experts over linears: the names of MoLA's authors, ranks that come together in one file, and the way back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from hecate.adapters.description import Adapter
from hecate.adapters.folder import save_adapter
from hecate.adapters.formats.linears import FORMAT
from hecate.engine.step_plans import EngineConfig
from hecate.errors import UserError
from hecate.model.base import BaseModel
from hecate.model.causal_head import LanguageModelHead
from hecate.model.insert import InsertionPlan, insert_experts
from hecate.model.linears import find_linears
from hecate.model.moe_model import MoeModel
from hecate.parallel.cluster.topology import local_topology
from hecate.parallel.planners import POLICIES
from hecate.parallel.values.expert_kinds import LINEARS, LoraShape
from hecate.ranks.groups import ExpertGroups
from hecate.ranks.ranks import Ranks
from testing.byte_tokenizer import build_byte_tokenizer
from tests.hecate.adapters.making import linear_config_of
from tests.hecate.model.tiny import tiny

EXPERTS, TARGETS = (3, 0, 2), ("q_proj", "down_proj")
PREFIX = "base_model.model.model.layers"
DESCRIPTION = linear_config_of(target_modules=TARGETS, experts_per_layer=EXPERTS)


def inserted(group: dist.ProcessGroup) -> tuple[BaseModel, MoeModel]:
    model = tiny("llama", torch.float32)
    plan = InsertionPlan(kind=LINEARS, experts_per_layer=EXPERTS, top_k=2, lora=LoraShape(2, 2.0, 0.0), target_modules=TARGETS, seed=1)
    config = EngineConfig(POLICIES["full"], local_topology(1, cuda=False))
    base = BaseModel(model, LanguageModelHead(model), build_byte_tokenizer(), 32, linears=tuple(find_linears(model)))
    return base, insert_experts(model, base.linears, plan, config, ExpertGroups(group, group))


def write(group: dist.ProcessGroup, folder: Path) -> MoeModel:
    """An adapter whose numbers are all different."""
    base, moe = inserted(group)
    with torch.no_grad():
        trained = [*moe.engine.shards.named_parameters().values(), *moe.replicated_parameters().values()]
        for number, parameter in enumerate(trained):
            parameter.copy_(1000 * number + torch.arange(parameter.numel()).view_as(parameter))
    FORMAT.write(folder, DESCRIPTION, base, moe, Ranks(0, 1, torch.device("cpu"), ExpertGroups(group, group)))
    return moe


def test_a_folder_has_the_authors_names_and_says_what_they_leave_out(one_rank: dist.ProcessGroup, tmp_path: Path) -> None:
    write(one_rank, tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    of_layer = {layer: {name for name in tensors if name.startswith(f"{PREFIX}.{layer}.mlp")} for layer in range(3)}
    down = f"{PREFIX}.0.mlp.down_proj"
    pairs = {f"{down}.lora_{matrix}_{expert}.weight" for matrix in "AB" for expert in range(3)}
    assert of_layer[0] == {*pairs, f"{down}.router.router.weight"}
    assert of_layer[1] == {f"{PREFIX}.1.mlp.down_proj.lora_A.weight", f"{PREFIX}.1.mlp.down_proj.lora_B.weight"}
    assert tensors[f"{down}.lora_A_2.weight"].shape == (2, 24)
    assert tensors[f"{down}.lora_B_2.weight"].shape == (16, 2)
    assert tensors[f"{down}.router.router.weight"].shape == (3, 24)
    value = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert value["number_experts"] == [3, 0, 2]
    assert FORMAT.recognises(tmp_path / "adapter")


def test_what_was_written_is_read_back(one_rank: dist.ProcessGroup, tmp_path: Path) -> None:
    moe = write(one_rank, tmp_path / "adapter")
    read = FORMAT.read(tmp_path / "adapter")
    assert read.description == DESCRIPTION
    base, again = inserted(one_rank)
    FORMAT.load(read, base, again)
    for name, parameter in moe.replicated_parameters().items():
        assert torch.equal(again.replicated_parameters()[name], parameter), name
    for key, chunk in moe.engine.shards.named_parameters().items():
        assert torch.equal(again.engine.shards.named_parameters()[key], chunk), key


def test_an_adapter_that_does_not_fit_is_refused(one_rank: dist.ProcessGroup, tmp_path: Path) -> None:
    write(one_rank, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    whole, (base, moe) = load_file(file), inserted(one_rank)
    name = f"{PREFIX}.2.self_attn.q_proj.lora_B_1.weight"
    refused = {
        "has no tensor": {key: tensor for key, tensor in whole.items() if key != name},
        "belongs to no weight": {**whole, name.replace("_1.", "_9."): whole[name]},
        "the base model needs (16, 2)": {**whole, name: torch.zeros(16, 3)},
    }
    for text, tensors in refused.items():
        with pytest.raises(UserError) as caught:
            FORMAT.load(Adapter(file, tensors, DESCRIPTION), base, moe)
        assert text in str(caught.value)
    with pytest.raises(UserError, match="is not finite"):
        save_adapter(tmp_path / "other", {name: torch.tensor([float("nan")])}, DESCRIPTION)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"hecate": {}}, "hecate.format_version must be 1"),
        ({"r": "8"}, "r is missing or of another type: 8"),
        ({"number_experts": [2, "x"]}, "number_experts must be a list of whole numbers, one a layer"),
    ],
)
def test_a_description_that_is_wrong_is_refused(tmp_path: Path, change: dict[str, object], text: str) -> None:
    save_adapter(tmp_path / "adapter", {"a": torch.zeros(1)}, replace(DESCRIPTION))
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **change}), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        FORMAT.read(tmp_path / "adapter")
    assert text in str(caught.value)
    save_file({"a": torch.zeros(1)}, tmp_path / "adapter" / "adapter_model.safetensors")
