"""The load-balancing loss against Hugging Face's, and over ranks against one process."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from hecate.experts.routers.router import RouterStats, load_balancing_loss
from hecate.model.moe_model import MoeModel
from hecate.parallel.values.units import Unit
from testing.ranks import run_ranks

EXPERTS = {0: 4, 1: 6, 2: 4, 5: 6, 6: 6}
"""of each layer: two groups"""
TOP_K = 2


def stats_of(logits_TE: torch.Tensor, k: int = TOP_K) -> RouterStats:
    prob_TE = logits_TE.softmax(-1)
    expert_TK = prob_TE.topk(k, dim=-1).indices
    count_KE = F.one_hot(expert_TK, logits_TE.shape[1]).sum(0)
    return RouterStats(prob_TE.sum(0), count_KE)


def plain(logits: dict[int, torch.Tensor]) -> torch.Tensor:
    """Mean over layers of the loss of the layer's group, all of the group's tokens in one pile."""
    total = torch.zeros((), dtype=torch.float64)
    for layer in logits:
        pile = torch.cat([logits[other] for other in sorted(logits) if EXPERTS[other] == EXPERTS[layer]]).softmax(-1)
        chosen = F.one_hot(pile.topk(TOP_K, dim=-1).indices, EXPERTS[layer]).double().mean(0)
        total = total + EXPERTS[layer] * (chosen * pile.mean(0)).sum() / len(logits)
    return total


def test_balanced_routing_with_uniform_probabilities_gives_top_k(one_rank: dist.ProcessGroup) -> None:
    """Each expert is the first of one token and the second of another; P = 1/4: 4 · 2 · 4 · (1/4 · 1/4) = 2."""
    stats = RouterStats(torch.full((4,), 1.0, dtype=torch.float64), torch.ones(2, 4, dtype=torch.int64))
    assert load_balancing_loss({0: stats, 3: stats}, one_rank).item() == pytest.approx(2.0, rel=1e-14)


def test_everything_at_one_expert_gives_the_number_of_experts(one_rank: dist.ProcessGroup) -> None:
    stats = RouterStats(torch.tensor([5.0, 0.0, 0.0]), torch.tensor([[5, 0, 0]]))
    assert load_balancing_loss({0: stats}, one_rank).item() == pytest.approx(3.0)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_equals_hugging_face(one_rank: dist.ProcessGroup, k: int) -> None:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    random = torch.Generator().manual_seed(k)
    logits = tuple(torch.randn(37, 6, generator=random).mul(2).requires_grad_() for _ in range(3))
    wanted = load_balancing_loss_func(logits, num_experts=6, top_k=k)
    got = load_balancing_loss({layer: stats_of(values, k) for layer, values in enumerate(logits)}, one_rank)
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=0)
    for ours, theirs in zip(torch.autograd.grad(got, logits), torch.autograd.grad(wanted, logits), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)


def all_logits(tokens: int) -> dict[int, torch.Tensor]:
    random = torch.Generator().manual_seed(4)
    return {layer: torch.randn(tokens, e, generator=random, dtype=torch.float64) * 2 for layer, e in EXPERTS.items()}


def _share(rank: int, world: int, tokens: int, empty: int | None) -> float:
    group = dist.group.WORLD
    assert group is not None
    whole = {layer: values.requires_grad_() for layer, values in all_logits(tokens).items()}
    plain(whole).backward()
    busy = [r for r in range(world) if r != empty]
    rows = slice(0, 0)
    if rank != empty:
        index = busy.index(rank)
        rows = slice(index * tokens // len(busy), (index + 1) * tokens // len(busy))
    mine = {layer: values.detach()[rows].clone().requires_grad_() for layer, values in whole.items()}
    # Layers were visited in another order here.
    share = load_balancing_loss({layer: stats_of(mine[layer]) for layer in reversed(list(mine))}, group)
    share.backward()
    for layer, values in whole.items():
        got, wanted = mine[layer].grad, values.grad
        assert got is not None
        assert wanted is not None
        torch.testing.assert_close(got, wanted[rows], rtol=1e-12, atol=1e-14, msg=f"gradient of layer {layer}")
    return share.item()


@pytest.mark.parametrize(("world", "empty"), [(1, None), (2, None), (3, None), (3, 1)])
def test_the_shares_of_the_ranks_add_up(world: int, empty: int | None) -> None:
    shares = run_ranks(world, _share, 23, empty)
    assert sum(shares) == pytest.approx(plain(all_logits(23)).item(), rel=1e-12)
    if empty is not None:
        assert shares[empty] == 0


def test_no_tokens_anywhere_give_zero(one_rank: dist.ProcessGroup) -> None:
    logits = torch.zeros(0, 4, dtype=torch.float64)
    assert load_balancing_loss({0: stats_of(logits)}, one_rank).item() == 0


def test_units_are_balanced_together_by_loss(one_rank: dist.ProcessGroup) -> None:
    """Units 0 and 2 share the usual loss; unit 1 has one of its own, which counts it."""
    stats = {Unit(layer): stats_of(torch.randn(9, 4, dtype=torch.float64)) for layer in range(3)}

    def seven(of_units: Mapping[Unit, RouterStats], _group: dist.ProcessGroup) -> torch.Tensor:
        assert list(of_units) == [Unit(1)]
        return torch.tensor(7.0, dtype=torch.float64)

    layers: Any = {unit: SimpleNamespace(balance=seven if unit == Unit(1) else load_balancing_loss) for unit in stats}
    nothing: Any = None
    got = MoeModel(nothing, nothing, layers, {}).balance_loss(stats, one_rank)
    usual = load_balancing_loss({unit: stats[unit] for unit in (Unit(0), Unit(2))}, one_rank)
    assert got.item() == pytest.approx(usual.item() + 7.0, rel=1e-14)
