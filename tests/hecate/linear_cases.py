"""A tiny model with experts over its linears, sharded, and the plain reference with the same values (tests/plain_mola.py)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hecate.engine.step_plans import EngineConfig
from hecate.experts.linear import MoeLinear
from hecate.kernels.backend import Backend
from hecate.model.causal_head import LanguageModelHead
from hecate.model.insert import InsertionPlan, insert_experts
from hecate.model.linears import find_linears
from hecate.model.moe_model import MoeModel
from hecate.optim.adamw import AdamW
from hecate.optim.optimizer import ExpertOptimizer, LearningRate, Trainables, owned_parameters
from hecate.parallel.cost_model import PlanMode
from hecate.parallel.expert_kinds import LINEARS, LoraShape
from hecate.parallel.mesh import make_mesh
from hecate.parallel.units import Unit
from hecate.ranks.groups import expert_groups
from hecate.report.events import StepResult
from tests import plain_mixlora, plain_mola
from tests.hecate.equivalence_cases import (
    AUX_COEF,
    LEARNING_RATE,
    MAX_NORM,
    MICRO_STEPS,
    ROWS,
    TARGETS,
    WEIGHT_DECAY,
    micro_batch,
    planner_of,
    scenario_bias,
    step_of_rows,
    topology,
)

SCALE, RANK = 0.7, 3


@dataclass(frozen=True)
class LinearCase:
    policy: str
    scenario: str = "balanced"
    experts: tuple[int, int] = (2, 3)
    """of each linear in the two layers; 0: a plain adapter"""
    top_k: int = 2
    dtype: torch.dtype = torch.float64
    checkpointing: bool = False
    plan: PlanMode = "history"
    rematerialize: bool = False
    prefetch: int = 1
    kernels: Backend = "torch"
    steps: int = 3
    shard_size: int | None = None


def tiny_with_biases(dtype: torch.dtype) -> LlamaForCausalLM:
    """Two layers; q, k, v and o have biases."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=32,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        attention_bias=True,
    )
    model = LlamaForCausalLM(config).to(dtype)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, 0, 0.1)
    return model


def bias_of(case: LinearCase, experts: int) -> torch.Tensor:
    return scenario_bias(case.scenario, experts, case.top_k, case.dtype)


def sharded_linears(case: LinearCase, world: int) -> tuple[MoeModel, LanguageModelHead]:
    model = tiny_with_biases(case.dtype)
    head = LanguageModelHead(model)
    # Some experts of 1 to 2 kB travel hidden and some do not.
    config = EngineConfig(
        planner_of(case.policy),
        topology(world),
        memory_slots=1,
        top_k=case.top_k,
        non_moe_flops=2e6,
        plan=case.plan,
        rematerialize=case.rematerialize,
        prefetch=case.prefetch,
    )
    plan = InsertionPlan(
        kind=LINEARS,
        experts_per_layer=case.experts,
        top_k=case.top_k,
        lora=LoraShape(RANK, SCALE, 0.0),
        target_modules=TARGETS,
        seed=5,
        kernels=case.kernels,
    )
    moe = insert_experts(model, find_linears(model), plan, config, expert_groups(make_mesh(world, case.shard_size)))
    for layer in moe.layers.values():
        assert isinstance(layer, MoeLinear)
        router = layer.router
        bias = bias_of(case, moe.engine.shards.families[layer.unit].num_experts)

        def logits(x_TD: torch.Tensor, router: torch.nn.Module = router, bias: torch.Tensor = bias) -> torch.Tensor:
            return torch.nn.functional.linear(x_TD.to(router.weight.dtype), router.weight * 50) + bias

        router.logits = logits  # type: ignore[method-assign, assignment]
    random = torch.Generator().manual_seed(11)
    for name, parameter in moe.replicated_parameters().items():
        if name.endswith(".B"):
            parameter.data.copy_(torch.randn(parameter.shape, generator=random, dtype=torch.float64) * 0.1)
    for (unit, expert), chunk in moe.engine.shards.named_parameters().items():
        chunk.data.copy_(values_of(unit, expert, len(chunk)))
    if case.checkpointing:
        from hecate.model.checkpointing import checkpoint_activations

        checkpoint_activations(moe)
    model.train()
    return moe, head


def values_of(unit: Unit, expert: int, numel: int) -> torch.Tensor:
    """The initial chunk of an expert, B included."""
    place = TARGETS.index(unit.place.rpartition(".")[2])
    random = torch.Generator().manual_seed(1000 + 500 * unit.layer + 50 * place + expert)
    return torch.randn(numel, generator=random, dtype=torch.float64) * 0.2


