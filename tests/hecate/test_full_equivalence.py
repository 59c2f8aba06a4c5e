"""Training an upcycled model, sharded over any ranks, is the same computation as one process with plain autograd (tests/plain_full.py).

As in test_equivalence, with full experts in the model's FFNs, and with everything else trained, too, or frozen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from hecate.engine.step_plans import EngineConfig
from hecate.model.causal_head import LanguageModelHead
from hecate.model.gated_ffn import find_gated_ffns
from hecate.model.insert import InsertionPlan, insert_experts
from hecate.model.moe_model import MoeModel
from hecate.optim.adamw import AdamW
from hecate.optim.optimizer import ExpertOptimizer, LearningRate, Trainables, owned_parameters
from hecate.parallel.cluster.mesh import make_mesh
from hecate.parallel.cost.cost_model import PlanMode
from hecate.parallel.values.expert_kinds import FULL
from hecate.parallel.values.units import Unit
from hecate.ranks.groups import expert_groups
from hecate.train.steps.step import StepBatches, StepRules, train_step
from testing.ranks import run_ranks
from tests.hecate import equivalence_cases as suite
from tests.hecate.equivalence_cases import AUX_COEF, MAX_NORM, MICRO_STEPS, ROWS, WEIGHT_DECAY, micro_batch, rows_of, topology
from tests.hecate.watching import gradients_of, moments_of
from tests.plain_full import PlainFull
from tests.plain_mixlora import clip, plain_loss

STEPS, TOP_K, LOGIT_SCALE = 4, 2, 50
LEARNING_RATE = 1e-2
TOLERANCE = 1e-10


@dataclass(frozen=True)
class Case:
    policy: str
    scenario: str
    train_non_experts: bool
    num_experts: int = 5
    rematerialize: bool = False
    shard_size: int | None = None
    checkpointing: bool = False
    plan: PlanMode = "history"
    prefetch: int = 1

    @property
    def routed(self) -> suite.Case:
        return suite.Case(self.policy, self.num_experts, TOP_K, self.scenario)


def values(layer: int, expert: int, numel: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(1000 + 50 * layer + expert)
    return torch.randn(numel, generator=random, dtype=torch.float64) * 0.2


def sharded(case: Case, world: int) -> tuple[MoeModel, LanguageModelHead]:
    model = suite.tiny_llama(torch.float64)
    head = LanguageModelHead(model)
    config = EngineConfig(
        suite.planner_of(case.policy),
        topology(world),
        memory_slots=2,
        top_k=TOP_K,
        non_moe_flops=1e6,
        rematerialize=case.rematerialize,
        plan=case.plan,
        prefetch=case.prefetch,
    )
    groups = expert_groups(make_mesh(world, case.shard_size))
    plan = InsertionPlan(
        kind=FULL,
        experts_per_layer=(case.num_experts,) * 2,
        top_k=TOP_K,
        upcycle_noise=0.1,
        seed=5,
        train_non_experts=case.train_non_experts,
    )
    moe = insert_experts(model, find_gated_ffns(model), plan, config, groups)
    suite.bias_routers(moe, suite.router_bias(case.routed))
    for (unit, expert), chunk in moe.engine.shards.named_parameters().items():
        layer = unit.layer
        chunk.data.copy_(values(layer, expert, len(chunk)))
    if case.checkpointing:
        from hecate.model.layers.checkpointing import checkpoint_activations

        checkpoint_activations(moe)
    return moe, head


class Reference:
    """The plain model with the same values, and its own optimizer."""

    def __init__(self, case: Case, moe: MoeModel) -> None:
        self.model = suite.tiny_llama(torch.float64).requires_grad_(case.train_non_experts)
        specs = moe.engine.shards.families[Unit(0)].layout().trainable
        self.chunks: dict[tuple[int, int], list[torch.Tensor]] = {}
        self.replicated: dict[str, torch.Tensor] = {}
        self.layers = []
        for index, layer in enumerate(self.model.model.layers):
            experts = []
            for expert in range(case.num_experts):
                parts = values(index, expert, sum(spec.numel for spec in specs)).split([spec.numel for spec in specs])
                experts.append({spec.name: part.view(spec.shape) for spec, part in zip(specs, parts, strict=True)})
            router = moe.replicated_parameters()[f"layers.{index}.router"].detach()
            layer.mlp = PlainFull(router, suite.router_bias(case.routed), experts, TOP_K, LOGIT_SCALE)
            self.layers.append(layer.mlp)
            self.replicated[f"layers.{index}.router"] = layer.mlp.router
            for expert in range(case.num_experts):
                self.chunks[index, expert] = [layer.mlp.experts[expert][spec.name] for spec in specs]
        if case.train_non_experts:
            self.replicated |= {name: p for name, p in self.model.named_parameters() if ".mlp." not in name}
        self.parameters = [p for parts in self.chunks.values() for p in parts] + list(self.replicated.values())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)

    def gradients(self, step: int, empty_rows: range) -> tuple[float, float, set[tuple[int, int]]]:
        """(cross-entropy, gradient norm, idle experts); gradients of idle experts are None."""
        batches = [micro_batch(step, micro, empty_rows) for micro in range(MICRO_STEPS)]
        num_labels = sum(int((b.targets != -100).sum()) for b in batches)
        total, reached = 0.0, set()
        for batch in batches:
            loss, cross = plain_loss(self.model, self.layers, batch, num_labels, MICRO_STEPS, AUX_COEF)
            loss.backward()
            total += cross
            reached |= {(index, int(e)) for index, layer in enumerate(self.layers) for e in layer.expert_TK.unique()}
        idle = set(self.chunks) - reached
        for key in idle:
            for parameter in self.chunks[key]:
                parameter.grad = None
        return total, clip(self.parameters, MAX_NORM), idle

    def flat(self, key: tuple[int, int], *, grad: bool) -> torch.Tensor | None:
        parts = [part.grad if grad else part.detach() for part in self.chunks[key]]
        return None if parts[0] is None else torch.cat([part.flatten() for part in parts if part is not None])


def close(got: torch.Tensor | None, wanted: torch.Tensor | None, what: str) -> None:
    assert (got is None) == (wanted is None), f"{what} is {'missing' if got is None else 'not expected'}"
    if got is None or wanted is None:
        return
    error = float((got - wanted).detach().abs().max() / wanted.detach().abs().max().clamp(min=1.0))
    assert error <= TOLERANCE, f"{what} is off by {error:.1e}"


def check_case(rank: int, world: int, case: Case) -> None:
    moe, head = sharded(case, world)
    reference = Reference(case, moe)
    assert moe.replicated_parameters().keys() == reference.replicated.keys()
    owned = owned_parameters(moe.engine)
    optimizer = ExpertOptimizer(
        Trainables(owned, moe.replicated_parameters()),
        AdamW(weight_decay=WEIGHT_DECAY),
        LearningRate(LEARNING_RATE),
        torch.device("cpu"),
    )
    empty_rows = range((world - 1) * ROWS // world, ROWS) if case.scenario == "empty rank" and world > 1 else range(0)
    seen = gradients_of(optimizer)
    some_idle = False
    for step in range(STEPS):
        moments = {name: moments_of(optimizer, name) for name in owned}
        before = {name: parameter.detach().clone() for name, parameter in owned.items()}
        batches = [micro_batch(step, micro, empty_rows) for micro in range(MICRO_STEPS)]
        result = train_step(
            moe,
            head,
            optimizer,
            StepBatches(
                number=step,
                micro_batches=[rows_of(batch, rank, world) for batch in batches],
                num_labels=sum(int((b.targets != -100).sum()) for b in batches),
            ),
            StepRules(aux_coef=AUX_COEF, max_grad_norm=MAX_NORM),
        )
        loss, norm, idle = reference.gradients(step, empty_rows)
        some_idle |= bool(idle)
        assert result.loss == pytest.approx(loss, rel=TOLERANCE)
        assert result.grad_norm == pytest.approx(norm, rel=TOLERANCE)
        for unit, expert in moe.engine.shards.named_parameters():
            layer = unit.layer
            name = f"{layer}.{expert}"
            close(seen[name], reference.flat((layer, expert), grad=True), f"step {step}, gradient of expert {name}")
        for name, parameter in reference.replicated.items():
            close(seen[name], parameter.grad, f"step {step}, gradient of {name}")
        reference.optimizer.step()
        reference.optimizer.zero_grad()
        for (unit, expert), parameter in moe.engine.shards.named_parameters().items():
            layer = unit.layer
            name = f"{layer}.{expert}"
            close(parameter, reference.flat((layer, expert), grad=False), f"step {step}, expert {name}")
            if (layer, expert) in idle:
                assert torch.equal(parameter.detach(), before[name]), f"idle expert {name} moved"
                after = moments_of(optimizer, name)
                assert after.keys() == moments[name].keys(), f"idle expert {name} got moments"
                assert all(torch.equal(after[key], moments[name][key]) for key in after), f"moments of idle expert {name} moved"
        for name, parameter in moe.replicated_parameters().items():
            close(parameter, reference.replicated[name], f"step {step}, {name}")
        suite.assert_groups_equal(moe, optimizer)
    assert some_idle or case.scenario != "idle experts"


def _check_cases(rank: int, world: int, cases: list[Case]) -> None:
    for case in cases:
        try:
            with suite.calibrating_at_whim():
                check_case(rank, world, case)
        except BaseException as error:
            raise AssertionError(f"{case}: {error}") from error


@pytest.mark.parametrize("world", [1, *(pytest.param(world, marks=pytest.mark.slow) for world in (2, 3, 4))])
def test_upcycled_training_equals_one_process(world: int) -> None:
    cases = [
        Case("full", "idle experts", True),
        Case("static_ep", "empty rank", True),
        Case("hecate_paper", "hot expert", False),
        Case("random 4", "empty rank", True, rematerialize=True),
        Case("auto", "idle experts", False, num_experts=3),
    ]
    run_ranks(world, _check_cases, cases[:3] if world == 1 else cases, timeout=240)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 3])
def test_whenever_replicas_come_and_go_it_equals_one_process(world: int) -> None:
    cases = [
        Case("full", "idle experts", True, checkpointing=True),
        Case("llep", "empty rank", True, plan="exact", prefetch=0),
        Case("random 5", "empty rank", True, plan="calibrated", checkpointing=True),
        Case("random 6", "idle experts", False, plan="calibrated", rematerialize=True, prefetch=2),
        Case("random 3", "empty rank", True, plan="exact", rematerialize=True, checkpointing=True),
    ]
    run_ranks(world, _check_cases, cases[:3] if world == 1 else cases, timeout=240)


@pytest.mark.slow
@pytest.mark.parametrize(("world", "shard_size"), [(2, 1), (4, 1), (4, 2)])
def test_sharding_groups_smaller_than_the_world_equal_one_process(world: int, shard_size: int) -> None:
    cases = [
        Case("full", "idle experts", True, shard_size=shard_size),
        Case("hecate_paper", "empty rank", True, shard_size=shard_size),
        Case("random 4", "hot expert", False, rematerialize=True, shard_size=shard_size),
    ]
    run_ranks(world, _check_cases, cases, timeout=240)


def test_a_trained_head_gets_its_gradient_in_chunks() -> None:
    """More rows than a chunk; a head that is not tied; against cross-entropy of all logits."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 11}
    model = LlamaForCausalLM(LlamaConfig(**sizes)).double()
    hidden, target = torch.randn(1100, 8, dtype=torch.float64, requires_grad=True), torch.randint(11, (1100,))
    weight = model.lm_head.weight
    wanted = torch.autograd.grad(torch.nn.functional.cross_entropy(hidden @ weight.T, target, reduction="sum") * 0.3, (hidden, weight))
    got = torch.autograd.grad(LanguageModelHead(model).loss_sum(hidden, target) * 0.3, (hidden, weight))
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
