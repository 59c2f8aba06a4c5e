"""A tiny model with experts over its linears, sharded, and the plain reference with the same values (tests/plain_mola.py)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hecate.config import RouterConfig
from hecate.data.batches import Batch
from hecate.engine.step_plans import EngineConfig
from hecate.experts.linear import MoeLinear
from hecate.experts.pairs.pool import Pool
from hecate.experts.pairs.source_table import trains_a
from hecate.experts.pairs.sources.fixed_a import FixedA
from hecate.experts.pairs.sources.nola import Nola
from hecate.experts.pairs.sources.shards import ShardPairs
from hecate.kernels.backend import Backend
from hecate.model.causal_head import LanguageModelHead
from hecate.model.insert import InsertionPlan, insert_experts
from hecate.model.linears import find_linears
from hecate.model.moe_model import MoeModel
from hecate.optim.adamw import AdamW
from hecate.optim.optimizer import ExpertOptimizer, LearningRate, Trainables
from hecate.parallel.cluster.mesh import make_mesh
from hecate.parallel.cost.cost_model import PlanMode
from hecate.parallel.values.expert_kinds import LINEARS, ONLY_PROJECTION, LoraShape, ShardShape
from hecate.parallel.values.units import Unit
from hecate.ranks.groups import expert_groups
from hecate.report.events import StepResult
from hecate.train.steps.step import StepBatches, StepRules, train_step
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
    rows_of,
    scenario_bias,
    topology,
)
from tests.plain_allora import row_norm_product
from tests.plain_mos import PlainPool
from tests.plain_routers import plain_sample_aux

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
    rank: int = RANK
    router: RouterConfig = field(default_factory=RouterConfig)
    pairs: str = "plain"
    eta: float | None = None
    ranks: tuple[int, ...] = ()
    """of each expert, where they differ; the largest is `rank`"""

    @property
    def lora(self) -> LoraShape:
        """The gradient rule allows no scale; experts of other ranks are scaled by the same alpha over theirs."""
        scale = SCALE if self.eta is None else 1.0
        of_experts = tuple((rank, scale * self.rank / rank) for rank in self.ranks)
        shards = ShardShape(equivalent_rank=2, per_vector=4, private_rank=1)
        rule = "none" if self.eta is None else "row_norm"
        return LoraShape(self.rank, scale, 0.0, self.pairs, rule, self.eta, bases=5, shards=shards, of_experts=of_experts)

    @property
    def one_pair_each(self) -> bool:
        """Then linears have no router."""
        return max(self.experts) == 1

    @property
    def aux_coef(self) -> float:
        return 0.0 if self.router.bias == "balancing" or self.one_pair_each else AUX_COEF


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
        router=case.router,
        lora=case.lora,
        target_modules=TARGETS,
        seed=5,
        kernels=case.kernels,
    )
    moe = insert_experts(model, find_linears(model), plan, config, expert_groups(make_mesh(world, case.shard_size)))
    for layer in moe.layers.values():
        assert isinstance(layer, MoeLinear)
        router = layer.router
        if not router.trained:
            continue  # it has no logits
        bias = bias_of(case, moe.engine.shards.families[layer.unit].num_experts)

        def logits(x_TD: torch.Tensor, router: torch.nn.Module = router, bias: torch.Tensor = bias) -> torch.Tensor:
            return torch.nn.functional.linear(x_TD.to(router.weight.dtype), router.weight * 50) + bias

        router.logits = logits  # type: ignore[method-assign, assignment]
    random = torch.Generator().manual_seed(11)
    for name, parameter in moe.replicated_parameters().items():
        if name.endswith(".B"):
            parameter.data.copy_(torch.randn(parameter.shape, generator=random, dtype=torch.float64) * 0.1)
    for (unit, expert), chunk in moe.engine.shards.named_parameters().items():
        parts = values_of(case, moe, unit, expert)
        chunk.data.copy_(torch.cat([chunk.new_empty(0), *(part.flatten() for part in parts)]))
    if case.checkpointing:
        from hecate.model.layers.checkpointing import checkpoint_activations

        checkpoint_activations(moe)
    model.train()
    return moe, head


def flat_values(unit: Unit, expert: int, numel: int) -> torch.Tensor:
    """The initial chunk of an expert or a block of a pool, B included."""
    place = TARGETS.index(unit.place.removesuffix(".pool").rpartition(".")[2])
    random = torch.Generator().manual_seed(1000 + 500 * unit.layer + 50 * place + expert)
    return torch.randn(numel, generator=random, dtype=torch.float64) * 0.2


def values_of(case: LinearCase, moe: MoeModel, unit: Unit, expert: int) -> list[torch.Tensor]:
    """What of an expert or a block of a pool trains as it begins, B included; zero beyond the expert's own rank."""
    specs = moe.engine.shards.chunked[unit].layout().trainable
    flat = flat_values(unit, expert, sum(spec.numel for spec in specs))
    parts = [part.view(spec.shape) for part, spec in zip(flat.split([spec.numel for spec in specs]), specs, strict=True)]
    if case.ranks:
        parts[0][case.ranks[expert] :], parts[1][:, case.ranks[expert] :] = 0.0, 0.0
    return parts


