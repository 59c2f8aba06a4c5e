"""What training leaves behind: experts of several ranks come together in one adapter, and an adapter goes back to the experts' owners."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from hecate.adapters.formats.mixlora import FORMAT
from hecate.adapters.formats.whole_model import is_model_folder, load_model_folder
from hecate.adapters.mixlora.description import MixLoraDescription
from hecate.adapters.trained_output import TrainedOutput, output_of
from hecate.config import Config, DataConfig, DataSource, LoraConfig, ModelConfig, MoeConfig
from hecate.engine.step_plans import EngineConfig
from hecate.errors import UserError
from hecate.model.base import BaseModel
from hecate.model.causal_head import LanguageModelHead
from hecate.model.gated_ffn import find_gated_ffns
from hecate.model.insert import InsertionPlan, insert_experts
from hecate.model.moe_model import MoeModel
from hecate.parallel.cluster.topology import local_topology
from hecate.parallel.planners import POLICIES
from hecate.parallel.values.expert_kinds import MIXLORA, LoraShape
from hecate.ranks.groups import ExpertGroups
from hecate.ranks.ranks import Ranks
from testing.byte_tokenizer import build_byte_tokenizer
from testing.ranks import run_ranks
from tests.hecate.model.tiny import tiny, token_ids

EXPERTS = (3, 0, 2)
TARGETS = ("q_proj", "up_proj", "down_proj")
UP, DOWN = (2 * 16, 24 * 2), (2 * 24, 16 * 2)
"""elements of A and B of a projection, with r 2, hidden 16 and FFN 24"""


def config(**changes: Any) -> Config:
    made = Config(
        model=ModelConfig(name_or_path="models/tiny"),
        data=DataConfig(train=(DataSource(path="a.jsonl", name="a"),)),
        output_dir="runs/a",
        max_steps=1,
        lora=LoraConfig(r=2, alpha=4.0, target_modules=TARGETS),
        moe=MoeConfig(num_experts=EXPERTS, top_k=2),
    )
    return replace(made, **changes)


def base_of(model_type: str = "llama") -> BaseModel:
    model = tiny(model_type, torch.float32)
    return BaseModel(model, LanguageModelHead(model), build_byte_tokenizer(), 32, ffns=tuple(find_gated_ffns(model)))


def inserted(base: BaseModel, groups: ExpertGroups, world: int) -> MoeModel:
    plan = InsertionPlan(kind=MIXLORA, experts_per_layer=EXPERTS, top_k=2, lora=LoraShape(2, 2.0, 0.0), target_modules=TARGETS, seed=1)
    return insert_experts(base.model, base.ffns, plan, EngineConfig(POLICIES["full"], local_topology(world, cuda=False)), groups)


def numbered(layer: int, expert: int) -> Tensor:
    """A chunk whose elements say where they stand: up before down, A before B."""
    return torch.arange(sum((*UP, *DOWN)), dtype=torch.float32) + 1000 * (10 * layer + expert)


def _write(rank: int, world: int, folder: str) -> None:
    group = dist.group.WORLD
    assert group is not None
    groups = ExpertGroups(group, group)
    base = base_of()
    description = FORMAT.describe(config(), base)
    moe = inserted(base, groups, world)
    with torch.no_grad():
        for (unit, expert), chunk in moe.engine.shards.named_parameters().items():
            chunk.copy_(numbered(unit.layer, expert))
        for name, parameter in moe.replicated_parameters().items():
            parameter.fill_(int(name.split(".")[1]) + {"r": 0.125, "A": 0.25, "B": 0.5}[name.split(".")[-1][0]])
    assert len(moe.engine.shards.named_parameters()) < sum(EXPERTS), "this rank owns all experts"
    FORMAT.write(Path(folder) / "adapter", description, base, moe, Ranks(rank, world, torch.device("cpu"), groups))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Written by two ranks that share the experts out."""
    folder = tmp_path_factory.mktemp("export")
    run_ranks(2, _write, str(folder))
    return folder / "adapter"


def test_each_expert_is_in_the_file_under_its_own_name(adapter: Path) -> None:
    found = load_file(adapter / "adapter_model.safetensors")
    for layer, experts in enumerate(EXPERTS):
        for matrix, value in (("A", 0.25), ("B", 0.5)):
            assert (found.pop(f"mixlora.layers.{layer}.self_attn.q_proj.lora_{matrix}.weight") == layer + value).all()
        if experts:
            router = found.pop(f"mixlora.layers.{layer}.mlp.moe_gate.weight")
            assert router.shape == (experts, 16)
            assert (router == layer + 0.125).all()
        for expert in range(experts):
            parts = numbered(layer, expert).split([*UP, *DOWN])
            shapes = {("up_proj", "A"): (2, 16), ("up_proj", "B"): (24, 2), ("down_proj", "A"): (2, 24), ("down_proj", "B"): (16, 2)}
            for ((projection, matrix), shape), part in zip(shapes.items(), parts, strict=True):
                name = f"mixlora.layers.{layer}.mlp.{projection}.experts.{expert}.lora_{matrix}.weight"
                assert torch.equal(found.pop(name), part.view(shape)), name
    assert not found


