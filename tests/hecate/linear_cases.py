"""A tiny model with experts over its linears, sharded, and the plain reference with the same values (tests/plain_mola.py)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hecate.engine.step_plans import EngineConfig
from hecate.experts.linear import MoeLinear
from hecate.experts.pairs import PairSource
from hecate.experts.pool import Pool
from hecate.experts.shard_pairs import ShardPairs
from hecate.kernels.backend import Backend
from hecate.model.causal_head import LanguageModelHead
from hecate.model.insert import InsertionPlan, insert_experts
from hecate.model.linears import find_linears
from hecate.model.moe_model import MoeModel
from hecate.optim.adamw import AdamW
from hecate.optim.optimizer import ExpertOptimizer, LearningRate, Trainables, owned_parameters
from hecate.parallel.cost_model import PlanMode
from hecate.parallel.expert_kinds import LINEARS, ONLY_PROJECTION, LoraShape, ShardShape
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
from tests.plain_mos import PlainPool

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
    pairs: str = "plain"

    @property
    def lora(self) -> LoraShape:
        return LoraShape(RANK, SCALE, 0.0, self.pairs, shards=ShardShape(equivalent_rank=2, per_vector=4, private_rank=1))

    @property
    def one_pair_each(self) -> bool:
        return max(self.experts) == 1


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
        lora=case.lora,
        target_modules=TARGETS,
        seed=5,
        kernels=case.kernels,
    )
    moe = insert_experts(model, find_linears(model), plan, config, expert_groups(make_mesh(world, case.shard_size)))
    for layer in moe.layers.values():
        assert isinstance(layer, MoeLinear)
        router = layer.router
        if case.one_pair_each:
            continue
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
    place = TARGETS.index(unit.place.removesuffix(".pool").rpartition(".")[2])
    random = torch.Generator().manual_seed(1000 + 500 * unit.layer + 50 * place + expert)
    return torch.randn(numel, generator=random, dtype=torch.float64) * 0.2


def plain_pool(pool: Pool, dtype: torch.dtype, per_vector: int) -> PlainPool:
    """A pool with the values of `values_of`."""
    specs, numel = pool.layout().trainable, pool.layout().trainable_numel
    blocks_NC = torch.stack([values_of(pool.unit, block, numel) for block in range(pool.num_experts)])
    return PlainPool(blocks_NC.to(dtype), [(spec.name, *spec.shape) for spec in specs], per_vector)


def made_of(pool: PlainPool, source: PairSource, expert: int) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    assert isinstance(source, ShardPairs)
    index = {name: source.index(name)[expert] for name, _, _ in pool.vectors}
    return lambda: pool.pair(ONLY_PROJECTION, index, RANK)


class PlainModel:
    """The plain model with the same values, and its own optimizer."""

    def __init__(self, case: LinearCase, moe: MoeModel) -> None:
        self.case = case
        self.model = tiny_with_biases(case.dtype).requires_grad_(False)
        self.linears: dict[Unit, plain_mola.PlainMolaLinear] = {}
        self.trained: dict[str, list[torch.nn.Parameter]] = {}
        """LAYER.PLACE.EXPERT -> A and B, and the names of replicated parameters -> themselves"""
        values = moe.replicated_parameters()
        pools = {unit: plain_pool(pool, case.dtype, case.lora.shards.per_vector) for unit, pool in moe.engine.shards.pools.items()}
        self.pools = {str(unit): pool for unit, pool in pools.items()}
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
            pool = pools.get(moe.engine.shards.trained_in[unit])
            for expert in range(0 if pool else experts):
                flat = values_of(unit, expert, RANK * (base.in_features + base.out_features)).to(case.dtype)
                a, b = flat.split((RANK * base.in_features, RANK * base.out_features))
                pairs.append((a.view(RANK, -1), b.view(-1, RANK)))
            router = torch.zeros(1, base.in_features, dtype=case.dtype) if case.one_pair_each else values[f"{key}.router"].detach()
            linear = plain_mola.PlainMolaLinear(
                base,
                router,
                bias_of(case, experts),
                [made_of(pool, moe.engine.shards.families[unit].pair_source, expert) for expert in range(experts)] if pool else pairs,
                scale=SCALE,
                top_k=case.top_k,
                logit_scale=50,
            )
            if not case.one_pair_each:
                self.trained[f"{key}.router"] = [linear.router]
            self.trained |= {f"{unit}.{expert}": [] if pool else [linear.a[expert], linear.b[expert]] for expert in range(experts)}
            self.linears[unit] = linear
            self.model.set_submodule(found.path, linear)
        self.parameters = [parameter for parts in self.trained.values() for parameter in parts]
        self.parameters += [shards for pool in pools.values() for shards in pool.shards.values()]
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
            if self.case.one_pair_each:  # nothing is chosen
                return torch.zeros((), dtype=self.case.dtype)
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
        idle = {name for name, parts in self.trained.items() if len(parts) != 1 and name not in reached}
        for name in idle:
            for parameter in self.trained[name]:
                parameter.grad = None
        return total, total_aux / AUX_COEF, plain_mixlora.clip(list(self.parameters), MAX_NORM), idle

    def flat(self, name: str, *, grad: bool) -> torch.Tensor | None:
        unit, _, number = name.rpartition(".")
        if unit in self.pools:
            return self.pools[unit].block(int(number), grad=grad)
        if not self.trained[name]:  # an empty chunk never has a gradient
            return None if grad else torch.empty(0)
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
        unit: rng.integers(0, rng.integers(1, shards.world_size + 1), size=chunked.num_experts) for unit, chunked in shards.chunked.items()
    }