def plain_pool(case: LinearCase, moe: MoeModel, pool: Pool) -> PlainPool:
    """A pool with the values of `values_of`."""
    blocks = [torch.cat([part.flatten() for part in values_of(case, moe, pool.unit, block)]) for block in range(pool.num_experts)]
    vectors = [(spec.name, *spec.shape) for spec in pool.layout().trainable]
    return PlainPool(torch.stack(blocks).to(case.dtype), vectors, case.lora.shards.per_vector)


def made_of(case: LinearCase, moe: MoeModel, unit: Unit, pools: Mapping[Unit, PlainPool]) -> plain_mola.Made:
    """How the plain reference makes A and B of what trains: each source's formula, and pairs of the ranks that experts have."""
    source = moe.engine.shards.families[unit].pair_source
    if isinstance(source, ShardPairs):
        index, pool = source.index, pools[moe.engine.shards.trained_in[unit]]
        return lambda expert, _: pool.pair(ONLY_PROJECTION, {name: index(name)[expert] for name, _, _ in pool.vectors}, case.rank)
    if isinstance(source, FixedA):
        a = source.stacked(torch.zeros(1, source.sizes.trained_numel, dtype=case.dtype), torch.zeros(1, dtype=torch.int64))
        return lambda expert, parts: (a[ONLY_PROJECTION].a_SrI[0], parts[0])
    if isinstance(source, Nola):
        a0, u, v = source.drawn.values()
        return lambda expert, parts: plain_mola.nola_pair(a0, u, v, parts)
    if not case.ranks:
        return plain_mola.as_they_are
    return lambda expert, parts: (
        parts[0][: case.ranks[expert]],
        parts[1][:, : case.ranks[expert]] * (case.rank / case.ranks[expert]),
    )


