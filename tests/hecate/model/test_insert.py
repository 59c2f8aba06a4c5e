from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from hecate.engine.step_plans import EngineConfig
from hecate.errors import UserError
from hecate.experts.families import ROUTERS
from hecate.experts.routers.by_input.token import TopKRouter
from hecate.experts.routers.router import RouterSite
from hecate.model.gated_ffn import find_gated_ffns
from hecate.model.insert import InsertionPlan, RouterError, insert_experts, non_moe_flops_per_token
from hecate.model.layers.lora import LoraLinear
from hecate.model.moe_model import MoeModel, adapter_dtype
from hecate.parallel.cluster.topology import local_topology
from hecate.parallel.planners import POLICIES
from hecate.parallel.values.expert_kinds import MIXLORA, LoraShape
from hecate.parallel.values.units import Unit
from hecate.ranks.groups import ExpertGroups
from tests.hecate.model.tiny import tiny, token_ids

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FFN = ("gate_proj", "up_proj", "down_proj")


def insert(
    model: Any, group: dist.ProcessGroup, experts: tuple[int, ...] = (3, 3, 3), k: int = 2, targets: tuple[str, ...] = FFN
) -> MoeModel:
    lora = LoraShape(rank=2, scale=2.0, dropout=0.0)
    plan = InsertionPlan(kind=MIXLORA, experts_per_layer=experts, top_k=k, lora=lora, target_modules=targets, seed=1)
    return insert_experts(
        model, find_gated_ffns(model), plan, EngineConfig(POLICIES["full"], local_topology(1, cuda=False)), ExpertGroups(group, group)
    )


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
@pytest.mark.parametrize(("experts", "k"), [(1, 1), (3, 1), (3, 2)])
def test_at_step_0_the_model_computes_what_the_base_does(one_rank: dist.ProcessGroup, model_type: str, experts: int, k: int) -> None:
    """B = 0, so every expert is the base FFN; and the weights of the assignments sum to 1."""
    model, ids = tiny(model_type), token_ids()
    with torch.no_grad():
        wanted = model(ids, use_cache=False).logits
        moe = insert(model, one_rank, (experts,) * 3, k, (*ATTENTION, *FFN))
        with moe.engine.evaluation():
            got = model(ids, use_cache=False).logits
            torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
            for parameter in moe.replicated_parameters().values():
                parameter.add_(0.1)
            assert not torch.allclose(model(ids, use_cache=False).logits, wanted, rtol=1e-3), "the adapters take no part"


def test_experts_take_part(one_rank: dist.ProcessGroup) -> None:
    model, ids = tiny("llama"), token_ids()
    moe = insert(model, one_rank)
    with torch.no_grad():
        outputs = []
        for _ in range(2):
            with moe.engine.evaluation():
                outputs.append(model(ids, use_cache=False).logits)
            for parameter in moe.engine.shards.named_parameters().values():
                parameter.add_(0.1)
    assert not torch.allclose(outputs[0], outputs[1], rtol=1e-3)


def test_only_what_was_put_in_trains(one_rank: dist.ProcessGroup) -> None:
    model = tiny("llama")
    moe = insert(model, one_rank, (3, 0, 2), 2, ("q_proj", "up_proj"))
    assert sorted(moe.layers) == [Unit(0), Unit(2)]
    assert sorted(moe.attention) == [(layer, "self_attn.q_proj") for layer in range(3)]
    assert sorted(moe.engine.shards.named_parameters()) == [
        (Unit(layer), expert) for layer, expert in ((0, 0), (0, 1), (0, 2), (2, 0), (2, 1))
    ]
    replicated = moe.replicated_parameters()
    adapters = {f"layers.{layer}.self_attn.q_proj.{matrix}" for layer in range(3) for matrix in "AB"}
    assert set(replicated) == {"layers.0.router", "layers.2.router", *adapters}
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in replicated.values()}
    assert type(model.model.layers[1].mlp).__name__ == "LlamaMLP"
    assert [spec.name for spec in moe.engine.shards.families[Unit(0)].layout().trainable] == ["up_proj.A", "up_proj.B"]


def test_attention_alone(one_rank: dist.ProcessGroup) -> None:
    moe = insert(tiny("llama"), one_rank, targets=("v_proj",))
    assert not moe.layers
    assert len(moe.attention) == 3


