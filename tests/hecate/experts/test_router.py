from __future__ import annotations

import math

import pytest
import torch

from hecate.experts.router import TopKRouter
from hecate.parallel.units import Unit


def router(hidden: int, experts: int, k: int, *, layer: int = 0, seed: int = 0, dtype: torch.dtype = torch.float64) -> TopKRouter:
    return TopKRouter(hidden, experts, k, unit=Unit(layer), seed=seed, dtype=dtype, device=torch.device("cpu"))


def test_a_token_by_hand() -> None:
    """Logits 2, 1, 3: experts 2 and 0, weighted e^3 : e^2, which is 1 / (1 + e^-1) and the rest."""
    by_hand = router(2, 3, 2)
    by_hand.weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    routing = by_hand(torch.tensor([[2.0, 1.0]], dtype=torch.float64))
    assert routing.expert_TK.tolist() == [[2, 0]]
    first = 1 / (1 + math.exp(-1))
    assert routing.weight_TK.tolist()[0] == pytest.approx([first, 1 - first], rel=1e-14)
    total = math.exp(2) + math.exp(1) + math.exp(3)
    assert routing.prob_TE.tolist()[0] == pytest.approx([math.exp(v) / total for v in (2, 1, 3)], rel=1e-14)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_weights_sum_to_one_and_experts_differ(k: int) -> None:
    routing = router(8, 5, k)(torch.randn(30, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 30)
    torch.testing.assert_close(routing.weight_TK.sum(1), torch.ones(30, dtype=torch.float64), rtol=1e-14, atol=0)
    assert all(len(set(row)) == k for row in routing.expert_TK.tolist())
    assert (routing.weight_TK.diff(dim=1) <= 0).all(), "not best first"


def test_bf16_tokens_are_routed_in_fp32() -> None:
    in_fp32 = router(16, 4, 2, dtype=torch.float32)
    x = torch.randn(50, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    routing = in_fp32(x)
    assert routing.prob_TE.dtype == routing.weight_TK.dtype == torch.float32
    expected = torch.softmax(x.double() @ in_fp32.weight.double().T, dim=1)
    torch.testing.assert_close(routing.prob_TE.double(), expected, rtol=1e-6, atol=1e-7)


def test_gradients_reach_the_router_and_the_tokens() -> None:
    learning = router(4, 3, 2)
    x = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    torch.autograd.gradcheck(lambda x_TD: learning(x_TD).weight_TK, (x,))
    learning(x).weight_TK[:, 0].sum().backward()
    assert learning.weight.grad is not None
    assert learning.weight.grad.any()


def test_no_tokens() -> None:
    routing = router(4, 3, 2)(torch.zeros(0, 4, dtype=torch.float64))
    assert routing.expert_TK.shape == routing.weight_TK.shape == (0, 2)


def test_the_initial_weights_depend_on_seed_and_layer() -> None:
    assert torch.equal(router(4, 3, 2, layer=1, seed=7).weight, router(4, 3, 1, layer=1, seed=7).weight)
    assert not torch.equal(router(4, 3, 2, layer=1, seed=7).weight, router(4, 3, 2, layer=2, seed=7).weight)
    assert not torch.equal(router(4, 3, 2, layer=1, seed=7).weight, router(4, 3, 2, layer=1, seed=8).weight)
    assert float(router(100, 100, 1).weight.std()) == pytest.approx(0.02, rel=0.05)
