"""Experts that are mixed by users: known special cases of the two mixes, the gate, and which user each token sees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from hecate.config import RouterConfig
from hecate.experts.forward_pass import OrderError
from hecate.experts.pass_users import PassUsers, users_of_packed, users_of_rows
from hecate.experts.routers.by_input.user import UserRouter
from hecate.experts.routers.router import RouterSite, TokenFeatures
from hecate.kernels.common.assignments import RoutedTokens
from hecate.kernels.common.dropout import Dropout
from hecate.kernels.common.low_rank import LowRankPairs
from hecate.kernels.experts.mixed_factors import mixed_factors
from hecate.kernels.experts.reference import mixed_factors_reference
from hecate.kernels.experts.routed_pairs import routed_pairs
from hecate.parallel.values.expert_kinds import gate_parameters
from hecate.parallel.values.units import Unit

TOKENS, INPUTS, OUTPUTS, RANK, SCALE = 7, 5, 4, 3, 0.7
Mix = Callable[..., torch.Tensor]
MIXES: tuple[Mix, ...] = (mixed_factors, routed_pairs)
SITE = RouterSite(
    unit=Unit(1, "self_attn.q_proj"),
    hidden=INPUTS,
    num_experts=4,
    top_k=4,
    seed=3,
    dtype=torch.float64,
    device=torch.device("cpu"),
    choices=RouterConfig(input="user", temperature=2.0),
    user_width=6,
)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pairs_of(slots: int) -> LowRankPairs:
    return LowRankPairs(random(slots, RANK, INPUTS, seed=1), random(slots, OUTPUTS, RANK, seed=2), SCALE)


def routed_of(weight_TE: torch.Tensor) -> RoutedTokens:
    expert_TE = torch.arange(weight_TE.shape[1]).expand(weight_TE.shape).contiguous()
    return RoutedTokens(random(len(weight_TE), INPUTS, seed=4), expert_TE, weight_TE, torch.arange(TOKENS) + 50, torch.arange(10))


def plain(routed: RoutedTokens, pairs: LowRankPairs, expert: int) -> torch.Tensor:
    return SCALE * routed.x_TD @ (pairs.b_SOr[expert] @ pairs.a_SrI[expert]).T


@pytest.mark.parametrize("mix", MIXES)
def test_one_expert_is_a_plain_lora_and_so_is_a_share_of_one(mix: Mix) -> None:
    alone = routed_of(torch.ones(TOKENS, 1, dtype=torch.float64))
    torch.testing.assert_close(mix(alone, pairs_of(1)), plain(alone, pairs_of(1), 0), rtol=1e-12, atol=1e-12)
    whole = routed_of(torch.nn.functional.one_hot(torch.arange(TOKENS) % 3, 3).double())
    wanted = torch.stack([plain(whole, pairs_of(3), token % 3)[token] for token in range(TOKENS)])
    torch.testing.assert_close(mix(whole, pairs_of(3)), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shared", ["a_SrI", "b_SOr", None])
def test_the_mixes_differ_unless_one_factor_is_shared(shared: str | None) -> None:
    """With a shared A, sum w_e B_e A is both, as shares sum to 1."""
    routed, pairs = routed_of(torch.softmax(random(TOKENS, 3, seed=5), dim=-1)), pairs_of(3)
    if shared is not None:
        factor = getattr(pairs, shared)
        pairs = replace(pairs, **{shared: factor[:1].expand(factor.shape)})
    factors, products = (mix(routed, pairs) for mix in MIXES)
    assert torch.allclose(factors, products, rtol=1e-10, atol=1e-12) == (shared is not None)


@pytest.mark.parametrize("dropout", [None, Dropout(0.4, 9)])
@pytest.mark.parametrize("tokens", [TOKENS, 0])
def test_factors_are_mixed_as_by_a_pair_for_each_token(dropout: Dropout | None, tokens: int) -> None:
    routed, pairs = routed_of(torch.softmax(random(tokens, 3, seed=5), dim=-1)), pairs_of(3)
    routed = replace(routed, token_T=torch.arange(tokens) + 50)
    leaves = (routed.x_TD, routed.weight_TK, pairs.a_SrI, pairs.b_SOr)
    found = []
    for mix in (mixed_factors, mixed_factors_reference):
        x, weight, a, b = (leaf.detach().clone().requires_grad_() for leaf in leaves)
        y = mix(replace(routed, x_TD=x, weight_TK=weight), replace(pairs, a_SrI=a, b_SOr=b), dropout=dropout)
        (y * random(tokens, OUTPUTS, seed=6)).sum().backward()
        found.append((y.detach(), x.grad, weight.grad, a.grad, b.grad))
    for ours, wanted in zip(*found, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-11, atol=1e-12)


def test_a_gate_by_its_formula_and_its_parameters_by_name() -> None:
    router = UserRouter(SITE)
    users = users_of_rows(random(3, 6, seed=7), torch.tensor([2, 0, 2]))
    norm = torch.nn.functional.layer_norm(random(3, 6, seed=7)[[2, 0, 2]], (6,))
    inner = torch.relu(norm @ router.hidden.weight.T + router.hidden.bias)
    wanted = torch.softmax((inner @ router.out.weight.T + router.out.bias) / 2.0, dim=-1)
    torch.testing.assert_close(router.weights(users), wanted, rtol=1e-12, atol=1e-12)
    assert list(router.trained) == ["norm.weight", "norm.bias", "hidden.weight", "hidden.bias", "out.weight", "out.bias"]
    assert sum(parameter.numel() for parameter in router.trained.values()) == gate_parameters(6, 4)
    other = UserRouter(replace(SITE, unit=Unit(1, "self_attn.v_proj")))
    assert not torch.equal(other.hidden.weight, router.hidden.weight)
    assert torch.equal(UserRouter(SITE).hidden.weight, router.hidden.weight)


@pytest.mark.parametrize("mix", MIXES)
def test_a_high_temperature_is_the_plain_average(mix: Mix) -> None:
    """Of A and of B with `factors`, and of the products B A with `products`."""
    router = UserRouter(replace(SITE, choices=RouterConfig(input="user", temperature=1e12)))
    weights = router.weights(users_of_rows(random(TOKENS, 6), torch.arange(TOKENS)))
    torch.testing.assert_close(weights, torch.full((TOKENS, 4), 0.25, dtype=torch.float64), rtol=0, atol=1e-11)
    routed, pairs = routed_of(weights), pairs_of(4)
    delta = pairs.b_SOr.mean(0) @ pairs.a_SrI.mean(0) if mix is mixed_factors else (pairs.b_SOr @ pairs.a_SrI).mean(0)
    torch.testing.assert_close(mix(routed, pairs), SCALE * routed.x_TD @ delta.T, rtol=1e-10, atol=1e-10)


def packed() -> PassUsers:
    segments = torch.tensor([[1, 1, 2, 3, 0, 0], [1, 2, 2, 2, 2, 2], [0, 0, 0, 0, 0, 0]])
    user = torch.tensor([[2, 2, 0, 2, -1, -1], [1, 0, 0, 0, 0, 0], [-1] * 6])
    return users_of_packed(random(3, 6, seed=8), user, segments, torch.arange(18).view(3, 6).masked_fill(segments == 0, -1), 3)


def test_each_token_of_packed_and_padded_rows_sees_its_own_samples_user() -> None:
    router, users = UserRouter(SITE), packed()
    valid = torch.tensor([0, 1, 2, 3, 6, 7, 8, 9, 10, 11])
    routing = router.route(random(10, INPUTS), TokenFeatures(valid_T=valid, users=users))
    of_user = router.weights(users_of_rows(random(3, 6, seed=8), torch.arange(3)))
    torch.testing.assert_close(routing.weight_TK, of_user[[2, 2, 0, 2, 1, 0, 0, 0, 0, 0]], rtol=1e-12, atol=1e-12)
    assert routing.expert_TK.tolist() == [[0, 1, 2, 3]] * 10
    in_rows = router.route(random(6, INPUTS), TokenFeatures(users=users_of_rows(random(3, 6, seed=8), torch.tensor([1, 2]))))
    torch.testing.assert_close(in_rows.weight_TK, of_user[[1, 1, 1, 2, 2, 2]], rtol=1e-12, atol=1e-12)


def test_dropout_of_a_gate_goes_by_the_samples_first_token_and_the_step() -> None:
    router, users = UserRouter(SITE), packed()
    assert users.number_M is not None
    assert [users.number_M[sample].item() for sample in (0, 1, 2, 3, 4)] == [0, 2, 3, 6, 7]
    weights = router.weights(users, 1)
    assert not torch.allclose(weights, router.weights(users))
    assert not torch.allclose(weights, router.weights(users, 2))
    chosen = [4, 0]  # the same samples in another order and on a rank of their own
    alone = PassUsers(users.features_MF[chosen], torch.arange(2), users.number_M[chosen])
    torch.testing.assert_close(router.weights(alone, 1), weights[chosen], rtol=1e-12, atol=1e-12)


def test_a_pass_without_users_is_refused() -> None:
    with pytest.raises(OrderError, match=r"without the users of its samples.*\n.*PassTokens\(users=\.\.\.\)"):
        UserRouter(SITE).route(random(2, INPUTS), TokenFeatures())