@pytest.mark.parametrize(
    ("dtype", "trained"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)]
)
def test_what_trains_is_kept_in_fp32_or_wider(one_rank: dist.ProcessGroup, dtype: torch.dtype, trained: torch.dtype) -> None:
    assert adapter_dtype(dtype) == trained
    moe = insert(tiny("llama", dtype), one_rank, targets=("q_proj", "up_proj"))
    parameters = [*moe.replicated_parameters().values(), *moe.engine.shards.named_parameters().values()]
    assert {p.dtype for p in parameters} == {trained}


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"targets": ("up_proj", "w1", "query")}, r"lora\.target_modules: w1, query matches no module of LlamaForCausalLM.*q_proj"),
        ({"targets": ("lm_head",)}, "lm_head matches no module"),
        ({"experts": (0, 0, 0)}, "nothing would train"),
        ({"targets": ()}, "nothing would train"),
        ({"experts": (3, 3)}, r"moe\.num_experts lists 2 layers, but the model has 3"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(one_rank: dist.ProcessGroup, arguments: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=f"(?s){reason}") as error:
        insert(tiny("llama"), one_rank, **arguments)
    assert len(str(error.value).splitlines()) <= 8


class TemperedRouter(TopKRouter):
    """Learns more than its weight."""

    def __init__(self, site: RouterSite) -> None:
        super().__init__(site)
        self.log_temperature = nn.Parameter(torch.zeros(1))


class WiderRouter(TopKRouter):
    """Its weight has a column more than the hidden states have elements."""

    def __init__(self, site: RouterSite) -> None:
        super().__init__(replace(site, hidden=site.hidden + 1))


class LongBiasRouter(TopKRouter):
    """Its bias has two numbers per expert."""

    def __init__(self, site: RouterSite) -> None:
        super().__init__(site)
        self.bias = nn.Parameter(torch.zeros(2 * site.num_experts))


class HidingRouter(TemperedRouter):
    """Does not say all that it learns."""

    @property
    def trained(self) -> Mapping[str, nn.Parameter]:
        return {"weight": self.weight}


@pytest.mark.parametrize(
    ("made_by", "reason"),
    [
        (
            LongBiasRouter,
            r"router LongBiasRouter: it trains bias of the shape \[6\], but .*\[3, 16\] and \[3\] in this layer",
        ),
        (
            TemperedRouter,
            r"router TemperedRouter: it trains log_temperature of the shape \[1\], but adapters hold weight",
        ),
        (WiderRouter, r"router WiderRouter: it trains weight of the shape \[3, 17\], but adapters hold"),
        (HidingRouter, r"router HidingRouter: besides `trained` it has the parameters log_temperature, which nothing would step or save"),
    ],
)
def test_a_router_that_nothing_would_step_or_save_is_refused(
    one_rank: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch, made_by: type[TopKRouter], reason: str
) -> None:
    monkeypatch.setitem(ROUTERS, "token", made_by)
    with pytest.raises(RouterError, match=reason):
        insert(tiny("llama"), one_rank)


def test_a_model_without_gated_ffns_is_refused(one_rank: dist.ProcessGroup) -> None:
    with pytest.raises(UserError, match="unsupported architecture"):
        insert(tiny("llama", mlp_bias=True), one_rank)


def test_attention_adapters_by_their_formula(one_rank: dist.ProcessGroup) -> None:
    moe = insert(tiny("llama"), one_rank, targets=("q_proj",))
    lora = moe.attention[0, "self_attn.q_proj"]
    assert isinstance(lora, LoraLinear)
    random = torch.Generator().manual_seed(0)
    lora.lora_B.data.copy_(torch.randn(lora.lora_B.shape, generator=random, dtype=torch.float64))
    x = torch.randn(2, 5, 16, generator=random, dtype=torch.float64)
    wanted = x @ (lora.base.weight + 2.0 * lora.lora_B @ lora.lora_A).T
    torch.testing.assert_close(lora(x), wanted, rtol=1e-12, atol=1e-12)


def test_flops_outside_the_ffn_by_hand() -> None:
    """q and o 16 x 16, k and v 8 x 16: 768 multiply-adds."""
    model = tiny("llama")
    assert non_moe_flops_per_token(model, find_gated_ffns(model)) == 2 * 768


@pytest.mark.parametrize(
    ("ahead", "started"),
    [(0, []), (1, [(0, 0), (2, 2)]), (2, [(0, 0), (1, 2), (2, 2)]), (3, [(0, 0), (0, 2), (1, 2), (2, 2)])],
)
def test_gathers_start_so_many_decoder_layers_ahead(one_rank: dist.ProcessGroup, ahead: int, started: list[tuple[int, int]]) -> None:
    """By decoder layers, the middle one without experts; starting again what is under way does nothing."""
    model = tiny("llama")
    lora = LoraShape(rank=2, scale=2.0, dropout=0.0)
    plan = InsertionPlan(kind=MIXLORA, experts_per_layer=(3, 0, 3), top_k=2, lora=lora, target_modules=FFN, seed=1)
    config = EngineConfig(POLICIES["full"], local_topology(1, cuda=False), prefetch=ahead)
    moe = insert_experts(model, find_gated_ffns(model), plan, config, ExpertGroups(one_rank, one_rank))
    seen: list[tuple[int, int]] = []
    begun: list[int] = []
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(lambda *_, index=index: begun.append(index), prepend=True)
    step = moe.engine.begin_step(0)
    step.prefetch = lambda *units: seen.extend((begun[-1], unit.layer) for unit in units)  # type: ignore[attr-defined]
    step.begin_micro_step()
    with torch.no_grad():
        model(token_ids(), use_cache=False)
    assert seen == started
