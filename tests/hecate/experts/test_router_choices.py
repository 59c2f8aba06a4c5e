"""What the configuration says of a router, by hand and by short formulas."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from hecate.config import RouterConfig
from hecate.experts.pass_samples import PassSamples
from hecate.experts.routers.by_input.token import TopKRouter
from hecate.experts.routers.router import Routing, TokenFeatures, sample_balance_loss
from hecate.experts.routers.scores import sigmoid, softmax
from hecate.parallel.values.units import Unit
from tests.hecate.experts.making import router_site

DOUBLE = torch.float64


def router(experts: int, k: int, hidden: int = 6, *, layer: int = 0, **choices: Any) -> TopKRouter:
    made = TopKRouter(router_site(hidden, experts, k, layer=layer, dtype=DOUBLE, choices=RouterConfig(**choices)))
    made.weight.data.mul_(50)  # the init alone is nearly uniform
    return made


def tokens(number: int, hidden: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(number, hidden, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("bias", ["none", "balancing"])
@pytest.mark.parametrize("k", [1, 2, 7, 64])
def test_of_equal_scores_the_lower_expert_is_chosen(score: str, bias: str, k: int) -> None:
    tied = router(64, k, score=score, bias=bias)
    tied.weight.data.zero_()
    assert tied(tokens(5)).expert_TK.tolist() == [list(range(k))] * 5
    tied.weight.data[[9, 40]] = 1.0  # two that are equal, and more or less than the others
    chosen = tied(torch.ones(1, 6, dtype=DOUBLE)).expert_TK[0].tolist()
    assert chosen == [9, 40, *(e for e in range(64) if e not in (9, 40))][:k]


def test_a_balancing_bias_chooses_and_weighs_by_hand() -> None:
    """Scores 1/2, 1/2, 3/4; the bias puts the second before the first."""
    by_hand: dict[bool, Routing] = {}
    for in_weights in (False, True):
        one = router(3, 2, 1, score="sigmoid", bias="balancing", bias_in_weights=in_weights)
        one.weight.data = torch.tensor([[0.0], [0.0], [1.0]], dtype=DOUBLE) * torch.tensor(3.0, dtype=DOUBLE).log()
        assert one.bias is not None
        one.bias += torch.tensor([-0.25, 0.5, 0.0], dtype=DOUBLE)
        by_hand[in_weights] = one(torch.ones(1, 1, dtype=DOUBLE))
        assert by_hand[in_weights].expert_TK.tolist() == [[1, 2]]
    torch.testing.assert_close(by_hand[False].weight_TK, torch.tensor([[0.5, 0.75]], dtype=DOUBLE) / 1.25)
    torch.testing.assert_close(by_hand[True].weight_TK, torch.tensor([[1.0, 0.75]], dtype=DOUBLE) / 1.75)


def test_a_balancing_bias_moves_towards_even_loads_and_gets_no_gradient() -> None:
    moved = router(4, 2, score="sigmoid", bias="balancing", bias_rate=0.25)
    assert moved.loss is None
    assert [name for name, _ in moved.named_parameters()] == ["weight"]
    moved.after_step(torch.tensor([5, 3, 4, 4]))  # the mean is 4
    moved.after_step(torch.tensor([9, 0, 0, 0]))
    assert moved.bias is not None
    assert moved.bias.tolist() == [-0.5, 0.5, 0.25, 0.25]
    moved(tokens(9)).weight_TK[:, 0].sum().backward()
    assert moved.bias.grad is None
    assert moved.weight.grad is not None


def test_every_assignment_is_counted() -> None:
    stats = router(8, 3, score="sigmoid", bias="balancing")(tokens(20)).stats()
    assert int(stats.count_KE.sum()) == 20 * 3


def test_dense_and_equal_scores_weigh_all_experts_alike() -> None:
    """So a mixture of rank-one experts would be one plain LoRA, divided by its rank."""
    even = router(5, 5, score="sigmoid")
    even.weight.data.zero_()
    assert even(tokens(3)).weight_TK.tolist() == [[0.2] * 5] * 3


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_gate_weights_are_the_scores(score: str) -> None:
    gated, x = router(4, 2, score=score, weights="gate"), tokens(7)
    logits = x @ gated.weight.T
    scores = logits.softmax(-1) if score == "softmax" else logits.sigmoid()
    routing = gated(x)
    torch.testing.assert_close(routing.weight_TK, scores.gather(1, routing.expert_TK), rtol=1e-13, atol=0)


def test_weights_of_one_choose_as_the_softmax_and_train_no_router() -> None:
    """A renormalised weight of one expert is one, to the bit."""
    plain, one, x = router(5, 1), router(5, 1, bias="learned", weights="one"), tokens(30).requires_grad_()
    routing = one(x)
    assert torch.equal(routing.expert_TK, plain(x).expert_TK)
    assert torch.equal(routing.weight_TK, plain(x).weight_TK)
    assert not routing.weight_TK.requires_grad


LENGTHS = (4, 2, 3)
"""tokens of three samples"""


def sample_stats(padding: int, at_front: bool, layers: int = 2) -> tuple[list[TopKRouter], dict[Unit, Any]]:
    """The same three samples, two of them in the first row, with more or less padding, through some layers."""
    width = 6 + padding
    segments = torch.zeros(2, width, dtype=torch.int64)
    first = padding if at_front else 0
    segments[0, first : first + 4], segments[0, first + 4 : first + 6], segments[1, first : first + 3] = 1, 2, 1
    valid = segments.flatten().nonzero().squeeze(1)
    samples = PassSamples(segments, most=2, expected=3.0)
    routers = [router(4, 1, layer=layer, bias="learned", weights="one", balance="sample") for layer in range(layers)]
    stats = {}
    for layer, one in enumerate(routers):
        routing = one.route(tokens(sum(LENGTHS), seed=layer), TokenFeatures(valid, samples))
        stats[Unit(layer)] = routing.stats()
    return routers, stats


def test_the_balance_of_samples_and_its_gradient_are_those_of_the_formula(one_rank: dist.ProcessGroup) -> None:
    routers, stats = sample_stats(padding=2, at_front=False)
    loss = sample_balance_loss(stats, one_rank)
    loss.backward()
    weights = [one.weight.detach().clone().requires_grad_() for one in routers]
    prob = torch.stack([(tokens(sum(LENGTHS), seed=layer) @ w.T).softmax(-1) for layer, w in enumerate(weights)])
    onehot = torch.nn.functional.one_hot(prob.argmax(-1), 4).to(DOUBLE)
    pairs = zip(prob.split(LENGTHS, 1), onehot.split(LENGTHS, 1), strict=True)
    wanted = torch.stack([(p.mean((0, 1)) * h.mean((0, 1))).sum() for p, h in pairs]).mean()
    wanted.backward()
    torch.testing.assert_close(loss, wanted, rtol=1e-14, atol=0)
    for one, weight in zip(routers, weights, strict=True):
        torch.testing.assert_close(one.weight.grad, weight.grad, rtol=1e-12, atol=1e-16)
        bias = one.trained["bias"]
        assert bias.grad is not None
        assert bias.grad.any()


@pytest.mark.parametrize(("padding", "at_front"), [(0, False), (5, False), (1, True)])
def test_padding_does_not_change_the_balance_of_samples(one_rank: dist.ProcessGroup, padding: int, at_front: bool) -> None:
    wanted = sample_balance_loss(sample_stats(2, at_front=False)[1], one_rank)
    got = sample_balance_loss(sample_stats(padding, at_front)[1], one_rank)
    torch.testing.assert_close(got, wanted, rtol=1e-14, atol=0)


def test_layers_with_other_numbers_of_experts_are_averaged(one_rank: dist.ProcessGroup) -> None:
    segments = torch.ones(1, 5, dtype=torch.int64)
    losses, stats = [], {}
    for layer, experts in enumerate((3, 4, 4)):
        one = router(experts, 1, layer=layer, balance="sample")
        routing = one.route(tokens(5, seed=layer), TokenFeatures(None, PassSamples(segments, 1, 1.0)))
        stats[Unit(layer)] = routing.stats()
        losses.append((routing.prob_TE, torch.nn.functional.one_hot(routing.expert_TK[:, 0], experts).to(DOUBLE)))
    (p3, h3), *fours = losses
    of_four = (torch.cat([p for p, _ in fours]).mean(0) * torch.cat([h for _, h in fours]).mean(0)).sum()
    wanted = (p3.mean(0) * h3.mean(0)).sum() / 3 + of_four * 2 / 3
    torch.testing.assert_close(sample_balance_loss(stats, one_rank), wanted, rtol=1e-14, atol=0)


def test_no_tokens_have_no_balance_to_lose(one_rank: dist.ProcessGroup) -> None:
    one = router(4, 1, balance="sample")
    samples = PassSamples(torch.zeros(1, 8, dtype=torch.int64), 1, 2.0)
    routing = one.route(tokens(0), TokenFeatures(torch.zeros(0, dtype=torch.int64), samples))
    loss = sample_balance_loss({Unit(0): routing.stats()}, one_rank)
    loss.backward()
    assert float(loss.detach()) == 0
    assert one.weight.grad is not None


def test_scores_of_three_logits() -> None:
    logit_TE = torch.tensor([[0.0, math.log(3.0), 0.0]], dtype=DOUBLE)
    torch.testing.assert_close(softmax.SCORE(logit_TE), torch.tensor([[0.2, 0.6, 0.2]], dtype=DOUBLE))
    torch.testing.assert_close(sigmoid.SCORE(logit_TE), torch.tensor([[0.5, 0.75, 0.5]], dtype=DOUBLE))
