"""A dry run of full experts: its costs equal the engine's, and its memory is what two ranks really hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hecate.engine.step_plans import EngineConfig
from hecate.model.causal_head import LanguageModelHead
from hecate.model.gated_ffn import find_gated_ffns
from hecate.model.insert import insert_experts, non_moe_flops_per_token
from hecate.model.sizes.memory import PHASES, memory_parts
from hecate.model.sizes.run_shape import run_shape
from hecate.optim.adamw import AdamW
from hecate.optim.optimizer import ExpertOptimizer, LearningRate, Trainables, owned_parameters
from hecate.parallel.cluster.topology import local_topology
from hecate.parallel.planners import POLICIES
from hecate.ranks.groups import ExpertGroups
from hecate.train.build import insertion_plan
from hecate.train.steps.passes import forward_loss, pass_tokens
from hecate.train.steps.step import StepBatches, StepRules, train_step
from testing.ranks import run_ranks
from tests.hecate.apps.foresee.making import config_for, packed_batch, saved_for_backward, write_model

SIZES = {"hidden_size": 48, "intermediate_size": 136, "head_dim": 24, "vocab_size": 64}
FULL = ("moe.family=full", "moe.num_experts=[5,0,5]", "data.seq_len=96")
TRAINED = "model.train_non_experts=true"


def _numel_bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _measure(rank: int, world: int, folder: str, dtype: str, overrides: tuple[str, ...]) -> dict[str, Any]:
    """A rank's bytes of everything in a training step, on a seam of its own for each kind."""
    from transformers import AutoModelForCausalLM

    config = config_for(Path(folder), *FULL, *overrides, dtype=dtype)
    model: Any = AutoModelForCausalLM.from_pretrained(Path(folder) / "model", dtype=getattr(torch, dtype)).eval()
    head = LanguageModelHead(model)
    group = torch.distributed.group.WORLD
    assert group is not None
    flops = non_moe_flops_per_token(model, find_gated_ffns(model)) * 96
    engine_config = EngineConfig(POLICIES["full"], local_topology(world, cuda=False), top_k=2, non_moe_flops=flops)
    moe = insert_experts(model, find_gated_ffns(model), insertion_plan(config, 3), engine_config, ExpertGroups(group, group))
    replicated = moe.replicated_parameters()
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    batch = packed_batch(96, 64, first=96 * rank)
    optimizer = ExpertOptimizer(
        Trainables(owned_parameters(moe.engine), replicated), AdamW(weight_decay=0.0), LearningRate(1e-3), torch.device("cpu")
    )
    train_step(
        moe, head, optimizer, StepBatches(number=0, micro_batches=[batch], num_labels=192), StepRules(aux_coef=0.01, max_grad_norm=None)
    )

    moe.engine.begin_step(1).begin_micro_step(pass_tokens(head, batch))
    with saved_for_backward() as kept:
        loss = forward_loss(head, batch)
    known = [*model.parameters(), *(store.owned for store in moe.engine.shards.stores.values())]
    known += [store.replicas() for store in moe.engine.shards.stores.values()]
    # The head's own gradients are there already; the plan has them among the gradients.
    of_head = [t for t in kept.values() if t.shape == model.lm_head.weight.shape]
    pointers = {tensor.untyped_storage().data_ptr() for tensor in [*known, *of_head]}
    activations = sum(tensor.untyped_storage().nbytes() for pointer, tensor in kept.items() if pointer not in pointers)
    del loss
    state = optimizer.state_tensors()
    (cost,) = {moe.engine.shards.families[layer].cost(2, flops) for layer in moe.layers}
    return {
        "base weights": _numel_bytes(frozen.values()),
        "owned experts, moments": _numel_bytes(t for name, t in state.items() if name.startswith("owned/") and t.dim()),
        "routers, adapters, moments": _numel_bytes(t for name, t in state.items() if name.startswith("replicated/") and t.dim()),
        "replicas": moe.engine.shards.replica_bytes,
        "activations": activations,
        "cost": cost,
    }


@pytest.mark.parametrize(("dtype", "overrides"), [("float32", ()), ("float32", (TRAINED,)), ("bfloat16", ())])
def test_every_rank_holds_what_was_planned(tmp_path: Path, dtype: str, overrides: tuple[str, ...]) -> None:
    """Of 5 experts in two layers rank 0 owns 6 and rank 1 four; under policy full each holds all ten as replicas.

    With a model in bfloat16 masters are in float32 nonetheless, and replicas are not.
    """
    write_model(tmp_path, **SIZES)
    run = run_shape(config_for(tmp_path, *FULL, *overrides, dtype=dtype), None, 2)
    assert [(group.experts, group.number) for group in run.groups] == [(5, 2)]
    parts = {part.name: part.bytes_PD for part in memory_parts(run, [np.array([4.0, 6.0])], np.array([96.0, 96.0]))}
    forward = PHASES.index("forward")
    assert parts["replicas"][forward, 0] == 10 * 3 * 48 * 136 * getattr(torch, dtype).itemsize
    head_bytes = 96 * 64 * (4 if dtype == "float32" else 8) + 96 * 48 * run.dtype_bytes  # logits and labelled hidden states, kept by nobody
    for rank, measured in enumerate(run_ranks(2, _measure, str(tmp_path), dtype, overrides)):
        for name in ("base weights", "owned experts, moments", "routers, adapters, moments", "replicas"):
            assert measured[name] == parts[name][forward, rank], name
        near = 0.1 if dtype == "float32" else 0.2
        assert parts["activations (estimate)"][forward, rank] - head_bytes == pytest.approx(measured["activations"], rel=near)
        assert measured["cost"] == run.groups[0].cost, "the engine plans with another cost"
