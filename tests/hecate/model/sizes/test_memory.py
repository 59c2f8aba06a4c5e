"""A dry run's costs equal the engine's, its activations are what autograd keeps, and its counts equal calculations by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hecate.apps.foresee.dry_run import forecast
from hecate.config.sections import OPTIMIZERS
from hecate.data.batches import Batch
from hecate.engine.step_plans import EngineConfig
from hecate.errors import UserError
from hecate.experts.family import Site
from hecate.experts.mixlora import MixLoraExperts
from hecate.experts.pairs.source_table import PAIR_SOURCES
from hecate.kernels.common.dropout import DropoutMasks, FfnDropout, RowDropout
from hecate.kernels.common.low_rank import LowRankPairs
from hecate.kernels.mixlora.passes import RULES, chunk_parts
from hecate.kernels.mixlora.torch_path import _TILE_BYTES
from hecate.model.causal_head import LanguageModelHead
from hecate.model.gated_ffn import find_gated_ffns
from hecate.model.insert import insert_experts, non_moe_flops_per_token
from hecate.model.sizes.memory import PHASES, _chunk_bytes, memory_parts
from hecate.model.sizes.pair_check import check_pair_sizes
from hecate.model.sizes.replicated_tensors import replicated_tensors
from hecate.model.sizes.run_shape import RunShape, run_shape
from hecate.optim.from_config import gradient_rule
from hecate.optim.optimizer import ExpertOptimizer, LearningRate, Trainables
from hecate.parallel.cluster.gpu_memory import CONTEXT_BYTES, nccl_bytes, rounding_bytes
from hecate.parallel.cluster.mesh import make_mesh
from hecate.parallel.cluster.topology import local_topology
from hecate.parallel.planners import POLICIES
from hecate.parallel.values.expert_kinds import LoraShape
from hecate.parallel.values.layout import TensorSpec
from hecate.parallel.values.optimizer_state import expert_spec, owner_bytes
from hecate.parallel.values.units import Unit
from hecate.ranks.groups import ExpertGroups, expert_groups
from hecate.train.build import insertion_plan
from hecate.train.steps.passes import forward_loss, pass_tokens
from hecate.train.steps.step import StepBatches, StepRules, train_step
from testing.ranks import run_ranks
from tests.hecate.apps.foresee.making import config_for, num_bytes, packed_batch, saved_for_backward, slow_node, write_model
from tests.kernels.plain_orders import assignment_blocks, assignment_order

EVERY_EXPERT = ("moe.num_experts=[5,0,5]", "moe.top_k=5")
"""so that all have moments after a step"""
MANY = {"hidden_size": 48, "intermediate_size": 136, "head_dim": 24, "vocab_size": 64}


def shape_of(folder: Path, *overrides: str, ranks: int = 2, dtype: str = "float32") -> RunShape:
    return run_shape(config_for(folder, *overrides, dtype=dtype), None, ranks)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize(
    ("targets", "source"),
    [
        ("[q_proj,gate_proj,up_proj,down_proj]", "plain"),
        ("[down_proj]", "plain"),
        ("[gate_proj,down_proj]", "fixed_a"),
        ("[down_proj]", "nola"),
        ("[gate_proj,down_proj]", "shards"),
    ],
)
def test_the_engine_reckons_with_the_same_cost(tmp_path: Path, dtype: str, targets: str, source: str) -> None:
    model = write_model(tmp_path).to(getattr(torch, dtype))
    run = shape_of(tmp_path, f"lora.target_modules={targets}", f"lora.pairs={source}", "micro_batch_size=3", dtype=dtype)
    (ffn, *_) = found = find_gated_ffns(model)
    names = tuple(name for name in ("gate_proj", "up_proj", "down_proj") if name in targets)
    master = torch.float64 if dtype == "float64" else torch.float32
    site = Site(Unit(0), 4, ffn.shape, 0, master, getattr(torch, dtype), torch.device("cpu"))
    pairs = PAIR_SOURCES[source].make(site, LoraShape(2, 1.0, 0.0, source), names)
    family = MixLoraExperts(site, ffn.base(model), pairs)
    (group,) = run.groups
    assert group.cost == family.cost(2, non_moe_flops_per_token(model, found) * 3 * 16)
    assert (group.experts, group.number) == (4, 3)


def test_layers_with_other_experts_are_apart(tmp_path: Path) -> None:
    write_model(tmp_path)
    run = shape_of(tmp_path, "moe.num_experts=[4,0,2]")
    assert [(group.experts, group.number) for group in run.groups] == [(4, 1), (2, 1)]


def test_replicated_parameters_by_hand(tmp_path: Path) -> None:
    """Adapters of rank 2 in 3 layers, queries and outputs 16 to 16, keys and values 16 to 8; routers of 4 and 2 experts."""
    write_model(tmp_path)
    run = shape_of(tmp_path, "moe.num_experts=[4,0,2]")
    assert run.replicated_parameters == 3 * 2 * (2 * (16 + 16) + 2 * (16 + 8)) + (4 + 2) * 16


def test_counts_by_hand(tmp_path: Path) -> None:
    """Two ranks, 4 experts in each of 3 layers, of which each rank owns two, and one replica of another's in one layer.

    An expert: rank 2 pairs, 3 projections between 16 and 24: 240 parameters, 960 bytes. Routers: 3 layers of 4 x 16.
    """
    write_model(tmp_path)
    run = replace(shape_of(tmp_path, "lora.target_modules=[gate_proj,up_proj,down_proj]"), topology=slow_node())
    parts = {part.name: part.bytes_PD for part in memory_parts(run, [np.array([0.0, 1.0])], np.array([16.0, 16.0]))}
    forward, backward, optimizer = range(len(PHASES))
    assert (parts["base weights"] == run.base.parameters * 4).all()
    assert (parts["owned experts, moments"] == 3 * 3 * 2 * 960).all()
    assert (parts["routers, adapters, moments"] == 3 * 3 * 4 * 16 * 4).all()
    assert parts["replicas"][forward].tolist() == [6 * 960, 7 * 960]
    assert (parts["replicas"][optimizer] == 0).all()
    assert parts["gradients"][backward].tolist() == [2 * 960 + 768, pytest.approx(7 / 3 * 960 + 768)]  # of one layer, and the routers'
    assert parts["gradients"][optimizer].tolist() == [6 * 960 + 768] * 2


@pytest.mark.parametrize("backups", [1, 2])
def test_backups_take_as_much_as_what_they_are_of(tmp_path: Path, backups: int) -> None:
    """Two ranks have one backup of each expert at most: rank 0 those of rank 1's experts, and the other way round."""
    write_model(tmp_path)
    own = ("lora.target_modules=[gate_proj,up_proj,down_proj]", "moe.num_experts=5", f"fssdp.redundancy={backups}")
    run = replace(shape_of(tmp_path, *own), topology=slow_node())
    parts = {part.name: part.bytes_PD for part in memory_parts(run, [np.zeros(2)], np.array([16.0, 16.0]))}
    owned_D = parts["owned experts, moments"][0]
    assert owned_D[0] != owned_D[1]
    assert parts["backups of other ranks' experts, moments"].tolist() == [owned_D[::-1].tolist()] * len(PHASES)
    both = owned_D.sum() / 3  # gradients of what a rank owns, once for the owner and once sent, and of what it has backups of
    assert (parts["gradients"][2] == run.replicated_parameters * 4 + owned_D / 3 + both).all()
    groups = shape_of(tmp_path, *own[:2], "fssdp.redundancy=1", "fssdp.shard_size=1")
    assert not any("backups" in part.name for part in memory_parts(groups, [np.zeros(2)], np.array([16.0, 16.0])))