def test_an_adapter_goes_back_where_it_came_from(adapter: Path, one_rank: dist.ProcessGroup) -> None:
    read = FORMAT.read(adapter)
    description = read.description
    assert isinstance(description, MixLoraDescription)
    assert (description.num_experts, description.top_k, description.alpha, description.act_fn) == (EXPERTS, 2, 4, "silu")
    base = base_of()
    moe = inserted(base, ExpertGroups(one_rank, one_rank), 1)
    FORMAT.load(read, base, moe)
    owned = moe.engine.shards.named_parameters()
    assert len(owned) == sum(EXPERTS)
    for (unit, expert), chunk in owned.items():
        assert torch.equal(chunk.detach(), numbered(unit.layer, expert)), (unit, expert)
    for name, parameter in moe.replicated_parameters().items():
        value = int(name.split(".")[1]) + {"r": 0.125, "A": 0.25, "B": 0.5}[name.split(".")[-1][0]]
        assert (parameter == value).all(), name


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "adapter"),
        ({"moe": MoeConfig(family="full", num_experts=2, top_k=1)}, "model"),
    ],
)
def test_a_run_decides_beforehand_what_it_will_leave(changes: dict[str, Any], name: str) -> None:
    assert output_of(config(**changes), base_of()).name == name


@pytest.mark.parametrize(
    ("changes", "model_type", "reason"),
    [
        ({"lora": LoraConfig(r=2, alpha=4.0, target_modules=("up_proj", "lm_head"))}, "llama", "target_modules: 'lm_head' is not one of"),
        ({"moe": MoeConfig(family="full", num_experts=2, top_k=1)}, "gemma2", "the base model is a gemma2"),
    ],
)
def test_what_the_format_cannot_hold_is_refused_beforehand(changes: dict[str, Any], model_type: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        output_of(config(**changes), base_of(model_type))


@pytest.mark.parametrize("rank", [0, 1])
def test_the_output_of_an_earlier_end_is_replaced_by_the_first_rank(tmp_path: Path, rank: int) -> None:
    """A run that ended is extended: its adapter is written again. What stands beside it stays, but no part that a lost rank has begun."""
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "old.bin").touch()
    (tmp_path / "adapter.tmp-0123abcd").mkdir()
    (tmp_path / "metrics.jsonl").touch()
    old = tmp_path / "adapter" / "old.bin"

    def write(folder: Path, _moe: object, _ranks: object) -> None:
        assert old.exists(), "it stays until the new one is written"
        if rank == 0:  # the others send what they have
            folder.mkdir()
            (folder / "new.bin").touch()

    output = TrainedOutput("adapter", write)
    ranks: Any = SimpleNamespace(is_first=rank == 0)
    assert output.replace(tmp_path, None, ranks) == tmp_path / "adapter"  # type: ignore[arg-type]
    assert [path.name for path in (tmp_path / "adapter").iterdir()] == ["new.bin" if rank == 0 else "old.bin"]
    assert (tmp_path / "metrics.jsonl").exists()
    assert (tmp_path / "adapter.tmp-0123abcd").exists() == (rank == 1)


@pytest.mark.parametrize(
    ("files", "whole"),
    [((), False), (("config.json",), True), (("adapter_config.json",), False), (("config.json", "adapter_config.json"), False)],
)
def test_a_whole_model_is_told_from_an_adapter(tmp_path: Path, files: tuple[str, ...], whole: bool) -> None:
    for file in files:
        (tmp_path / file).touch()
    assert is_model_folder(tmp_path) is whole


def test_a_whole_model_is_loaded_in_the_type_it_was_saved_in_or_in_another(tmp_path: Path, one_rank: dist.ProcessGroup) -> None:
    saved = tiny("llama", torch.bfloat16)
    saved.save_pretrained(tmp_path)
    build_byte_tokenizer().save_pretrained(tmp_path)
    ranks = Ranks(0, 1, torch.device("cpu"), ExpertGroups(one_rank, one_rank))
    for dtype, held in (("auto", torch.bfloat16), ("float32", torch.float32)):
        base, moe = load_model_folder(tmp_path, ranks, dtype)
        for name, parameter in base.model.named_parameters():
            assert parameter.dtype == held
            assert torch.equal(parameter, saved.get_parameter(name).to(held)), name
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=held)
        with torch.no_grad(), moe.engine.evaluation():
            got = base.model(token_ids(), use_cache=False).logits
            torch.testing.assert_close(got, theirs(token_ids(), use_cache=False).logits)


def test_a_folder_without_weights_is_refused(tmp_path: Path, one_rank: dist.ProcessGroup) -> None:
    tiny("llama", torch.float32).config.save_pretrained(tmp_path)
    ranks = Ranks(0, 1, torch.device("cpu"), ExpertGroups(one_rank, one_rank))
    with pytest.raises(UserError, match=r"has no \*\.safetensors; is it the model folder of a finished run\?"):
        load_model_folder(tmp_path, ranks, "auto")
