"""What ranks hold of an MoE model: in loading, no more than their shares; in training, what the dry run has planned."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from hecate.config import Config, load_config
from hecate.data.batches import Batch
from hecate.engine.step_plans import EngineConfig
from hecate.model.causal_head import LanguageModelHead
from hecate.model.files.load import ModelSource
from hecate.model.files.load_moe import load_moe_model
from hecate.model.files.read_experts import read_expert
from hecate.model.files.safetensors_headers import stored_tensors
from hecate.model.files.stored_experts import LayerExperts, expert_layers
from hecate.model.insert import InsertionPlan, insert_experts, non_moe_flops_per_token
from hecate.model.moe_model import MoeModel
from hecate.model.sharded_layers import shard_frozen_layers
from hecate.model.sizes.memory import PHASES, memory_parts
from hecate.model.sizes.run_shape import run_shape
from hecate.optim.adamw import AdamW
from hecate.optim.optimizer import ExpertOptimizer, LearningRate, Trainables, owned_parameters
from hecate.parallel.cluster.mesh import make_mesh
from hecate.parallel.cluster.topology import local_topology
from hecate.parallel.planners import POLICIES
from hecate.parallel.values.expert_kinds import MOE_LORA, LoraShape
from hecate.parallel.values.units import Unit
from hecate.ranks.groups import expert_groups
from hecate.train.build import insertion_plan
from hecate.train.steps.passes import forward_loss, pass_tokens
from hecate.train.steps.step import StepBatches, StepRules, train_step
from testing.ranks import run_ranks
from tests.hecate.apps.foresee.making import num_bytes
from tests.plain_moe_lora import save_tiny

CPU = torch.device("cpu")


def build(
    folder: Path, plan: InsertionPlan, policy: str, world: int, shard_size: int | None = None
) -> tuple[MoeModel, LanguageModelHead, Any]:
    model, layers = load_moe_model(ModelSource(folder, None), torch.float32, CPU, MOE_LORA)
    head = LanguageModelHead(model)
    config = EngineConfig(POLICIES[policy], local_topology(world, cuda=False), top_k=2)
    return insert_experts(model, layers, plan, config, expert_groups(make_mesh(world, shard_size))), head, layers


def resident(key: str) -> int:
    """Bytes: VmRSS, RssAnon of it that is not of files, or VmHWM, the highest VmRSS since the last reset."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def _loaded(rank: int, world: int, folder: str, warm_up: str) -> tuple[int, int]:
    """(bytes by which the peak of loading was over what was there before, bytes of this rank's share)."""
    plan = InsertionPlan(kind=MOE_LORA, lora=LoraShape(2, 1.0, 0.0), target_modules=("down_proj",), seed=0)
    build(Path(warm_up), plan, "static_ep", world)  # modules and buffers of libraries
    gc.collect()
    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    moe, _, _ = build(Path(folder), plan, "static_ep", world)
    share = sum(p.numel() * p.element_size() for p in moe.model.parameters())
    share += sum(store.owned.numel() * store.owned.element_size() for store in moe.engine.shards.stores.values())
    share += sum(chunk.numel() * chunk.element_size() for store in moe.engine.shards.frozen.values() for chunk in store._held.values())
    return resident("VmHWM") - before, share