def test_of_pairs_with_a_fixed_a_only_b_is_owned(tmp_path: Path) -> None:
    """B of an expert: 2 x (24 + 24 + 16). A is drawn by every rank: of an expert's projections 2 x (16 + 16 + 24), of queries 2 x 16."""
    write_model(tmp_path)
    run = shape_of(tmp_path, "lora.target_modules=[q_proj,gate_proj,up_proj,down_proj]", "lora.pairs=fixed_a")
    parts = {part.name: part.bytes_PD for part in memory_parts(run, [np.array([0.0, 1.0])], np.array([16.0, 16.0]))}
    assert (parts["owned experts, moments"] == 3 * 3 * 2 * 128 * 4).all()
    assert (parts["routers, adapters, moments"] == 3 * 3 * (4 * 16 + 2 * 16) * 4).all()
    assert (parts["seeded parts of pairs"] == 3 * (112 + 32) * 4).all()
    assert parts["replicas"][0].tolist() == [6 * 512, 7 * 512]
    (group,) = run.groups
    assert group.cost.assignment_flops == 480
    assert group.cost.assignment_backward == 3 - 224 / 480, "A's gradient is not computed"


def test_of_drawn_matrices_all_layers_have_the_same(tmp_path: Path) -> None:
    """An expert owns 2 x 4 coefficients a projection. Adapters of the queries are plain.

    Gate, up and down have 5 A (A0 and 4 U) and 4 B (V) each, of rank 2, between 16 and 24, once for the model.
    """
    write_model(tmp_path)
    sizes = ("lora.nola.bases=4", "moe.num_experts=[4,0,4]", "lora.target_modules=[q_proj,gate_proj,up_proj,down_proj]")
    run = shape_of(tmp_path, "lora.pairs=nola", *sizes)
    parts = {part.name: part.bytes_PD for part in memory_parts(run, [np.array([0.0, 1.0])], np.array([16.0, 16.0]))}
    assert (parts["owned experts, moments"] == 3 * 2 * 2 * 24 * 4).all()
    assert (parts["seeded parts of pairs"] == 2 * (5 * (16 + 16 + 24) + 4 * (24 + 24 + 16)) * 4).all()
    assert (parts["routers, adapters, moments"] == 3 * (2 * 4 * 16 + 3 * 2 * (16 + 16)) * 4).all()
    (group,) = run.groups
    assert (group.cost.assignment_flops, group.cost.assignment_backward) == (480, 3)
    assert parts["replicas"][0].tolist() == [4 * 96, 5 * 96]
    made = {flags: made_bytes(tmp_path, *sizes, *flags) for flags in ((), ("fssdp.rematerialize=true",), ("gradient_checkpointing=true",))}
    assert list(made.values()) == [[4 * 960, 5 * 960], [4 * 960, 6 * 960], [2 * 960, 2.5 * 960]]


