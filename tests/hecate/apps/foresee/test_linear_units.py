"""`hecate plan` of experts over linears: units, costs, parameters and memory, against the engine and by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from hecate.apps.foresee.dry_run import forecast
from hecate.engine.step_plans import EngineConfig
from hecate.errors import UserError
from hecate.model.causal_head import LanguageModelHead
from hecate.model.insert import insert_experts, non_moe_flops_per_token
from hecate.model.linears import find_linears
from hecate.model.moe_model import MoeModel
from hecate.model.sizes.memory import memory_parts
from hecate.model.sizes.run_shape import RunShape, run_shape
from hecate.parallel.cluster.topology import local_topology
from hecate.parallel.planners import POLICIES
from hecate.ranks.groups import ExpertGroups
from hecate.train.build import insertion_plan
from hecate.train.extensions.users import with_users
from hecate.train.steps.passes import forward_loss, pass_tokens
from tests.hecate.apps.foresee.making import config_for, packed_batch, saved_for_backward, write_model

LINEARS = ("moe.unit=linear", "moe.num_experts=null", "moe.allocation=[2,0,3]")


def given(*overrides: str) -> list[str]:
    """With values of `LINEARS` for keys that are not overridden."""
    return list({override.partition("=")[0]: override for override in (*LINEARS, *overrides)}.values())


def planned(folder: Path, *overrides: str) -> RunShape:
    return run_shape(config_for(folder, *given(*overrides)), None, 2)


def built(folder: Path, group: dist.ProcessGroup, *overrides: str) -> tuple[MoeModel, LanguageModelHead]:
    from transformers import AutoModelForCausalLM

    config = config_for(folder, *given(*overrides))
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    head, found = LanguageModelHead(model), find_linears(model)
    flops = non_moe_flops_per_token(model, found) * config.micro_batch_size * config.data.seq_len
    engine = EngineConfig(POLICIES["full"], local_topology(1, cuda=False), top_k=2, non_moe_flops=flops)
    plan = insertion_plan(config, 3, user_width=8 if config.moe.router.by_user else None)
    return insert_experts(model, found, plan, engine, ExpertGroups(group, group)), head


@pytest.mark.parametrize(
    ("model_type", "overrides", "units"),
    # Phi-3 has gate and up in one weight, which is no gated FFN that experts could replace.
    [("llama", (), 7), ("phi3", ("lora.target_modules=[o_proj,down_proj]",), 2)],
)
def test_its_units_and_costs_are_the_engines(
    one_rank: dist.ProcessGroup, tmp_path: Path, model_type: str, overrides: tuple[str, ...], units: int
) -> None:
    write_model(tmp_path, model_type)
    moe, _ = built(tmp_path, one_rank, *overrides)
    shards = moe.engine.shards
    wanted: dict[Any, int] = {}
    for family in shards.families.values():
        key = family.num_experts, family.cost(2, shards.config.non_moe_flops)
        wanted[key] = wanted.get(key, 0) + 1
    run = planned(tmp_path, *overrides)
    counted: dict[Any, int] = {}
    for group in run.groups:  # linears of one cost may have routers of different widths
        counted[group.experts, group.cost] = counted.get((group.experts, group.cost), 0) + group.number
    assert counted == wanted
    assert sum(group.number for group in run.groups) == 2 * units
    assert run.replicated_parameters == sum(parameter.numel() for parameter in moe.replicated_parameters().values())
    assert {layer.ffn for layer in run.base.layers} == {24}


def test_weights_of_an_ffn_that_is_not_gated_are_counted_once(tmp_path: Path) -> None:
    """Both models have the same weights, of which Phi-3 joins some."""
    seconds = []
    for model_type in ("llama", "phi3"):
        (tmp_path / model_type).mkdir()
        write_model(tmp_path / model_type, model_type)
        run = planned(tmp_path / model_type, "lora.target_modules=[o_proj,down_proj]")
        parts = forecast(run, "balanced").policies[0].parts
        seconds.append(parts["attention"] + parts["experts"])
    assert seconds[1] == pytest.approx(seconds[0], rel=1e-12)


def test_the_units_of_a_layer_share_one_message_and_what_hides_it(tmp_path: Path) -> None:
    """A token's row is on average as wide as inputs and outputs; nothing of it is computed where the tokens go but the pair."""
    write_model(tmp_path)
    gate = next(group.cost for group in planned(tmp_path).groups if group.cost.row_bytes == (16 + 24) / 2 * 4)
    assert (gate.message_share, gate.hidden_from, gate.row_flops) == (1 / 7, 2, 0.0)
    assert gate.assignment_flops == 2 * 2 * (16 + 24)
    linears = 2 * 16 * 16 + 2 * 8 * 16 + 3 * 16 * 24
    assert gate.non_moe_flops == 2 * linears * 16 / 7


