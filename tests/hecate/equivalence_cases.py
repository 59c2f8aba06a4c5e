"""A tiny model, its batches, and the cases in which its sharded training is held to one process, for all tests of that kind."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from hecate.config import RouterConfig
from hecate.data.batches import Batch
from hecate.engine.plans_ahead import THREAD
from hecate.engine.step_plans import EngineConfig
from hecate.experts.routers.by_input.token import TopKRouter
from hecate.kernels.backend import Backend
from hecate.model.causal_head import LanguageModelHead
from hecate.model.gated_ffn import find_gated_ffns
from hecate.model.insert import InsertionPlan, insert_experts
from hecate.model.moe_model import MoeModel
from hecate.optim.optimizer import ExpertOptimizer
from hecate.parallel.cluster.mesh import make_mesh
from hecate.parallel.cluster.topology import Link, Topology
from hecate.parallel.cost.cost_model import PlanChoice, PlanMode
from hecate.parallel.plan.measured_modes import MeasuredModes
from hecate.parallel.planners import POLICIES, Plan, PlanInput, Planner
from hecate.parallel.values.expert_kinds import MIXLORA, LoraShape, ShardShape
from hecate.parallel.values.units import Unit
from hecate.ranks.groups import expert_groups
from hecate.report.events import StepResult
from hecate.train.steps.step import StepBatches, StepRules, train_step

STEPS, MICRO_STEPS, ROWS, LENGTH = 3, 2, 12, 8


WEIGHT_DECAY, MAX_NORM, AUX_COEF = 0.1, 0.5, 0.05


TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


LEARNING_RATE = 1e-3
"""Adam divides a gradient by its own size, so rounding in an element that is nearly zero moves it by a share of this: at 1e-2, by 1.6e-10
after three steps"""


@dataclass(frozen=True)
class Case:
    policy: str
    num_experts: int
    top_k: int
    scenario: str
    dtype: torch.dtype = torch.float64
    checkpointing: bool = False
    plan: PlanChoice = "history"
    rematerialize: bool = False
    prefetch: int = 1
    kernels: Backend = "torch"
    steps: int = STEPS
    shard_size: int | None = None
    pairs: str = "plain"
    eta: float | None = None
    router: RouterConfig = field(default_factory=RouterConfig)
    targets: tuple[str, ...] = TARGETS
    replay: Literal["force", "check"] | None = None
    """force: tokens go where `recorded` says"""

    @property
    def lora(self) -> LoraShape:
        """The gradient rule allows no scale."""
        scale = 0.7 if self.eta is None else 1.0
        rule, shards = "none" if self.eta is None else "row_norm", ShardShape(2, 4, 1)
        return LoraShape(3, scale, dropout=0.0, source=self.pairs, gradient_rule=rule, eta=self.eta, bases=5, shards=shards)


def router_bias(case: Case) -> torch.Tensor:
    return scenario_bias(case.scenario, case.num_experts, case.top_k, case.dtype)


def scenario_bias(scenario: str, experts: int, top_k: int, dtype: torch.dtype) -> torch.Tensor:
    """Added to a router's logits, so that a scenario happens whatever the random router says."""
    bias = torch.zeros(experts, dtype=torch.float64)
    if scenario == "hot expert":
        bias[0] = 6.0
    if scenario == "idle experts":
        bias[top_k::2] = -1e4
    return bias.to(dtype)


def bias_routers(moe: MoeModel, bias: torch.Tensor) -> None:
    for layer in moe.layers.values():
        router = layer.router
        if not isinstance(router, TopKRouter):
            continue  # it has no logits

        def logits(x_TD: torch.Tensor, router: TopKRouter = router) -> torch.Tensor:
            return F.linear(x_TD.to(router.weight.dtype), router.weight * 50) + bias  # * 50: the init alone is nearly uniform

        router.logits = logits  # type: ignore[method-assign]


def tiny_llama(dtype: torch.dtype) -> LlamaForCausalLM:
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
    )
    return LlamaForCausalLM(config).to(dtype)