@pytest.mark.parametrize("micro_steps", [1, 2])
def test_a_pool_is_owned_in_blocks_and_held_as_a_whole(tmp_path: Path, micro_steps: int) -> None:
    """Two layers of 4 experts make 8 blocks of as many numbers as a plain pair of rank 2 has: 240. Pairs are of rank 3: 360 numbers.

    The gradient of a pool is there once while autograd adds it up, once more of earlier micro-steps, and once for the layer under way.
    """
    write_model(tmp_path)
    sizes = ("lora.r=3", "moe.num_experts=[4,0,4]", "lora.target_modules=[gate_proj,up_proj,down_proj]")
    run = shape_of(tmp_path, "lora.pairs=shards", *sizes, f"gradient_accumulation_steps={micro_steps}")
    assert [(pool.blocks, pool.numel) for pool in run.pools] == [(8, 240)]
    parts = {part.name: part.bytes_PD for part in memory_parts(run, [np.array([0.0, 1.0])], np.array([16.0, 16.0]))}
    assert not parts["owned experts, moments"].any()
    assert not parts["replicas"].any()
    assert (parts["owned blocks of pools, moments"] == 3 * 4 * 960).all()
    assert parts["pools"].tolist() == [[8 * 960] * 2, [8 * 960] * 2, [0, 0]]
    assert parts["pairs made of replicas"][0].tolist() == [4 * 1440, 5 * 1440]
    routers = 2 * 4 * 16 * 4
    assert parts["gradients"][1].tolist() == [(1 + micro_steps) * 8 * 960 + routers] * 2
    assert parts["gradients"][2].tolist() == [4 * 960 + routers] * 2
    found = forecast(run, "zipf")
    assert all(np.isfinite(one.step_seconds) and np.isfinite(one.memory_PD).all() for one in found.policies)
    static = next(one for one in found.policies if one.policy == "static_ep")
    assert static.bytes.near > 2 * 8 * 960, "the pool's blocks, and tokens"