class PlainModel:
    """The plain model with the same values, and its own optimizer."""

    def __init__(self, case: LinearCase, moe: MoeModel) -> None:
        self.case = case
        self.model = tiny_with_biases(case.dtype).requires_grad_(False)
        self.linears: dict[Unit, plain_mola.PlainMolaLinear] = {}
        self.trained: dict[str, list[torch.nn.Parameter]] = {}
        """LAYER.PLACE.EXPERT -> A and B, and the names of replicated parameters -> themselves"""
        values = moe.replicated_parameters()
        for found in find_linears(self.model):
            base, unit = self.model.get_submodule(found.path), found.unit
            assert isinstance(base, torch.nn.Linear)
            key = f"layers.{unit}"
            if case.experts[unit.layer] == 0:
                lora = plain_mixlora.PlainLora(base, values[f"{key}.A"].detach(), values[f"{key}.B"].detach(), SCALE)
                self.trained |= {f"{key}.A": [lora.a], f"{key}.B": [lora.b]}
                self.model.set_submodule(found.path, lora)
                continue
            experts = case.experts[unit.layer]
            pairs = []
            for expert in range(experts):
                flat = values_of(unit, expert, RANK * (base.in_features + base.out_features)).to(case.dtype)
                a, b = flat.split((RANK * base.in_features, RANK * base.out_features))
                pairs.append((a.view(RANK, -1), b.view(-1, RANK)))
            linear = plain_mola.PlainMolaLinear(
                base,
                values[f"{key}.router"].detach(),
                bias_of(case, experts),
                pairs,
                scale=SCALE,
                top_k=case.top_k,
                logit_scale=50,
            )
            self.trained[f"{key}.router"] = [linear.router]
            self.trained |= {f"{unit}.{expert}": [linear.a[expert], linear.b[expert]] for expert in range(experts)}
            self.linears[unit] = linear
            self.model.set_submodule(found.path, linear)
        self.parameters = [parameter for parts in self.trained.values() for parameter in parts]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=LEARNING_RATE[case.dtype], weight_decay=WEIGHT_DECAY)

    def step(self, step: int, empty_rows: range) -> tuple[float, float, float, set[str]]:
        """(cross-entropy, aux loss, gradient norm, idle experts); gradients of idle experts are None. Parameters have yet to be stepped."""
        batches = [micro_batch(step, micro, empty_rows) for micro in range(MICRO_STEPS)]
        num_labels = sum(int((b.targets != -100).sum()) for b in batches)
        by_layer: dict[int, list[plain_mola.PlainMolaLinear]] = {}
        for unit, linear in self.linears.items():
            by_layer.setdefault(unit.layer, []).append(linear)
        total, total_aux, reached = 0.0, 0.0, set()

        def aux(_: object) -> torch.Tensor:
            return plain_mola.plain_aux_by_layer(list(by_layer.values()))

        for batch in batches:
            linears = list(self.linears.values())
            loss, cross = plain_mixlora.plain_loss(self.model, linears, batch, num_labels, MICRO_STEPS, AUX_COEF, aux)
            loss.backward()
            total += cross
            total_aux += float(loss.detach()) - cross
            for unit, linear in self.linears.items():
                assert linear.expert_TK is not None
                reached |= {f"{unit}.{int(expert)}" for expert in linear.expert_TK.unique()}
        idle = {name for name, parts in self.trained.items() if len(parts) == 2 and name not in reached}
        for name in idle:
            for parameter in self.trained[name]:
                parameter.grad = None
        return total, total_aux / AUX_COEF, plain_mixlora.clip(list(self.parameters), MAX_NORM), idle

    def flat(self, name: str, *, grad: bool) -> torch.Tensor | None:
        parts = [p.grad if grad else p.detach() for p in self.trained[name]]
        return None if any(p is None for p in parts) else torch.cat([p.flatten() for p in parts if p is not None])


class ShardedTraining:
    """One model and its optimizer on this rank."""

    def __init__(self, case: LinearCase, rank: int, world: int) -> None:
        self.case, self.rank, self.world = case, rank, world
        self.moe, self.head = sharded_linears(case, world)
        self.optimizer = ExpertOptimizer(
            Trainables(owned_parameters(self.moe.engine), self.moe.replicated_parameters()),
            AdamW(weight_decay=WEIGHT_DECAY),
            LearningRate(LEARNING_RATE[case.dtype]),
            torch.device("cpu"),
        )

    @property
    def empty_rows(self) -> range:
        """Rows that are all padding: with the scenario those of the last rank."""
        if self.case.scenario == "empty rank" and self.world > 1:
            return range((self.world - 1) * ROWS // self.world, ROWS)
        return range(0)

    def step(self, number: int) -> StepResult:
        return step_of_rows(self.moe, self.head, self.optimizer, number, rank=self.rank, world=self.world, empty_rows=self.empty_rows)


def random_unit_owners(training: ShardedTraining, seed: int) -> dict[Unit, np.ndarray]:
    """Any owners; with some seeds a rank owns nothing of a unit."""
    rng = np.random.default_rng(seed)
    shards = training.moe.engine.shards
    return {
        unit: rng.integers(0, rng.integers(1, shards.world_size + 1), size=family.num_experts) for unit, family in shards.families.items()
    }


def near(name: str, got: torch.Tensor | None, wanted: torch.Tensor | None, tolerance: float) -> None:
    """Raises AssertionError: they differ by more than the tolerance, relative to the largest number, or only one is there."""
    assert (got is None) == (wanted is None), f"{name}: gradient {'missing' if got is None else 'not expected'}"
    if got is not None and wanted is not None and got.numel():
        error = float((got.flatten() - wanted.flatten()).abs().max() / wanted.abs().max().clamp(min=1.0))
        assert error <= tolerance, f"{name}: off by {error:.2e}"
