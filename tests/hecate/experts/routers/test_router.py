from __future__ import annotations

import math

import pytest
import torch

from hecate.experts.routers.by_input.token import TopKRouter, softmax_of_largest, wide_linear
from tests.hecate.experts.making import router_site


def router(hidden: int, experts: int, k: int, *, layer: int = 0, seed: int = 0, dtype: torch.dtype = torch.float64) -> TopKRouter:
    return TopKRouter(router_site(hidden, experts, k, layer=layer, seed=seed, dtype=dtype))


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


@pytest.mark.parametrize("k", [1, 2, 5])
def test_both_ways_to_choose_are_the_same(k: int) -> None:
    """That of a GPU and that of a CPU: experts, weights, probabilities, and the gradient of the logits through both."""
    random = torch.Generator().manual_seed(0)
    logits = (torch.randn(30, 5, dtype=torch.float64, generator=random) * 10).requires_grad_()
    into_weight, into_prob = (torch.randn(30, width, dtype=torch.float64, generator=random) for width in (k, 5))
    found = []
    on_cpus = router(4, 5, k)
    on_cpus.logits = lambda _: logits  # type: ignore[method-assign]
    for routing in (on_cpus(logits), softmax_of_largest(logits, k)):
        (gradient,) = torch.autograd.grad((routing.weight_TK * into_weight).sum() + (routing.prob_TE * into_prob).sum(), logits)
        found.append((routing.prob_TE, routing.weight_TK, gradient, routing.expert_TK))
    for on_cpu, on_gpu in zip(*found, strict=True):
        torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-12, atol=1e-14)


def test_bf16_tokens_are_routed_in_fp32() -> None:
    in_fp32 = router(16, 4, 2, dtype=torch.float32)
    x = torch.randn(50, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    routing = in_fp32(x)
    assert routing.prob_TE.dtype == routing.weight_TK.dtype == torch.float32
    expected = torch.softmax(x.double() @ in_fp32.weight.double().T, dim=1)
    torch.testing.assert_close(routing.prob_TE.double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_logits_and_gradients_are_those_of_a_wide_copy_which_is_not_kept(dtype: torch.dtype) -> None:
    """Bit for bit; and of the tokens nothing is kept but what the router was given."""
    random, wide = torch.Generator().manual_seed(0), torch.promote_types(dtype, torch.float32)
    x, weight, grad = (torch.randn(shape, generator=random) for shape in ((50, 16), (4, 16), (50, 4)))
    leaves = [(x.to(dtype).requires_grad_(), weight.to(wide).requires_grad_()) for _ in range(2)]
    plain = torch.nn.functional.linear(leaves[0][0].to(wide), leaves[0][1])
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        mine = wide_linear(*leaves[1])
    assert all(tensor.dtype == dtype for tensor in kept if tensor.numel() == x.numel())
    assert torch.equal(mine, plain)
    for logits in (plain, mine):
        logits.backward(grad.to(wide))
    for one, other in zip(*leaves, strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert other.grad.dtype == other.dtype
        assert torch.equal(one.grad, other.grad)


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