def micro_batch(step: int, micro: int, empty_rows: range) -> Batch:
    """ROWS rows of two packed samples and some padding; the rows of `empty_rows` are all padding."""
    random = torch.Generator().manual_seed(100 * step + micro)
    ids = torch.randint(0, 32, (ROWS, LENGTH), generator=random)
    segment = torch.zeros(ROWS, LENGTH, dtype=torch.int64)
    position = torch.zeros(ROWS, LENGTH, dtype=torch.int64)
    targets = torch.full((ROWS, LENGTH), -100)
    for row in range(ROWS):
        if row in empty_rows:
            continue
        first, used = 2 + (row + step) % 3, LENGTH - row % 2
        segment[row, :first], segment[row, first:used] = 1, 2
        position[row, :first], position[row, first:used] = torch.arange(first), torch.arange(used - first)
        targets[row, : first - 1] = ids[row, 1:first]
        targets[row, first : used - 1] = ids[row, first + 1 : used]
    token = torch.arange(ROWS * LENGTH).view(ROWS, LENGTH) + (step * MICRO_STEPS + micro) * ROWS * LENGTH
    return Batch(input_ids=ids, targets=targets, position_ids=position, segment_ids=segment, token_ids=token, task=torch.zeros_like(ids))


def recorded(batch: Batch, num_experts: int, top_k: int) -> Batch:
    """The batch with a routing for two layers, which nothing but the numbers of its tokens decides: half of the tokens have one expert
    alike, another one in each batch."""
    shape = *batch.input_ids.shape, 2
    first = int(batch.token_ids.max())
    random = torch.Generator().manual_seed(first)
    score = torch.rand(*shape, num_experts, generator=random)
    score[..., first % num_experts] += torch.randint(0, 2, shape, generator=random)
    return replace(batch, routed=score.argsort(-1, descending=True)[..., :top_k].to(torch.int16))