def test_a_pool_that_the_model_cannot_fill_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path)
    with pytest.raises(UserError, match="but its pool has 12\n"):
        shape_of(tmp_path, "lora.pairs=shards", "lora.r=14")
    with pytest.raises(UserError, match="7 does not divide the 16 inputs"):
        shape_of(tmp_path, "lora.pairs=shards", "lora.shards.per_vector=7")


def made_bytes(folder: Path, *overrides: str) -> list[float]:
    """Of the pairs that each of two ranks makes of its two experts in each of two layers, and rank 1 of another's, too."""
    run = shape_of(folder, "lora.pairs=nola", *overrides)
    parts = {part.name: part.bytes_PD for part in memory_parts(run, [np.array([0.0, 1.0])], np.array([16.0, 16.0]))}
    found: list[float] = parts["pairs made of replicas"][0].tolist()
    return found


def test_gradients_of_all_layers_add_up_over_micro_steps(tmp_path: Path) -> None:
    write_model(tmp_path)
    others, rows = [np.zeros(2)], np.array([16.0, 16.0])
    one, two = (
        {part.name: part.bytes_PD for part in memory_parts(shape_of(tmp_path, f"gradient_accumulation_steps={n}"), others, rows)}
        for n in (1, 2)
    )
    assert (two["gradients"][1] - one["gradients"][1] == (6 - 2) * 960).all()
    assert (two["activations (estimate)"] == one["activations (estimate)"]).all()


@pytest.mark.parametrize(("prefetch", "layers"), [(0, 1), (1, 1), (2, 2), (9, 3)])
def test_rematerialized_replicas_are_those_of_the_layers_under_way(tmp_path: Path, prefetch: int, layers: int) -> None:
    """Two own experts a layer, and one of another's in the fullest; gradients of one layer, sums of all that are owned."""
    write_model(tmp_path)
    run = shape_of(tmp_path, "fssdp.rematerialize=true", f"fssdp.prefetch={prefetch}", "gradient_accumulation_steps=2")
    parts = {part.name: part.bytes_PD for part in memory_parts(run, [np.array([0.0, 1.0])], np.array([16.0, 16.0]))}
    assert parts["replicas"][:2].tolist() == [[layers * 2 * 960, layers * 3 * 960]] * 2
    replicated = run.replicated_parameters * 4
    assert parts["gradients"][1].tolist() == [(2 + 6) * 960 + replicated, (3 + 6) * 960 + replicated]