def test_no_rank_loads_more_than_its_share(tmp_path: Path) -> None:
    """100 MB of experts on four ranks: nobody comes near to holding them all."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux's /proc/self/clear_refs to measure a peak")
    sizes = {"hidden_size": 256, "moe_intermediate_size": 1024, "num_experts": 32, "num_hidden_layers": 1}
    save_tiny("qwen3_moe", tmp_path / "model", torch.float32, **sizes)
    save_tiny("qwen3_moe", tmp_path / "tiny", torch.float32)
    for peak, share in run_ranks(4, _loaded, str(tmp_path / "model"), str(tmp_path / "tiny")):
        assert share > 25e6
        assert 0.9 * share < peak <= 1.2 * share, f"peak {peak / 1e6:.1f} MB for a share of {share / 1e6:.1f} MB"


def _loaded_in_parts(rank: int, world: int, folder: str, warm_up: str) -> tuple[int, int, int]:
    """(bytes of its own that loading and sharding has cost this rank, bytes of its share, bytes of all that is outside experts)"""
    plan = InsertionPlan(kind=MOE_LORA, lora=LoraShape(2, 1.0, 0.0), target_modules=("down_proj",), seed=0)
    moe, _, _ = build(Path(warm_up), plan, "static_ep", world)
    shard_frozen_layers(moe, dist.new_group())
    gc.collect()
    before = resident("RssAnon")
    moe, _, _ = build(Path(folder), plan, "static_ep", world)
    shard_frozen_layers(moe, dist.new_group())
    gc.collect()
    own = resident("RssAnon") - before
    experts = [store.owned for store in moe.engine.shards.stores.values()]
    experts += [chunk for store in moe.engine.shards.frozen.values() for chunk in store._held.values()]
    parts = [p.to_local() for p in moe.model.parameters() if isinstance(p, DTensor)]
    return own, num_bytes([*experts, *parts]), sum(p.numel() * p.element_size() for p in moe.model.parameters())


def test_no_rank_has_more_of_its_own_than_its_share_of_sharded_layers(tmp_path: Path) -> None:
    """What is read from files in the type they have stays the files' memory, which ranks share and the kernel takes back at will."""
    sizes = {"hidden_size": 512, "head_dim": 256, "num_attention_heads": 8, "num_key_value_heads": 8, "moe_intermediate_size": 64}
    save_tiny("qwen3_moe", tmp_path / "model", torch.float32, **sizes, num_experts=16, num_hidden_layers=4)
    save_tiny("qwen3_moe", tmp_path / "tiny", torch.float32)
    for own, share, outside in run_ranks(4, _loaded_in_parts, str(tmp_path / "model"), str(tmp_path / "tiny")):
        assert outside > 2 * share, "the model is too small outside its experts to say anything"
        assert 0.9 * share < own <= 1.2 * share, f"{own / 1e6:.1f} MB for a share of {share / 1e6:.1f} MB"


CONFIG = """
model: {{name_or_path: {folder}/model, dtype: float32}}
data: {{train: {folder}/train.jsonl, seq_len: 96, packing: false}}
output_dir: {folder}/out
max_steps: 1
lora: {{r: 4, alpha: 8.0, dropout: 0.0, target_modules: [q_proj, v_proj, gate_proj, up_proj, down_proj]}}
moe: {{family: moe_lora, train_router: true}}
"""


def write_run(folder: Path, kind: str, **sizes: Any) -> None:
    """A model, and the configuration of a run."""
    save_tiny(kind, folder / "model", torch.float32, **sizes)
    (folder / "train.jsonl").write_text('{"text": "hello"}\n')
    (folder / "config.yaml").write_text(CONFIG.format(folder=folder))


def config_of(folder: Path, *overrides: str) -> Config:
    return load_config(folder / "config.yaml", overrides, claim_output=False)


