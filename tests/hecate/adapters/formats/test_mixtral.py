from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM

from hecate.adapters.formats.mixtral import MixtralFolder, dense_weights, export_mixtral, mixtral_config
from hecate.engine.step_plans import EngineConfig
from hecate.errors import UserError
from hecate.model.gated_ffn import find_gated_ffns
from hecate.model.insert import InsertionPlan, insert_experts
from hecate.parallel.cluster.topology import local_topology
from hecate.parallel.planners import POLICIES
from hecate.parallel.values.expert_kinds import FULL
from hecate.ranks.groups import ExpertGroups
from hecate.ranks.ranks import Ranks
from testing.byte_tokenizer import build_byte_tokenizer
from testing.ranks import run_ranks
from tests.hecate.model.tiny import tiny, token_ids

EXPERTS = 12
"""more than ten: names are sorted as text"""


def _export(rank: int, world: int, folder: str, model_type: str, changes: dict[str, Any]) -> np.ndarray:
    """Logits of the model, before it is written."""
    group = dist.group.WORLD
    assert group is not None
    model = tiny(model_type, torch.float32, **changes)
    groups = ExpertGroups(group, dist.new_group())
    plan = InsertionPlan(kind=FULL, experts_per_layer=(EXPERTS,) * 3, top_k=2, upcycle_noise=0.5, seed=1)
    config = mixtral_config(model.config, plan.experts_per_layer, 2, 0.01)
    moe = insert_experts(
        model, find_gated_ffns(model), plan, EngineConfig(POLICIES["static_ep"], local_topology(world, cuda=False)), groups
    )
    for parameter in moe.replicated_parameters().values():
        parameter.data.mul_(30)  # so that a token's two weights differ
    with torch.no_grad(), moe.engine.evaluation():
        logits = model(token_ids(), use_cache=False).logits
    ranks = Ranks(rank, world, torch.device("cpu"), groups)
    description = MixtralFolder(config, build_byte_tokenizer(), torch.float32, b"the card")
    export_mixtral(Path(folder) / "model", description, dense_weights(model), moe, ranks)
    return logits.numpy()  # a tensor would travel through shared memory, which ends with the rank


@pytest.mark.parametrize(("model_type", "changes"), [("llama", {"tie_word_embeddings": True}), ("mistral", {"sliding_window": 4})])
def test_transformers_computes_the_same(tmp_path: Path, model_type: str, changes: dict[str, Any]) -> None:
    logits = run_ranks(3, _export, str(tmp_path), model_type, changes)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "README.md").read_text() == "the card"
    assert json.loads((tmp_path / "model" / "config.json").read_text())["rope_theta"] == 10000  # version 4 would take 1000000
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        torch.testing.assert_close(model(token_ids(), use_cache=False).logits, torch.from_numpy(logits[0]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("model_type", "experts", "changes", "reason"),
    [
        ("llama", (3, 0), {}, "moe.num_experts differs between layers"),
        ("gemma2", (3, 3), {}, "the base model is a gemma2"),
        ("llama", (3, 3), {"attention_bias": True}, "the base model has biases"),
    ],
)
def test_what_mixtral_cannot_hold_is_refused(model_type: str, experts: tuple[int, ...], changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        mixtral_config(AutoConfig.for_model(model_type, **changes), experts, 2, 0.0)