def _held(
    rank: int, world: int, folder: str, dtype: str, cases: list[tuple[str, int]], overrides: tuple[str, ...] = ()
) -> list[dict[str, int]]:
    """Bytes of this rank after a step and at the beginning of the next, by policy and size of sharding groups."""
    from transformers import AutoModelForCausalLM

    config, found = config_for(Path(folder), *EVERY_EXPERT, *overrides, dtype=dtype), []
    tokens = torch.arange(16)[None]
    batch = Batch(tokens % 32, tokens % 32, tokens, torch.ones_like(tokens), tokens + 16 * rank, torch.zeros_like(tokens))
    for policy, shard_size in cases:
        model: Any = AutoModelForCausalLM.from_pretrained(Path(folder) / "model", dtype=getattr(torch, dtype)).eval()
        head = LanguageModelHead(model)
        groups = expert_groups(make_mesh(world, shard_size))
        engine = EngineConfig(POLICIES[policy], local_topology(world, cuda=False), top_k=5)
        moe = insert_experts(model, find_gated_ffns(model), insertion_plan(config, 3), engine, groups)
        replicated = moe.replicated_parameters()
        optimizer = ExpertOptimizer(Trainables.of(moe), gradient_rule(config), LearningRate(0.1), torch.device("cpu"))
        train_step(
            moe, head, optimizer, StepBatches(number=0, micro_batches=[batch], num_labels=32), StepRules(aux_coef=0.01, max_grad_norm=None)
        )
        moe.engine.begin_step(1).begin_micro_step(pass_tokens(head, batch))
        with torch.no_grad():
            forward_loss(head, batch)
        state = optimizer.state_tensors()
        bases = [family.base for family in moe.engine.shards.families.values() if isinstance(family, MixLoraExperts)]
        ffns = [weight for base in bases for weight in (base.gate_FD, base.up_FD, base.down_DF)]
        trained = {id(parameter) for parameter in replicated.values()}
        of = {kind: [t for name, t in state.items() if name.startswith(kind) and t.dim()] for kind in ("owned/", "replicated/")}
        found.append(
            {
                "base weights": num_bytes([*(p for p in model.parameters() if id(p) not in trained), *ffns]),
                "owned experts, moments": num_bytes(of["owned/"]),
                "routers, adapters, moments": num_bytes(of["replicated/"]),
                "replicas": moe.engine.shards.replica_bytes,
            }
        )
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_rank_holds_what_was_planned(tmp_path: Path, dtype: str) -> None:
    """Of 5 experts in two layers rank 0 owns 6 and rank 1 four, or in sharding groups of one each all ten."""
    write_model(tmp_path)
    cases = [("full", 2), ("static_ep", 2), ("full", 1)]
    found = run_ranks(2, _held, str(tmp_path), dtype, cases)
    for index, (policy, shard_size) in enumerate(cases):
        run = shape_of(tmp_path, *EVERY_EXPERT, f"fssdp.shard_size={shard_size}", dtype=dtype)
        others = np.array([4.0, 6.0]) if (policy, shard_size) == ("full", 2) else np.zeros(2)
        parts = {part.name: part.bytes_PD for part in memory_parts(run, [others], np.full(2, 16.0))}
        for rank in range(2):
            for name, measured in found[rank][index].items():
                assert measured == parts[name][PHASES.index("forward"), rank], f"{name}, rank {rank}, {policy}, groups of {shard_size}"


WIDE = ("lora.r=300", "lora.target_modules=[q_proj,v_proj,gate_proj,up_proj,down_proj]")
"""so that some matrices have moments of 8 bits, and others have not"""


@pytest.mark.parametrize("overrides", [(), WIDE, (*WIDE, "moe.router.bias=learned"), ("moe.unit=linear", *WIDE), ("lora.pairs=nola",)])
@pytest.mark.parametrize("optim", ["muon", "adamw_8bit", "adafactor", "lion"])
def test_every_rank_keeps_of_every_optimizer_what_was_planned(tmp_path: Path, optim: str, overrides: tuple[str, ...]) -> None:
    write_model(tmp_path)
    own = (*overrides, f"optim={optim}")
    if "moe.unit=linear" in overrides:
        run = shape_of(tmp_path, *EVERY_EXPERT, *own)
        kept = [owner_bytes(OPTIMIZERS[optim].STATE, expert_spec(chunk), 4) for chunk in ([*linear_chunks(run)])]
        assert sum(group.cost.state_bytes * group.number for group in run.groups) == 2 * sum(kept)
        return
    (found,) = run_ranks(1, _held, str(tmp_path), "float32", [("static_ep", 1)], own)
    run = shape_of(tmp_path, *EVERY_EXPERT, *own, ranks=1)
    parts = {part.name: part.bytes_PD for part in memory_parts(run, [np.zeros(1)], np.full(1, 16.0))}
    for name in ("owned experts, moments", "routers, adapters, moments"):
        assert found[0][name] == parts[name][0, 0], name
    tensors = replicated_tensors(run)
    assert sum(one.numel * number for one, number in tensors.items()) == run.replicated_parameters


def linear_chunks(run: RunShape) -> list[tuple[TensorSpec, ...]]:
    """Of an expert of each linear of a layer."""
    targets = run.config.lora.target_modules
    linears = [(outputs, inputs) for name, outputs, inputs in run.base.layers[0].all_linears if name in targets]
    return [(TensorSpec("linear.A", (300, inputs)), TensorSpec("linear.B", (outputs, 300))) for outputs, inputs in linears]


