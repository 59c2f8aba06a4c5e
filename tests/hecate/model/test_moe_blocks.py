"""A model's own experts and routers are found by what they compute; what computes something else is refused with the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from hecate.errors import UserError
from hecate.experts.routers.router import ModelRouter, TokenFeatures
from hecate.model.moe_blocks import MoeBlock, find_moe_blocks, renormalises
from tests.hecate.model.tiny import tiny

EXPERTS = {"num_local_experts": 5, "num_experts_per_tok": 3}


def test_a_mixtral_layer_by_layer() -> None:
    wanted = MoeBlock(1, "model.layers.1.mlp", "experts", "gate", num_experts=5, hidden=16, ffn=24, activation="silu", top_k=3)
    blocks = find_moe_blocks(tiny("mixtral", torch.float32, **EXPERTS))
    assert [block.layer for block in blocks] == [0, 1, 2]
    assert blocks[1] == wanted
    assert (wanted.experts_path, wanted.router_path) == ("model.layers.1.mlp.experts", "model.layers.1.mlp.gate")


def test_an_outline_without_weights_is_enough_and_stays_as_it_is() -> None:
    with torch.device("meta"):
        model = tiny("mixtral", torch.float32, hidden_act="gelu", **EXPERTS)
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    assert [block.activation for block in find_moe_blocks(model)] == ["gelu"] * 3
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before


def test_a_dense_model_has_none() -> None:
    assert find_moe_blocks(tiny("llama", torch.float32)) == []


@pytest.mark.parametrize(("model_type", "sums_to_one"), [("mixtral", True), ("qwen3_moe", False)])
def test_a_models_router_gives_its_own_choice_its_own_weights_and_another_one_those_of_its_probabilities(
    model_type: str, sums_to_one: bool
) -> None:
    model = tiny(model_type, torch.float32, num_experts=5, **EXPERTS, **({} if sums_to_one else {"norm_topk_prob": False}))
    own = model.model.layers[0].mlp.gate
    assert renormalises(own) == sums_to_one
    router = ModelRouter(own, torch.float32, renormalises=renormalises(own))
    x_TD = torch.randn(7, 16, generator=torch.Generator().manual_seed(0))

    def routed(forced_TK: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        _, weight_TK, expert_TK = own(x_TD)
        routing = router.route(x_TD, TokenFeatures(decided=(expert_TK, weight_TK), forced_TK=forced_TK))
        return routing.expert_TK, routing.weight_TK

    expert_TK, weight_TK = routed(None)
    again_TK, same_TK = routed(expert_TK)
    assert torch.equal(again_TK, expert_TK)
    assert torch.equal(same_TK, weight_TK)
    other_TK, other_weight_TK = routed((expert_TK + 1) % 5)
    prob_TE = torch.softmax(x_TD @ own.weight.T, dim=-1)
    wanted_TK = prob_TE.gather(1, other_TK)
    wanted_TK = wanted_TK / wanted_TK.sum(1, keepdim=True) if sums_to_one else wanted_TK
    torch.testing.assert_close(other_weight_TK, wanted_TK)
    other_weight_TK.square().sum().backward()
    assert own.weight.grad is not None
    assert own.weight.grad.abs().sum() > 0, "the router is trained as ever"


class NegatedExperts(nn.Module):
    """Of the right shapes, but they compute something else."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(5, 48, 16))
        self.down_proj = nn.Parameter(torch.zeros(5, 16, 24))

    def forward(self, x_TD: torch.Tensor, index_TK: torch.Tensor, weight_TK: torch.Tensor) -> torch.Tensor:
        return -x_TD


class LowestRouter(nn.Module):
    """It takes the experts of the lowest probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(5, 16))

    def forward(self, x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = x_TD @ self.weight.T
        weights, indices = (-torch.softmax(logits, dim=1)).topk(3, dim=1)
        return logits, -weights, indices


def _other_experts(block: Any) -> None:
    block.experts = NegatedExperts()


def _transposed_experts(block: Any) -> None:
    block.experts.down_proj = nn.Parameter(torch.zeros(5, 24, 16))


def _other_router(block: Any) -> None:
    block.gate = LowestRouter()


def _no_router(block: Any) -> None:
    block.gate = nn.Linear(16, 4, bias=False)


def _more_experts(block: Any) -> None:
    block.others = NegatedExperts()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_other_experts, r"layers\.1\.mlp\.experts \(NegatedExperts\): they do not compute down\(act\(gate\(x\)\) \* up\(x\)\)"),
        (_transposed_experts, r"its weights are \[5, 48, 16\] and \[5, 24, 16\]: another order of dimensions"),
        (_other_router, r"layers\.1\.mlp has no router .*\n  why: gate: it does not choose the k largest softmax probabilities"),
        (_no_router, r"layers\.1\.mlp has no router .*\n  why: no module with the one weight \[5, 16\]"),
        (_more_experts, r"layers\.1 has 2 groups of experts; one is supported"),
    ],
)
def test_what_computes_something_else_is_refused_with_the_reason(change: Callable[[Any], None], reason: str) -> None:
    model = tiny("mixtral", torch.float32, **EXPERTS)
    change(model.model.layers[1].mlp)
    with pytest.raises(UserError, match=f"unsupported architecture: .*{reason}") as caught:
        find_moe_blocks(model)
    assert len(str(caught.value).splitlines()) <= 8