class PlainModel:
    """The plain model with the same values, and its own optimizer."""

    def __init__(self, case: LinearCase, moe: MoeModel) -> None:
        self.case = case
        self.model = tiny_with_biases(case.dtype).requires_grad_(False)
        self.linears: dict[Unit, plain_mola.PlainMolaLinear] = {}
        self.trained: dict[str, list[torch.nn.Parameter]] = {}
        """LAYER.PLACE.EXPERT -> A and B, and the names of replicated parameters -> themselves"""
        values = moe.replicated_parameters()
        lora, words = case.lora, asdict(case.router)
        of = plain_mixlora.product if lora.eta is None else partial(row_norm_product, eta=lora.eta)
        choices = {name: words[name] for name in ("score", "bias", "bias_in_weights", "weights")}
        pools = {unit: plain_pool(case, moe, pool) for unit, pool in moe.engine.shards.pools.items()}
        self.pools = {str(unit): pool for unit, pool in pools.items()}
        for found in find_linears(self.model):
            base, unit = self.model.get_submodule(found.path), found.unit
            assert isinstance(base, torch.nn.Linear)
            key = f"layers.{unit}"
            if case.experts[unit.layer] == 0:
                a, b = moe.attention[unit.layer, unit.place].lora_A.detach(), values[f"{key}.B"].detach()
                adapter = plain_mixlora.PlainLora(base, a, b, lora.scale, of=of, trains_a=trains_a(lora))
                self.trained |= {f"{key}.A": [adapter.a], f"{key}.B": [adapter.b]} if trains_a(lora) else {f"{key}.B": [adapter.b]}
                self.model.set_submodule(found.path, adapter)
                continue
            experts = case.experts[unit.layer]
            pairs = [[part.to(case.dtype) for part in values_of(case, moe, unit, expert)] for expert in range(experts)]
            linear = plain_mola.PlainMolaLinear(
                base,
                base.weight.new_zeros(1, base.in_features) if case.one_pair_each else values[f"{key}.router"].detach(),
                bias_of(case, experts),
                pairs,
                scale=lora.scale,
                top_k=min(case.top_k, experts),
                logit_scale=50,
                of=of,
                made=made_of(case, moe, unit, pools),
                choices=choices,
            )
            if not case.one_pair_each:
                self.trained[f"{key}.router"] = [linear.router]
            if case.router.bias == "learned":
                self.trained[f"{key}.router.bias"] = [linear.expert_bias]
            self.trained |= {f"{unit}.{expert}": list(linear.experts[expert]) for expert in range(experts)}
            self.linears[unit] = linear
            self.model.set_submodule(found.path, linear)
        self.parameters = [parameter for parts in self.trained.values() for parameter in parts]
        self.parameters += [shards for pool in pools.values() for shards in pool.shards.values()]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)

    def step(self, step: int, empty_rows: range) -> tuple[float, float, float, set[str]]:
        """(cross-entropy, aux loss, gradient norm, idle experts); gradients of idle experts are None. Parameters have yet to be stepped."""
        batches = [micro_batch(step, micro, empty_rows) for micro in range(MICRO_STEPS)]
        num_labels = sum(int((b.targets != -100).sum()) for b in batches)
        num_samples = sum(int(b.segment_ids.amax(1).sum()) for b in batches)
        linears, nothing = list(self.linears.values()), torch.zeros(())
        total, total_aux = 0.0, 0.0
        for batch in batches:
            loss, cross = plain_mixlora.plain_loss(self.model, linears, batch, num_labels, MICRO_STEPS, 0.0, lambda _: nothing)
            if self.case.aux_coef:
                aux = self._aux(batch, num_samples)
                loss, total_aux = loss + self.case.aux_coef * aux, total_aux + float(aux.detach())
            loss.backward()
            total += cross
            for linear in linears:
                linear.note_loads()
        idle = {f"{unit}.{expert}" for unit, linear in self.linears.items() for expert, count in enumerate(linear.seen) if not count}
        for name in idle:
            for parameter in self.trained[name]:
                parameter.grad = None
        for linear in linears:
            linear.move_bias(self.case.router.bias_rate)
        return total, total_aux, plain_mixlora.clip(list(self.parameters), MAX_NORM), idle

    def _aux(self, batch: Batch, num_samples: int) -> torch.Tensor:
        """This micro-step's share of the balance loss."""
        if self.case.router.balance == "batch":
            by_layer: dict[int, list[plain_mola.PlainMolaLinear]] = {}
            for unit, linear in self.linears.items():
                by_layer.setdefault(unit.layer, []).append(linear)
            return plain_mola.plain_aux_by_layer(list(by_layer.values())) / MICRO_STEPS
        alike: dict[int, list[plain_mola.PlainMolaLinear]] = {}
        for linear in self.linears.values():
            alike.setdefault(len(linear.experts), []).append(linear)
        parts = [len(some) / len(self.linears) * plain_sample_aux(some, batch, num_samples) for some in alike.values()]
        return torch.stack(parts).sum()

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
            Trainables.of(self.moe),
            AdamW(weight_decay=WEIGHT_DECAY),
            LearningRate(LEARNING_RATE),
            torch.device("cpu"),
        )

    @property
    def empty_rows(self) -> range:
        """Rows that are all padding: with the scenario those of the last rank."""
        if self.case.scenario == "empty rank" and self.world > 1:
            return range((self.world - 1) * ROWS // self.world, ROWS)
        return range(0)

    def step(self, number: int) -> StepResult:
        batches = [micro_batch(number, micro, self.empty_rows) for micro in range(MICRO_STEPS)]
        return train_step(
            self.moe,
            self.head,
            self.optimizer,
            StepBatches(
                number=number,
                micro_batches=[rows_of(batch, self.rank, self.world) for batch in batches],
                num_labels=sum(int((b.targets != -100).sum()) for b in batches),
                num_samples=sum(int(b.segment_ids.amax(1).sum()) for b in batches),
            ),
            StepRules(aux_coef=self.case.aux_coef, max_grad_norm=MAX_NORM),
        )


def near(name: str, got: torch.Tensor | None, wanted: torch.Tensor | None, tolerance: float) -> None:
    """Raises AssertionError: they differ by more than the tolerance, relative to the largest number, or only one is there."""
    assert (got is None) == (wanted is None), f"{name}: gradient {'missing' if got is None else 'not expected'}"
    if got is not None and wanted is not None and got.numel():
        error = float((got.flatten() - wanted.flatten()).abs().max() / wanted.abs().max().clamp(min=1.0))
        assert error <= tolerance, f"{name}: off by {error:.2e}"