def _saved(rank: int, world_size: int, folder: str, dtype: str, checkpointing: bool) -> tuple[int, int]:
    """Bytes that autograd keeps of a forward pass beside weights and replicas, and their estimate."""
    from transformers import AutoModelForCausalLM

    config = config_for(Path(folder), "data.seq_len=96", dtype=dtype)
    model: Any = AutoModelForCausalLM.from_pretrained(Path(folder) / "model", dtype=getattr(torch, dtype)).eval()
    head = LanguageModelHead(model)
    group = torch.distributed.group.WORLD
    assert group is not None
    engine = EngineConfig(POLICIES["full"], local_topology(1, cuda=False), top_k=2)
    moe = insert_experts(model, find_gated_ffns(model), insertion_plan(config, 3), engine, ExpertGroups(group, group))
    if checkpointing:
        from hecate.model.layers.checkpointing import checkpoint_activations

        checkpoint_activations(moe)
    batch = packed_batch(96, 64)
    moe.engine.begin_step(0).begin_micro_step(pass_tokens(head, batch))
    known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    known |= {store.owned.untyped_storage().data_ptr() for store in moe.engine.shards.stores.values()}
    with saved_for_backward() as kept:
        loss = forward_loss(head, batch)
    known |= {store.replicas().untyped_storage().data_ptr() for store in moe.engine.shards.stores.values()}
    measured = sum(tensor.untyped_storage().nbytes() for pointer, tensor in kept.items() if pointer not in known)
    del loss
    run = run_shape(config, None, 1)
    parts = {part.name: part.bytes_PD for part in memory_parts(run, [np.zeros(1)], np.array([96.0]))}
    head_bytes = 96 * 64 * (4 if dtype == "float32" else 8) + 96 * 48 * run.dtype_bytes  # logits and labelled hidden states, kept by nobody
    return measured, int(parts["activations (estimate)"][0, 0] - head_bytes)


@pytest.mark.parametrize(("dtype", "model"), [("float32", "llama"), ("bfloat16", "llama"), ("float32", "qwen3")])
def test_activations_are_what_autograd_keeps(tmp_path: Path, dtype: str, model: str) -> None:
    """Qwen3 normalizes queries and keys, and keeps a fifth more for it."""
    write_model(tmp_path, model, **MANY, num_attention_heads=4, num_key_value_heads=4)
    ((measured, estimate),) = run_ranks(1, _saved, str(tmp_path), dtype, False)
    assert estimate == pytest.approx(measured, rel=0.1)


def test_checkpointed_layers_keep_their_inputs(tmp_path: Path) -> None:
    """Of three layers' activations the inputs are left, and either one layer's while it runs or what the head needs."""
    hidden = 16 * 16 * 4
    for vocabulary in (32, 2048):
        write_model(tmp_path, vocab_size=vocabulary)
        plain, checkpointed = (forward_activations(tmp_path, f"gradient_checkpointing={flag}") for flag in ("false", "true"))
        head = 16 * vocabulary * 4 + 2 * hidden
        layer = (plain - head) / 3
        assert (layer > head) == (vocabulary == 32)
        assert checkpointed == pytest.approx(3 * hidden + max(layer, hidden + head))