def test_a_target_that_is_no_linear_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path)
    with pytest.raises(UserError, match=r"lora\.target_modules: lm_head matches no linear"):
        planned(tmp_path, "lora.target_modules=[q_proj,lm_head]")


def test_rematerialized_replicas_are_those_of_all_units_of_a_layer(tmp_path: Path) -> None:
    """Of the layer with 3 experts a linear; a rank owns 2 of them at most, and has none of the other's."""
    write_model(tmp_path)
    run = planned(tmp_path, "fssdp.rematerialize=true")
    parts = {part.name: part.bytes_PD for part in memory_parts(run, [np.zeros(2)] * len(run.groups), np.full(2, 16.0))}
    pairs = 2 * (2 * (16 + 16) + 2 * (16 + 8) + 2 * (16 + 24) + (24 + 16))
    assert parts["replicas"][0].max() == 2 * pairs * 4


def test_every_policy_is_predicted(tmp_path: Path) -> None:
    write_model(tmp_path)
    found = forecast(planned(tmp_path), "dirichlet_drift")
    assert [one.policy for one in found.policies][:1] == ["auto"]
    assert all(one.step_seconds > 0 for one in found.policies)
    by_name = {one.policy: one for one in found.policies}
    assert by_name["static_ep"].parts["tokens"] > by_name["auto"].parts["tokens"], "seven exchanges a layer cost more than pairs"


SYSTEMS = {
    "MoLA": (),
    "plain LoRA": ("moe.allocation=null", "moe.num_experts=1", "moe.top_k=1"),
    "SMoRA": (
        *("moe.allocation=null", "moe.num_experts=32", "moe.top_k=4", "lora.r=1", "lora.dropout=0", "moe.router_aux_loss_coef=0"),
        "moe.router={score: sigmoid, bias: balancing, bias_in_weights: true}",
    ),
    "MoS": ("moe.allocation=null", "moe.num_experts=1", "moe.top_k=1", "lora.pairs=shards", "lora.r=3"),
    "NOLA": ("lora.pairs=nola", "lora.nola.bases=4"),
    "FFA-LoRA": ("lora.pairs=fixed_a",),
    "ALLoRA": ("lora.gradient_rule=row_norm", "lora.eta=2.0", "lora.alpha=null", "lora.dropout=0"),
    "LLaVA-MoLE": ("moe.top_k=1", "moe.router={bias: learned, weights: one, balance: sample}"),
    "RecLoRA": (
        "moe.allocation=null",
        "moe.num_experts=4",
        "moe.router_aux_loss_coef=0",
        "moe.router.input=user",
        "moe.top_k=null",
        "data.features=USERS",
    ),
}


@pytest.mark.parametrize("system", SYSTEMS)
def test_activations_are_what_autograd_keeps_within_a_twentieth(one_rank: dist.ProcessGroup, tmp_path: Path, system: str) -> None:
    sizes = {
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 24,
        "vocab_size": 64,
    }
    write_model(tmp_path, **sizes, max_position_embeddings=128)
    np.savez(tmp_path / "users.npz", ids=np.array(["a"]), features=np.ones((1, 8), dtype=np.float32))
    overrides = ["data.seq_len=96", *(override.replace("USERS", f"{tmp_path}/users.npz") for override in SYSTEMS[system])]
    moe, head = built(tmp_path, one_rank, *overrides)
    users = torch.ones(1, 8) if system == "RecLoRA" else None
    batch = packed_batch(96, 64, of_user=users is not None)
    tokens = pass_tokens(head, batch, 1.0)
    moe.engine.begin_step(0).begin_micro_step(tokens if users is None else with_users(tokens, head, batch, users))
    known = {parameter.untyped_storage().data_ptr() for parameter in moe.model.parameters()}
    known |= {store.owned.untyped_storage().data_ptr() for store in moe.engine.shards.trained.values()}
    with saved_for_backward() as kept:
        loss = forward_loss(head, batch)
    known |= {store.replicas().untyped_storage().data_ptr() for store in moe.engine.shards.trained.values()}
    measured = sum(tensor.untyped_storage().nbytes() for pointer, tensor in kept.items() if pointer not in known)
    del loss
    run = run_shape(config_for(tmp_path, *given(*overrides)), None, 1)
    parts = {part.name: part.bytes_PD for part in memory_parts(run, [np.zeros(1)] * len(run.groups), np.array([96.0]))}
    estimate = parts["activations (estimate)"][0, 0] - 96 * 64 * 8
    made = parts["pairs made of replicas"][0, 0] if "pairs made of replicas" in parts else 0.0
    assert estimate + made == pytest.approx(measured, rel=0.05)