def _measured(rank: int, world: int, folder: str, policy: str, shard_size: int) -> dict[str, Any]:
    """Bytes of this rank after a step and in the midst of the next."""
    config = config_of(Path(folder))
    moe, head, layers = build(Path(folder) / "model", insertion_plan(config, 2), policy, world, shard_size)
    model = moe.model
    optimizer = ExpertOptimizer(
        Trainables(owned_parameters(moe.engine), moe.replicated_parameters()),
        AdamW(weight_decay=0.0),
        LearningRate(1e-2),
        torch.device("cpu"),
    )
    tokens = torch.arange(96)[None] + 96 * rank
    batch = Batch(tokens % 64, tokens % 64, tokens % 96, torch.ones_like(tokens), tokens, torch.zeros_like(tokens))
    train_step(
        moe,
        head,
        optimizer,
        StepBatches(number=0, micro_batches=[batch], num_labels=96 * world),
        StepRules(aux_coef=0.01, max_grad_norm=None),
    )
    moe.engine.begin_step(1).begin_micro_step(pass_tokens(head, batch))
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = forward_loss(head, batch)
    trained = set(map(id, moe.replicated_parameters().values()))
    frozen = [chunk for store in moe.engine.shards.frozen.values() for chunk in store._held.values()]
    replicas = [store.replicas() for store in moe.engine.shards.stores.values()]
    known = [*model.parameters(), *frozen, *replicas, *(store.owned for store in moe.engine.shards.stores.values())]
    pointers = {tensor.untyped_storage().data_ptr() for tensor in known}
    state = optimizer.state_tensors()
    measured = {
        "base weights": num_bytes(p for p in model.parameters() if id(p) not in trained),
        "frozen experts": num_bytes(frozen),
        "owned experts, moments": num_bytes(t for name, t in state.items() if name.startswith("owned/") and t.dim()),
        "routers, adapters, moments": num_bytes(t for name, t in state.items() if name.startswith("replicated/") and t.dim()),
        "replicas": num_bytes(replicas),
        "activations": num_bytes(tensor for pointer, tensor in kept.items() if pointer not in pointers),
        "cost": moe.engine.shards.families[Unit(0)].cost(2, non_moe_flops_per_token(model, layers) * 96),
    }
    del loss
    return measured


@pytest.mark.parametrize("kind", [pytest.param("qwen2_moe", marks=pytest.mark.slow), "mixtral"])
def test_every_rank_holds_what_was_planned(tmp_path: Path, kind: str) -> None:
    """Of 5 experts in two layers rank 0 owns 6 and rank 1 four; under policy full each holds the other's as well. In sharding groups of
    one each owns all."""
    sizes = {"hidden_size": 64, "intermediate_size": 136, "head_dim": 32, "vocab_size": 64, "max_position_embeddings": 256}
    write_run(tmp_path, kind, **sizes)
    for policy, shard_size, others in (("full", 2, [4.0, 6.0]), ("static_ep", 2, [0.0, 0.0]), ("full", 1, [0.0, 0.0])):
        run = run_shape(config_of(tmp_path, f"fssdp.shard_size={shard_size}"), None, 2)
        assert [(group.experts, group.number) for group in run.groups] == [(5, 2)]
        parts = {part.name: part.bytes_PD for part in memory_parts(run, [torch.tensor(others).numpy()], torch.full((2,), 96.0).numpy())}
        for rank, measured in enumerate(run_ranks(2, _measured, str(tmp_path), policy, shard_size)):
            for name in ("base weights", "frozen experts", "owned experts, moments", "routers, adapters, moments", "replicas"):
                assert measured[name] == parts[name][PHASES.index("forward"), rank], f"{name}, rank {rank}, {policy}, {shard_size}"
            assert measured["cost"] == run.groups[0].cost, "the engine plans with another cost"
            if policy == "full" and kind == "mixtral":  # with tokens at home; shared experts are not in the estimate
                estimate = parts["activations (estimate)"][PHASES.index("forward"), rank] - 96 * 64 * 8
                assert estimate == pytest.approx(measured["activations"], rel=0.1)


def _sharded_bytes(rank: int, world: int, folder: str) -> int:
    moe, _, _ = build(Path(folder) / "model", insertion_plan(config_of(Path(folder)), 2), "static_ep", world)
    shard_frozen_layers(moe, dist.new_group())
    trained = set(map(id, moe.replicated_parameters().values()))
    here = [p.to_local() if isinstance(p, DTensor) else p for p in moe.model.parameters() if id(p) not in trained]
    return sum(p.numel() * p.element_size() for p in here)