@pytest.mark.parametrize(
    ("model", "overrides", "rows"),
    [("llama", (), _TILE_BYTES // (24 * 2)), ("mixtral", ("moe.family=moe_lora", "moe.num_experts=null", "moe.top_k=null"), 32)],
)
def test_dropout_on_a_cpu_needs_the_masks_of_a_tile(tmp_path: Path, model: str, overrides: Sequence[str], rows: int) -> None:
    """The models have hidden states of 16 numbers, and FFNs of 24."""
    write_model(tmp_path, model)
    with_masks, without = (
        sum(part.bytes_PD for part in memory_parts(run, [np.zeros(1)], np.full(1, 16.0)))
        for run in (shape_of(tmp_path, f"lora.dropout={p}", *overrides, ranks=1, dtype="bfloat16") for p in (0.1, 0.0))
    )
    words = RowDropout(torch.zeros(1, dtype=torch.int32), 6554)
    buffers = vars(DropoutMasks(FfnDropout(words, words), rows, 16, 24, torch.empty(0, dtype=torch.bfloat16)))
    expected = sum(one.nbytes for one in buffers.values() if isinstance(one, torch.Tensor))
    assert np.asarray(with_masks - without)[PHASES.index("backward"), 0] == pytest.approx(expected, rel=0.04)


def forward_activations(folder: Path, *overrides: str) -> float:
    parts = {part.name: part.bytes_PD for part in memory_parts(shape_of(folder, *overrides), [np.zeros(2)], np.full(2, 16.0))}
    return float(parts["activations (estimate)"][0, 0])


def test_at_the_end_of_the_backward_pass_sums_of_all_layers_are_there(tmp_path: Path) -> None:
    """Three layers of 4 experts of 3 x 16 x 24 numbers; gradients are in float32, replicas in bfloat16.

    One rank has in the first layer the gradients of all layers and that layer's replicas. Each of two ranks, which hold half the experts,
    has the gradients of the first layer, twice as much of the second one's, which are being reduced, and the sums of the third one's.
    """
    write_model(tmp_path)
    layer = 4 * 3 * 16 * 24
    found = {}
    for ranks in (1, 2):
        flags = ("moe.family=full", "gradient_checkpointing=true", "data.seq_len=8")
        run = shape_of(tmp_path, *flags, ranks=ranks, dtype="bfloat16")
        parts = memory_parts(run, [np.zeros(ranks)], np.full(ranks, 8.0))
        found[ranks] = {part.name: part.bytes_PD[1, 0] for part in parts}
        assert found[ranks]["replicas"] == pytest.approx(layer * 2 / ranks), ranks
    routers = 3 * 4 * 16 * 4
    assert [of["gradients"] - routers for of in found.values()] == pytest.approx([3 * layer * 4, (1 + 2 + 1) / 2 * layer * 4])


def test_ranks_and_topologies(tmp_path: Path) -> None:
    write_model(tmp_path)
    config = config_for(tmp_path)
    assert run_shape(config, "two-h100-nodes", None).topology.world_size == 16
    assert run_shape(config, "two-h100-nodes", 16).topology_name == "two-h100-nodes"
    assert run_shape(config_for(tmp_path, "nproc=3"), None, None).topology.world_size == 3
    with pytest.raises(UserError, match="--ranks 3, but topology two-h100-nodes has 16 devices"):
        run_shape(config, "two-h100-nodes", 3)
    with pytest.raises(UserError, match="topology nowhere: no such preset"):
        run_shape(config, "nowhere", None)


def test_fast_devices_compute_in_bfloat16(tmp_path: Path) -> None:
    write_model(tmp_path)
    assert run_shape(config_for(tmp_path, dtype="auto"), "h100-node", None).dtype_bytes == 2
    assert run_shape(config_for(tmp_path, dtype="float32"), "h100-node", None).dtype_bytes == 4


def test_auto_plans_for_the_cards_that_the_driver_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path)
    for slot in ("0000:17:00.0", "0000:65:00.0"):
        (tmp_path / "gpus" / slot).mkdir(parents=True)
        text = "Model: \t\t NVIDIA A100-SXM4-40GB\nIRQ:   \t\t 12\nGPU UUID: \t GPU-1\n"
        (tmp_path / "gpus" / slot / "information").write_text(text, encoding="utf-8")
    monkeypatch.setattr("hecate.model.sizes.run_shape._DRIVER", tmp_path / "gpus")
    run = run_shape(config_for(tmp_path, dtype="auto"), None, None)
    assert run.topology.memory == (40e9, 40e9)
    assert run.dtype_bytes == 2
    assert run.notes == ("topology: 2 x NVIDIA A100-SXM4-40GB on 1 node",)
    more = run_shape(config_for(tmp_path, dtype="auto"), None, 4)
    assert more.topology.node_of_rank == (0, 0, 1, 1), "machines like this one"
    assert run_shape(config_for(tmp_path), None, 3).topology.world_size == 3


def test_a_gpu_holds_more_than_tensors(tmp_path: Path) -> None:
    """Three layers of 4 projections, 3 matrices of the FFN and 2 norms; 30 tensors of the base in all.

    Adapters of 4 projections and a router a layer: 27 parameters; 6 owned experts a rank; all with two moments and a gradient.
    One replica.
    """
    write_model(tmp_path)
    on_cpu = shape_of(tmp_path)
    fast = replace(on_cpu, topology=replace(local_topology(2, cuda=False), flops=(1e14, 5e10)))
    replicas, rows = [np.array([1.0, 0.0])], np.array([16.0, 16.0])
    parts = {part.name: part.bytes_PD for part in memory_parts(fast, replicas, rows)}
    names = {part.name for part in memory_parts(on_cpu, replicas, rows)}
    assert set(parts) - names == {"CUDA context (estimate)", "NCCL's buffers (estimate)", "allocator's rounding (at most)"}
    assert (parts["NCCL's buffers (estimate)"] == [nccl_bytes(make_mesh(2), (0, 0), sharded_layers=False)[0], 0]).all()
    assert (parts["CUDA context (estimate)"] == [CONTEXT_BYTES, 0]).all()
    assert 120e6 <= CONTEXT_BYTES <= 550e6, "what is reported from machines"
    assert rounding_bytes(np.array([0, 2])).tolist() == [22 * 2**20, 22 * 2**20 + 1024]
    assert (parts["allocator's rounding (at most)"] == [22 * 2**20 + 512 * (30 + 4 * 27 + 4 * 6 + 2), 0]).all()


def test_a_gpu_sums_gradients_of_pairs_from_parts_of_chunks(tmp_path: Path) -> None:
    """Each rank owns 2 of 4 experts, and rank 0 has one more in each of 3 layers; the kernels' own buffer is what is counted."""
    (layer, *_) = find_gated_ffns(write_model(tmp_path))
    on_cpu = shape_of(tmp_path)
    on_gpu = replace(on_cpu, topology=replace(local_topology(2, cuda=False), flops=(1e14, 1e14)))
    replicas, tokens = [np.array([3.0, 0.0])], np.array([4000.0, 16.0])
    rows = {rule.config.blocks["CHUNK_ROWS"] for rule in RULES["mixlora_rows"] if rule.min_sm}
    wide = {"gate_proj": (layer.shape.hidden, layer.shape.ffn), "up_proj": (layer.shape.hidden, layer.shape.ffn)}
    wide["down_proj"] = (layer.shape.ffn, layer.shape.hidden)
    expected = []
    for slots, num_tokens in ((3, 4000), (2, 16)):
        order = assignment_order(torch.arange(2 * num_tokens).view(-1, 2) % slots, slots)
        pairs = {name: LowRankPairs(torch.empty(slots, 2, i), torch.empty(slots, o, 2), 1.0) for name, (i, o) in wide.items()}
        parts, _ = chunk_parts(assignment_blocks(order, 16, *rows), pairs)
        expected.append(num_bytes([parts]))
    found, without = (
        {part.name: part.bytes_PD for part in memory_parts(on_gpu, others, tokens)}["activations (estimate)"][PHASES.index("backward")]
        for others in (replicas, [np.zeros(2)])
    )
    assert _chunk_bytes(on_gpu, replicas, 2 * tokens).tolist() == expected
    assert found[0] > without[0], "they are a part of the backward pass"
    assert not _chunk_bytes(on_cpu, replicas, 2 * tokens).any()


def test_drawn_matrices_that_do_not_fit_are_refused_before_any_process_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks draw U and V of rank 16 and A0, of three projections."""
    write_model(tmp_path)
    config = config_for(tmp_path, "lora.pairs=nola", "lora.nola.bases=1000", "lora.target_modules=[gate_proj]")
    needed = 2 * 4 * shape_of(tmp_path, "lora.pairs=nola", "lora.nola.bases=1000", "lora.target_modules=[gate_proj]").seeded_parameters
    monkeypatch.setattr("hecate.model.files.memory_check.free_bytes", lambda device: needed)
    check_pair_sizes(config, 2)
    monkeypatch.setattr("hecate.model.files.memory_check.free_bytes", lambda device: needed - 2e9)
    check_pair_sizes(config)
    with pytest.raises(
        UserError, match=r"lora\.pairs: nola: .* GB for 2 ranks, 2\.0 GB more than this machine has free\n.*lora\.nola\.bases"
    ):
        check_pair_sizes(config, 2)
