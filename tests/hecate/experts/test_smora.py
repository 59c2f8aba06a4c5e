"""Single ranks, or blocks of them, as experts over a linear, beside the formulas of SMoRA (arXiv 2501.15103), which are written out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from hecate.config import RouterConfig
from hecate.engine.engine import Engine
from hecate.engine.step_plans import EngineConfig
from hecate.experts.family import Site
from hecate.experts.linear import LinearExperts, MoeLinear
from hecate.experts.pairs.sources.plain import PlainPairs
from hecate.experts.routers.by_input.token import TopKRouter
from hecate.parallel.cluster.mesh import make_mesh
from hecate.parallel.cluster.topology import local_topology
from hecate.parallel.planners import POLICIES
from hecate.parallel.values.expert_kinds import ONLY_PROJECTION, LinearSizes, LoraShape, lora_scale
from hecate.parallel.values.units import Unit
from hecate.ranks.groups import expert_groups
from tests.hecate.experts.making import router_site

UNIT, INPUTS, OUTPUTS, ALPHA = Unit(0, "self_attn.q_proj"), 6, 10, 16
CHOICES = RouterConfig(score="sigmoid", bias="balancing", bias_in_weights=True, bias_rate=1e-5)


def made(ranks: int, block: int, chosen: int) -> tuple[MoeLinear, Engine]:
    """A linear with one LoRA of `ranks` ranks, as its recipe has it: an expert is a block of them, and a token takes `chosen` ranks."""
    torch.manual_seed(0)
    linear, sizes = nn.Linear(INPUTS, OUTPUTS, dtype=torch.float64), LinearSizes(INPUTS, OUTPUTS)
    site = Site(UNIT, ranks // block, sizes, 5, torch.float64, torch.float64, torch.device("cpu"))
    lora = LoraShape(block, lora_scale(ALPHA, block, rslora=False), 0.0)
    family = LinearExperts(site, PlainPairs(lora, (ONLY_PROJECTION,), sizes))
    engine = Engine({UNIT: family}, EngineConfig(POLICIES["full"], local_topology(1, cuda=False)), expert_groups(make_mesh(1)))
    for (_, expert), chunk in engine.shards.named_parameters().items():
        chunk.data.copy_(torch.randn(len(chunk), generator=torch.Generator().manual_seed(expert)) * 0.3)
    router = TopKRouter(
        replace(router_site(INPUTS, ranks // block, chosen // block, seed=5, dtype=torch.float64), unit=UNIT, choices=CHOICES)
    )
    router.weight.data *= 30
    return MoeLinear(UNIT, router, engine.current, linear.requires_grad_(False)), engine


def one_pair(engine: Engine) -> tuple[Tensor, Tensor]:
    """A [ranks, inputs] and B [outputs, ranks] of the one LoRA whose ranks the experts are."""
    family, chunks = engine.shards.families[UNIT], engine.shards.stores[UNIT].owned
    pairs = family.pair_source.stacked(chunks, torch.arange(len(chunks)))[ONLY_PROJECTION]
    a, b = pairs.a_SrI.detach().flatten(0, 1), pairs.b_SOr.detach().permute(1, 0, 2).flatten(1)
    return a.clone().requires_grad_(), b.clone().requires_grad_()


def smora(x: Tensor, linear: nn.Linear, a: Tensor, b: Tensor, w_gate: Tensor, bias: Tensor, block: int, k: int) -> Tensor:
    """y = W x + (alpha / k) · B (gate ⊙ A x), token by token: of the ranks' scores, each a block's, plus bias the k largest are chosen, and
    gate = k · (score + bias) / their sum."""
    rows = []
    for token in x:
        score = torch.sigmoid(w_gate @ token).repeat_interleave(block) + bias.repeat_interleave(block)
        chosen = sorted(range(len(score)), key=lambda rank: (-float(score[rank].detach()), rank))[:k]
        gate = torch.zeros_like(score)
        gate[chosen] = k * score[chosen] / score[chosen].sum()
        rows.append(linear(token) + ALPHA / k * b @ (gate * (a @ token)))
    return torch.stack(rows)


@pytest.mark.parametrize(("ranks", "block", "chosen"), [(64, 1, 8), (64, 2, 8), (16, 4, 8), (12, 1, 12)])
def test_it_is_the_formula(one_rank: dist.ProcessGroup, ranks: int, block: int, chosen: int) -> None:
    """Output, and the gradients of the input, the router and the one LoRA; the bias is not trained, but moved."""
    module, engine = made(ranks, block, chosen)
    router = module.router
    assert isinstance(router, TopKRouter)
    assert isinstance(router.bias, Tensor)
    assert not isinstance(router.bias, nn.Parameter)
    router.bias.copy_(torch.randn(ranks // block, generator=torch.Generator().manual_seed(3)) * 0.05)
    (a, b), w_gate = one_pair(engine), router.weight.detach().clone().requires_grad_()
    x, direction = torch.randn(9, INPUTS, dtype=torch.float64), torch.randn(9, OUTPUTS, dtype=torch.float64)
    here, there = x.clone().requires_grad_(), x.clone().requires_grad_()
    step = engine.begin_step(0)
    micro = step.begin_micro_step()
    y = module(here)
    micro.backward((y * direction).sum())
    loads = step.finish()[UNIT].sum(1)
    bias = router.bias.clone()
    wanted = smora(there, module.linear, a, b, w_gate, bias, block, chosen)
    (wanted * direction).sum().backward()
    torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(here.grad, there.grad, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(router.weight.grad, w_gate.grad, rtol=1e-11, atol=1e-12)
    assert a.grad is not None
    assert b.grad is not None
    for (_, expert), chunk in engine.shards.named_parameters().items():
        of_block = slice(expert * block, (expert + 1) * block)
        wanted_chunk = torch.cat([a.grad[of_block].flatten(), b.grad[:, of_block].flatten()])
        got = torch.zeros_like(wanted_chunk) if chunk.grad is None else chunk.grad
        torch.testing.assert_close(got, wanted_chunk, rtol=1e-11, atol=1e-12)
    assert int(loads.sum()) * block == 9 * chosen
    router.after_step(torch.from_numpy(loads))
    moved = CHOICES.bias_rate * torch.sign(torch.from_numpy(loads.mean() - loads))
    torch.testing.assert_close(router.bias, bias + moved, rtol=0, atol=1e-15)


def test_all_ranks_with_equal_scores_are_plain_lora(one_rank: dist.ProcessGroup) -> None:
    module, engine = made(16, 1, 16)
    module.router.weight.data.zero_()
    a, b = one_pair(engine)
    x = torch.randn(5, INPUTS, dtype=torch.float64)
    with engine.evaluation(), torch.no_grad():
        torch.testing.assert_close(module(x), module.linear(x) + ALPHA / 16 * x @ a.T @ b.T, rtol=1e-12, atol=1e-12)


def test_of_equal_scores_the_lower_ranks_are_chosen(one_rank: dist.ProcessGroup) -> None:
    module, _ = made(16, 1, 4)
    module.router.weight.data.zero_()
    routing = module.router(torch.randn(3, INPUTS, dtype=torch.float64))
    assert torch.equal(routing.expert_TK, torch.arange(4).expand(3, 4))