def rows_of(batch: Batch, rank: int, world: int) -> Batch:
    share = slice(rank * ROWS // world, (rank + 1) * ROWS // world)
    return Batch(**{name: part[share] for name in batch.__dataclass_fields__ if (part := getattr(batch, name)) is not None})


def step_of_rows(
    moe: MoeModel, head: LanguageModelHead, optimizer: ExpertOptimizer, number: int, *, rank: int, world: int, empty_rows: range
) -> StepResult:
    """A training step on this rank's rows."""
    batches = [micro_batch(number, micro, empty_rows) for micro in range(MICRO_STEPS)]
    return train_step(
        moe,
        head,
        optimizer,
        StepBatches(
            number=number,
            micro_batches=[rows_of(batch, rank, world) for batch in batches],
            num_labels=sum(int((b.targets != -100).sum()) for b in batches),
        ),
        StepRules(aux_coef=AUX_COEF, max_grad_norm=MAX_NORM),
    )


def topology(world: int) -> Topology:
    """Two nodes where there are ranks for two; so slow between them that hecate materializes only some experts."""
    nodes = tuple(rank * 2 // world if world > 1 else 0 for rank in range(world))
    return Topology(nodes, (1e9,) * world, (1e9,) * world, Link(1e9, 0.0), Link(3e7, 0.0))


def policies_at(world: int, number: int = 0) -> Sequence[str]:
    """A third of all policies, another one at each of 2 to 4 ranks and for each of three numbers. On one rank, all have the same plan."""
    return ("full",) if world == 1 else sorted(POLICIES)[(number + world) % 3 :: 3]


def random_planner(seed: int) -> Planner:
    """Any placement at all, a quarter of them everywhere, and mostly any quotas, in every layer and step, the same on every rank.

    A quota may leave an owner, or a replica where tokens are, without any; in the first step it is made for no loads in particular.
    """
    rng = np.random.default_rng(seed)

    def plan(given: PlanInput) -> Plan:
        shape = (*given.owner_LE.shape, given.topology.world_size)
        where_LED = given.owned_LED | (rng.random(shape) < rng.uniform(0, 4 / 3, size=(shape[0], 1, 1)))
        share_LED = where_LED * rng.random(shape) * (rng.random(shape) < 0.6)
        last_LED = where_LED & (np.cumsum(where_LED[..., ::-1], axis=-1)[..., ::-1] == 1)
        share_LED += np.where(share_LED.sum(-1, keepdims=True) > 0, 0.0, last_LED)
        quota_LED = given.expected_LED.sum(-1, keepdims=True) * share_LED / share_LED.sum(-1, keepdims=True)
        return Plan(given.owner_LE, where_LED, quota_LED if rng.random() < 0.8 else None)

    return plan


def plan_elsewhere(given: PlanInput) -> Plan:
    """Every expert everywhere, and all of its assignments served by the rank after its owner."""
    world = given.topology.world_size
    next_LED = (given.owner_LE[..., None] + 1) % world == np.arange(world)
    return Plan(given.owner_LE, np.ones(next_LED.shape, dtype=bool), given.expected_LED.sum(-1, keepdims=True) * next_LED)


def planner_of(policy: str) -> Planner:
    if policy.startswith("random "):
        return random_planner(int(policy.removeprefix("random ")))
    return plan_elsewhere if policy == "elsewhere" else POLICIES[policy]


def sharded(case: Case, world: int) -> tuple[MoeModel, LanguageModelHead]:
    model = tiny_llama(case.dtype)
    head = LanguageModelHead(model)
    # 8 experts of 10 kB: about 3 travel hidden behind 1e6 FLOPs, and each device has room for 2.
    config = EngineConfig(
        planner_of(case.policy),
        topology(world),
        memory_slots=2,
        top_k=case.top_k,
        non_moe_flops=1e6,
        plan=case.plan,
        rematerialize=case.rematerialize,
        prefetch=case.prefetch,
    )
    plan = InsertionPlan(
        kind=MIXLORA,
        experts_per_layer=(case.num_experts,) * 2,
        top_k=case.top_k,
        router=case.router,
        lora=case.lora,
        target_modules=case.targets,
        seed=5,
        kernels=case.kernels,
    )
    groups = expert_groups(make_mesh(world, case.shard_size))
    moe = insert_experts(model, find_gated_ffns(model), plan, config, groups)
    bias_routers(moe, router_bias(case))
    random = torch.Generator().manual_seed(11)
    for name, parameter in moe.replicated_parameters().items():
        if name.endswith(".B"):  # zero at the start, where half of the gradients vanish
            parameter.data.copy_(torch.randn(parameter.shape, generator=random, dtype=torch.float64) * 0.1)
    for (unit, expert), chunk in moe.engine.shards.named_parameters().items():
        chunk.data.copy_(initial_values(unit, expert, len(chunk)))
    if case.checkpointing:
        from hecate.model.layers.checkpointing import checkpoint_activations

        checkpoint_activations(moe)
    model.train()
    return moe, head


def initial_values(unit: Unit, expert: int, numel: int) -> torch.Tensor:
    """float64: the values that an expert's chunk, or a block of a pool, begins with, B included."""
    return torch.randn(numel, generator=torch.Generator().manual_seed(1000 + 50 * unit.layer + expert), dtype=torch.float64) * 0.2


def assert_groups_equal(moe: MoeModel, optimizer: ExpertOptimizer) -> None:
    """All sharding groups hold the same experts, moments and replicated parameters, bit for bit."""
    groups = moe.engine.shards.groups
    if groups.replicate is None:
        return
    for name, tensor in sorted(optimizer.state_tensors().items()):
        bits = tensor.detach().double().reshape(-1).contiguous().view(torch.int64)
        most = torch.stack([bits, ~bits])
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=groups.replicate)
        assert torch.equal(most[0], ~most[1]), f"the sharding groups differ in {name}"


def random_owners(moe: MoeModel, seed: int) -> dict[Unit, np.ndarray]:
    """Any owners of all experts and blocks of pools; with some seeds a rank owns nothing of a unit."""
    rng, shards = np.random.default_rng(seed), moe.engine.shards
    return {
        unit: rng.integers(0, rng.integers(1, shards.world_size + 1), size=chunked.num_experts) for unit, chunked in shards.chunked.items()
    }


@contextmanager
def calibrating_at_whim() -> Iterator[None]:
    """Any plan in place of any other, and layers planned from any loads, not only where that pays; the same on every rank."""
    whims = itertools.cycle((1.0, 0.0, 1.0, 1.0, 0.0))
    modes: Iterator[PlanMode] = itertools.cycle(("exact", "history", "calibrated", "history", "exact"))

    def choose(measured: MeasuredModes, _planner: object, given: PlanInput, *_others: object) -> list[PlanMode]:
        allowed = (mode for mode in modes if mode in measured._modes)
        return [next(allowed) for _ in range(given.num_layers)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hecate.parallel.plan.after_router.calibration_gain", lambda *_: next(whims))
        patch.setattr(MeasuredModes, "choose", choose)
        yield
        for thread in threading.enumerate():
            if thread.name == THREAD:  # it goes by these whims, and must not go on by those of the next case
                thread.join()
