"""Experts over linears in one process: against PEFT's LoRA, Hugging Face's load-balancing loss, and the plain formula."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from hecate.engine.engine import Engine
from hecate.engine.step_plans import EngineConfig
from hecate.experts.family import Site
from hecate.experts.forward_pass import PassTokens
from hecate.experts.linear import LinearExperts, MoeLinear, balance_by_layer
from hecate.experts.pairs.sources.plain import PlainPairs
from hecate.experts.routers.by_input.token import TopKRouter
from hecate.experts.routers.router import RouterStats
from hecate.parallel.cluster.mesh import make_mesh
from hecate.parallel.cluster.topology import local_topology
from hecate.parallel.planners import POLICIES
from hecate.parallel.values.expert_kinds import ONLY_PROJECTION, LinearSizes, LoraShape
from hecate.parallel.values.units import Unit
from hecate.ranks.groups import expert_groups
from tests.hecate.equivalence_cases import LEARNING_RATE, MAX_NORM, MICRO_STEPS, TARGETS, WEIGHT_DECAY, micro_batch
from tests.hecate.experts.making import router_site
from tests.hecate.linear_cases import LinearCase, ShardedTraining, tiny_with_biases
from tests.plain_mixlora import clip, plain_loss
from tests.plain_mola import PlainMolaLinear

UNIT, RANK, SCALE = Unit(1, "self_attn.q_proj"), 3, 0.7


def made(experts: int, top_k: int, linear: nn.Linear, dropout: float = 0.0) -> tuple[MoeLinear, Engine]:
    """A linear with experts on one rank, B of which are not zero."""
    sizes = LinearSizes(linear.in_features, linear.out_features)
    dtype = linear.weight.dtype
    site = Site(UNIT, experts, sizes, 5, dtype, dtype, torch.device("cpu"))
    family = LinearExperts(site, PlainPairs(LoraShape(RANK, SCALE, dropout), (ONLY_PROJECTION,), sizes))
    config = EngineConfig(POLICIES["full"], local_topology(1, cuda=False), top_k=top_k)
    engine = Engine({UNIT: family}, config, expert_groups(make_mesh(1)))
    for (_, expert), chunk in engine.shards.named_parameters().items():
        chunk.data.copy_(torch.randn(len(chunk), generator=torch.Generator().manual_seed(expert)) * 0.3)
    router = TopKRouter(replace(router_site(sizes.inputs, experts, top_k, seed=5, dtype=dtype), unit=UNIT))
    router.weight.data *= 30
    return MoeLinear(UNIT, router, engine.current, linear.requires_grad_(False)), engine


def pairs_of(engine: Engine) -> list[tuple[torch.Tensor, torch.Tensor]]:
    family = engine.shards.families[UNIT]
    chunks = engine.shards.stores[UNIT].owned
    pairs = family.pair_source.stacked(chunks, torch.arange(len(chunks)))[ONLY_PROJECTION]
    return list(zip(pairs.a_SrI.detach().clone(), pairs.b_SOr.detach().clone(), strict=True))


def stats_of(logits_TE: torch.Tensor, k: int) -> RouterStats:
    prob_TE = logits_TE.softmax(-1)
    return RouterStats(prob_TE.sum(0), nn.functional.one_hot(prob_TE.topk(k, dim=-1).indices, logits_TE.shape[1]).sum(0))


def linear_of(inputs: int = 6, outputs: int = 10, dtype: torch.dtype = torch.float64) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs, dtype=dtype)


@pytest.mark.parametrize(("experts", "top_k"), [(4, 2), (3, 3), (1, 1)])
def test_it_is_the_formula(one_rank: dist.ProcessGroup, experts: int, top_k: int) -> None:
    """Output, and gradients of the input, the router and every pair."""
    linear = linear_of()
    module, engine = made(experts, top_k, linear)
    plain = PlainMolaLinear(linear, module.router.weight.detach(), 0.0, pairs_of(engine), scale=SCALE, top_k=top_k, logit_scale=1.0)
    x, direction = torch.randn(2, 7, 6, dtype=torch.float64), torch.randn(2, 7, 10, dtype=torch.float64)
    here, there = x.clone().requires_grad_(), x.clone().requires_grad_()
    step = engine.begin_step(0)
    micro = step.begin_micro_step()
    y = module(here)
    micro.backward((y * direction).sum())
    loads = step.finish()[UNIT]
    wanted = plain(there)
    (wanted * direction).sum().backward()
    torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(here.grad, there.grad, rtol=1e-12, atol=1e-12)
    if experts > 1:
        torch.testing.assert_close(module.router.weight.grad, plain.router.grad, rtol=1e-12, atol=1e-12)
    for (_, expert), chunk in engine.shards.named_parameters().items():
        if loads[expert].sum() == 0:
            continue
        a, b = (part.grad for part in plain.experts[expert])
        torch.testing.assert_close(chunk.grad, torch.cat([a.flatten(), b.flatten()]), rtol=1e-12, atol=1e-12)


def test_padding_goes_to_no_expert(one_rank: dist.ProcessGroup) -> None:
    linear = linear_of()
    module, engine = made(4, 2, linear)
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    with engine.evaluation() as evaluation, torch.no_grad():
        with evaluation.forward(PassTokens(valid=torch.tensor([0, 4]))) as stats:
            y = module(x).flatten(0, 1)
        assert int(stats[UNIT].count_KE.sum()) == 2 * 2
        with evaluation.forward(PassTokens()):
            whole = module(x).flatten(0, 1)
    at_home = linear(x).flatten(0, 1)
    assert torch.equal(y[[1, 2, 3, 5]], at_home[[1, 2, 3, 5]])
    torch.testing.assert_close(y[[0, 4]], whole[[0, 4]], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(y[0], at_home[0])


def test_one_expert_is_pefts_lora(one_rank: dist.ProcessGroup) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    linear = linear_of()
    module, engine = made(1, 1, linear)
    ((a, b),) = pairs_of(engine)
    holder = nn.Module()
    holder.q_proj = linear_of()
    config = peft.LoraConfig(r=RANK, lora_alpha=SCALE * RANK, target_modules=["q_proj"], lora_dropout=0.0)
    layer = peft.inject_adapter_in_model(config, holder).q_proj
    layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = a.clone(), b.clone()
    x = torch.randn(5, 6, dtype=torch.float64)
    step = engine.begin_step(0)
    micro = step.begin_micro_step()
    y = module(x)
    micro.backward(y.square().sum())
    step.finish()
    wanted = layer(x)
    wanted.square().sum().backward()
    torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)
    gradient = torch.cat([layer.lora_A["default"].weight.grad.flatten(), layer.lora_B["default"].weight.grad.flatten()])
    torch.testing.assert_close(next(iter(engine.shards.named_parameters().values())).grad, gradient, rtol=1e-12, atol=1e-12)


def test_with_a_fixed_a_a_dense_model_trains_as_with_pefts_lora_whose_a_is_frozen(one_rank: dist.ProcessGroup) -> None:
    """All linears of two layers, for some steps."""
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    case = LinearCase("full", experts=(1, 1), top_k=1, pairs="fixed_a")
    ours = ShardedTraining(case, 0, 1)
    config = peft.LoraConfig(r=RANK, lora_alpha=SCALE * RANK, target_modules=list(TARGETS), lora_dropout=0.0)
    model = peft.inject_adapter_in_model(config, tiny_with_biases(case.dtype))
    weight_b = {}
    for (unit, _), chunk in ours.moe.engine.shards.named_parameters().items():
        of = ours.moe.engine.shards.families[unit].pair_source.stacked(chunk.detach()[None], torch.tensor([0]))[ONLY_PROJECTION]
        layer = model.get_submodule(f"model.layers.{unit.layer}.{unit.place}")
        layer.lora_A["default"].weight.requires_grad_(False).copy_(of.a_SrI[0])
        weight_b[str(unit)] = layer.lora_B["default"].weight
        weight_b[str(unit)].data.copy_(of.b_SOr[0])
    assert len(weight_b) == 2 * len(TARGETS)
    optimizer = torch.optim.AdamW(weight_b.values(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    for step in range(3):
        batches = [micro_batch(step, micro, range(0)) for micro in range(MICRO_STEPS)]
        labels = sum(int((batch.targets != -100).sum()) for batch in batches)
        loss = torch.stack([plain_loss(model, [], batch, labels, 1, 0.0, lambda _: torch.zeros(()))[0] for batch in batches]).sum()
        loss.backward()
        norm = clip(list(weight_b.values()), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        result = ours.step(step)
        assert abs(result.loss - float(loss.detach())) <= 1e-10
        assert abs(result.grad_norm - norm) <= 1e-10 * max(1, norm)
        for (unit, _), chunk in ours.moe.engine.shards.named_parameters().items():
            torch.testing.assert_close(chunk.detach(), weight_b[str(unit)].detach().flatten(), rtol=0, atol=1e-10)


def test_a_permutation_of_experts_permutes_the_results(one_rank: dist.ProcessGroup) -> None:
    permuted = torch.tensor([2, 0, 3, 1])
    x, results = torch.randn(9, 6, dtype=torch.float64), []
    for order in (torch.arange(4), permuted):
        module, engine = made(4, 2, linear_of())
        module.router.weight.data = module.router.weight.data[order]
        chunks = {expert: chunk for (_, expert), chunk in engine.shards.named_parameters().items()}
        values = [chunks[int(expert)].detach().clone() for expert in order]
        for expert, value in enumerate(values):
            chunks[expert].data.copy_(value)
        step = engine.begin_step(0)
        micro = step.begin_micro_step()
        y = module(x)
        micro.backward(y.square().sum())
        step.finish()
        results.append((y.detach(), [chunks[expert].grad for expert in range(4)]))
    (y, gradients), (again, moved) = results
    torch.testing.assert_close(again, y, rtol=1e-12, atol=1e-12)
    for place, expert in enumerate(permuted.tolist()):
        assert (moved[place] is None) == (gradients[expert] is None)
        if moved[place] is not None:
            torch.testing.assert_close(moved[place], gradients[expert], rtol=1e-12, atol=1e-12)


def test_dropout_is_of_the_experts_input_and_of_no_other(one_rank: dist.ProcessGroup) -> None:
    """With the same step and token numbers it is the same; W x is never dropped."""
    linear, x = linear_of(), torch.randn(4, 6, dtype=torch.float64)
    module, engine = made(4, 2, linear, dropout=0.5)
    results = []
    for numbers in (torch.arange(4), torch.arange(4), torch.arange(4) + 100):
        step = engine.begin_step(len(results) // 2)
        micro = step.begin_micro_step(PassTokens(number=numbers))
        results.append(module(x))
        micro.backward(results[-1].sum())
        step.finish()
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    with torch.no_grad():
        for chunk in engine.shards.named_parameters().values():
            chunk.zero_()
    step = engine.begin_step(0)
    micro = step.begin_micro_step(PassTokens(number=torch.arange(4)))
    y = module(x)
    torch.testing.assert_close(y.detach(), linear(x), rtol=1e-12, atol=1e-12)
    micro.backward(y.sum())
    step.finish()


@pytest.mark.parametrize("k", [1, 2])
def test_balance_is_mixtral_s_for_each_choice_with_a_layers_logits_together(one_rank: dist.ProcessGroup, k: int) -> None:
    """Seven linears in each of two layers, with 4 and with 6 experts. Mixtral's divides counts by tokens, MoLA's by their own sum."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    random = torch.Generator().manual_seed(k)
    stats: dict[Unit, RouterStats] = {}
    wanted = torch.zeros(())
    for layer, experts in enumerate((4, 6)):
        logits = tuple(torch.randn(37, experts, generator=random).mul(2) for _ in range(7))
        wanted = wanted + load_balancing_loss_func(logits, num_experts=experts, top_k=k) / k
        stats |= {Unit(layer, f"linear_{place}"): stats_of(values, k) for place, values in enumerate(logits)}
    torch.testing.assert_close(balance_by_layer(stats, one_rank), wanted, rtol=1e-6, atol=0)