def test_sharded_layers_weigh_what_was_planned(tmp_path: Path) -> None:
    write_run(tmp_path, "qwen2_moe")
    run = run_shape(config_of(tmp_path, "model.shard_non_experts=true"), None, 2)
    whole = run_shape(config_of(tmp_path), None, 2)
    nothing = torch.zeros(2).numpy()
    sharded, replicated = (memory_parts(one, [nothing], nothing)[0].bytes_PD[PHASES.index("optimizer")] for one in (run, whole))
    measured = run_ranks(2, _sharded_bytes, str(tmp_path))
    assert sum(measured) == sum(sharded)  # an odd row is on the first of them
    assert max(measured) - min(measured) < 0.05 * max(measured)
    assert max(measured) < 0.7 * replicated[0]


def chunks_of(layers: dict[int, LayerExperts], dtype: torch.dtype) -> list[Tensor]:
    return [read_expert(layer, expert, dtype, CPU) for layer in layers.values() for expert in range(layer.num_experts)]


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_every_layout_gives_the_same_experts(tmp_path: Path, kind: str) -> None:
    """One tensor a projection, as real checkpoints have them; fused, as transformers holds them; in many files with an index."""
    from transformers import AutoModelForCausalLM

    save_tiny(kind, tmp_path / "single", torch.float32)
    AutoModelForCausalLM.from_pretrained(tmp_path / "single").save_pretrained(tmp_path / "many", max_shard_size="10KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    (tmp_path / "many" / "consolidated.safetensors").write_bytes(b"another layout, which the index does not name")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "single", dtype=torch.float32)
    (tmp_path / "fused").mkdir()
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, tmp_path / "fused" / "model.safetensors")
    shutil.copy(tmp_path / "single" / "config.json", tmp_path / "fused")
    expected = []
    for layer in model.model.layers:
        experts = layer.mlp.experts
        expected += [torch.cat([experts.gate_up_proj[e].flatten(), experts.down_proj[e].flatten()]) for e in range(5)]
    for name in ("single", "many", "fused"):
        layers = expert_layers(stored_tensors(tmp_path / name), tmp_path / name)
        for dtype in (torch.float32, torch.bfloat16):
            for got, wanted in zip(chunks_of(layers, dtype), expected, strict=True):
                assert torch.equal(got, wanted.detach().to(dtype)), name
    _, adapted = load_moe_model(ModelSource(tmp_path / "fused", None), torch.float32, CPU, MOE_LORA)
    assert [layer.block.num_experts for layer in adapted] == [5, 5]


def test_a_file_without_its_end_is_refused(tmp_path: Path) -> None:
    save_tiny("olmoe", tmp_path / "model", torch.float32)
    path = tmp_path / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors: ends before its tensor"):
        load_moe_model(ModelSource(tmp_path / "model", None), torch.float32, CPU, MOE_LORA)


def edit(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors")


def _quantised(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(torch.int8) if ".experts.3." in name else tensor for name, tensor in tensors.items()}


def _with_bias(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**tensors, "model.layers.0.mlp.experts.0.up_proj.bias": torch.zeros(20)}


def _without_one(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if "layers.1.mlp.experts.2.down_proj" not in name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_quantised, r"layer 0: experts\.3\.\w+\.weight is stored as I8: quantised"),
        (_with_bias, r"experts\.0\.up_proj\.bias: experts with biases are not supported"),
        (_without_one, "layer 1: expert 2 has no down projection; is the download complete"),
    ],
)
def test_experts_that_are_not_plain_are_refused(tmp_path: Path, change: Any, message: str) -> None:
    save_tiny("qwen3_moe", tmp_path / "model", torch.float32)
    edit(tmp_path / "model", change)
    with pytest.raises(ValueError, match=message) as caught:
        load_moe_model(ModelSource(tmp_path / "model", None), torch.float32, CPU, MOE_LORA)
    assert len(str(caught.value).splitlines()) <= 8


def test_a_quantised_model_is_refused(tmp_path: Path) -> None:
    save_tiny("qwen3_moe", tmp_path / "model", torch.float32)
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(ValueError, match="quantised models are not supported"):
        load_moe_model(ModelSource(tmp_path / "model", None), torch.float32, CPU, MOE_LORA)
