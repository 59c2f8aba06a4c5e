"""The central test: training sharded over any ranks, under any policy, is the same computation as one process with plain autograd.

Each rank trains its share of a tiny random Llama for five AdamW steps, and trains the plain reference (tests/plain_mixlora.py) on
everything, from the same values. Then each compares: losses, gradient norms, every owned and replicated gradient, every parameter.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from hecate.data.batches import Batch
from hecate.engine import step_plans
from hecate.engine.step_plans import EngineConfig
from hecate.experts.router import TopKRouter
from hecate.kernels.backend import Backend
from hecate.model.causal_head import LanguageModelHead
from hecate.model.gated_ffn import find_gated_ffns
from hecate.model.insert import InsertionPlan, insert_experts
from hecate.model.moe_model import MoeModel
from hecate.optim.adamw import AdamW
from hecate.optim.optimizer import ExpertOptimizer, LearningRate, Trainables
from hecate.parallel.cost_model import LayerCost, PlanMode
from hecate.parallel.expert_kinds import MIXLORA, LoraShape
from hecate.parallel.mesh import make_mesh
from hecate.parallel.planners import POLICIES, Plan, PlanInput, Planner
from hecate.parallel.topology import Link, Topology
from hecate.parallel.units import Unit
from hecate.ranks.groups import expert_groups
from hecate.train.step import StepRules, train_step
from testing.ranks import run_ranks
from tests import plain_mixlora
from tests.hecate.watching import gradients_of, moments_of

EVERY_CASE = ("full", "hecate", "static_ep")
"""policies that go through every case: all replicas, some, none; the others' plans are of a kind with the random ones"""
SCENARIOS = ("balanced", "hot expert", "idle experts", "empty rank")
STEPS, MICRO_STEPS, ROWS, LENGTH = 5, 2, 12, 8
WEIGHT_DECAY, MAX_NORM, AUX_COEF = 0.1, 0.5, 0.05
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
# Adam divides a gradient by its own size, so rounding in an element that is nearly zero moves it by a share of the learning rate.
LEARNING_RATE = {torch.float64: 1e-2, torch.float32: 1e-3}


@dataclass(frozen=True)
class Case:
    policy: str
    num_experts: int
    top_k: int
    scenario: str
    dtype: torch.dtype = torch.float64
    checkpointing: bool = False
    plan: PlanMode = "history"
    rematerialize: bool = False
    prefetch: int = 1
    kernels: Backend = "torch"
    steps: int = STEPS
    shard_size: int | None = None


def router_bias(case: Case) -> torch.Tensor:
    """Added to the router's logits, so that a scenario happens whatever the random router says."""
    bias = torch.zeros(case.num_experts, dtype=torch.float64)
    if case.scenario == "hot expert":
        bias[0] = 6.0
    if case.scenario == "idle experts":
        bias[case.top_k :: 2] = -1e4
    return bias.to(case.dtype)


def bias_routers(moe: MoeModel, bias: torch.Tensor) -> None:
    for layer in moe.layers.values():
        router = layer.router
        assert isinstance(router, TopKRouter)

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


def rows_of(batch: Batch, rank: int, world: int) -> Batch:
    share = slice(rank * ROWS // world, (rank + 1) * ROWS // world)
    return Batch(**{name: getattr(batch, name)[share] for name in batch.__dataclass_fields__})


def topology(world: int) -> Topology:
    """Two nodes where there are ranks for two; so slow between them that hecate materializes only some experts."""
    nodes = tuple(rank * 2 // world if world > 1 else 0 for rank in range(world))
    return Topology(nodes, (1e9,) * world, (1e9,) * world, Link(1e9, 0.0), Link(3e7, 0.0))


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
    lora = LoraShape(rank=3, scale=0.7, dropout=0.0)
    plan = InsertionPlan(
        kind=MIXLORA,
        experts_per_layer=(case.num_experts,) * 2,
        top_k=case.top_k,
        lora=lora,
        target_modules=TARGETS,
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
        layer = unit.layer
        values = torch.Generator().manual_seed(1000 + 50 * layer + expert)
        chunk.data.copy_(torch.randn(chunk.shape, generator=values, dtype=torch.float64) * 0.2)
    if case.checkpointing:
        from hecate.model.checkpointing import checkpoint_activations

        checkpoint_activations(moe)
    model.train()
    return moe, head


class Reference:
    """The plain model with the same values, and its own optimizer."""

    def __init__(self, case: Case, moe: MoeModel) -> None:
        self.model = tiny_llama(case.dtype).requires_grad_(False)
        self.layers: list[plain_mixlora.PlainMixlora] = []
        self.chunks: dict[tuple[int, int], list[torch.Tensor]] = {}
        self.replicated: dict[str, torch.Tensor] = {}
        specs = moe.engine.shards.families[Unit(0)].layout().trainable
        values = moe.replicated_parameters()
        for index, layer in enumerate(self.model.model.layers):
            experts = []
            for expert in range(case.num_experts):
                random = torch.Generator().manual_seed(1000 + 50 * index + expert)
                flat = (torch.randn(sum(s.numel for s in specs), generator=random, dtype=torch.float64) * 0.2).to(case.dtype)
                parts = flat.split([s.numel for s in specs])
                experts.append({s.name: part.view(s.shape) for s, part in zip(specs, parts, strict=True)})
            router = values[f"layers.{index}.router"].detach()
            layer.mlp = plain_mixlora.PlainMixlora(layer.mlp, router, router_bias(case), experts, 0.7, case.top_k, logit_scale=50)
            self.layers.append(layer.mlp)
            self.replicated[f"layers.{index}.router"] = layer.mlp.router
            for expert in range(case.num_experts):
                names = [s.name.replace(".", "_") for s in specs]
                self.chunks[index, expert] = [layer.mlp.experts[expert][name] for name in names]
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                key = f"layers.{index}.self_attn.{name}"
                a, b = values[f"{key}.A"].detach(), values[f"{key}.B"].detach()
                lora = plain_mixlora.PlainLora(getattr(layer.self_attn, name), a, b, 0.7)
                setattr(layer.self_attn, name, lora)
                self.replicated[f"{key}.A"], self.replicated[f"{key}.B"] = lora.a, lora.b
        parameters = [p for parts in self.chunks.values() for p in parts] + list(self.replicated.values())
        self.parameters = parameters
        self.optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE[case.dtype], weight_decay=WEIGHT_DECAY)

    def gradients(self, step: int, empty_rows: range) -> tuple[float, float, set[tuple[int, int]]]:
        """(cross-entropy, gradient norm, idle experts); gradients of idle experts are None."""
        batches = [micro_batch(step, micro, empty_rows) for micro in range(MICRO_STEPS)]
        num_labels = sum(int((b.targets != -100).sum()) for b in batches)
        total, reached = 0.0, set()
        for batch in batches:
            loss, cross = plain_mixlora.plain_loss(self.model, self.layers, batch, num_labels, MICRO_STEPS, AUX_COEF)
            loss.backward()
            total += cross
            for index, layer in enumerate(self.layers):
                assert layer.expert_TK is not None
                reached |= {(index, int(e)) for e in layer.expert_TK.unique()}
        idle = set(self.chunks) - reached
        for key in idle:
            for parameter in self.chunks[key]:
                parameter.grad = None
        return total, plain_mixlora.clip(self.parameters, MAX_NORM), idle

    def flat(self, key: tuple[int, int], *, grad: bool) -> torch.Tensor | None:
        parts = [p.grad if grad else p.detach() for p in self.chunks[key]]
        return None if any(p is None for p in parts) else torch.cat([p.flatten() for p in parts if p is not None])


def _distance(name: str, got: torch.Tensor | None, wanted: torch.Tensor | None, tolerance: float) -> None:
    assert (got is None) == (wanted is None), f"{name}: gradient {'missing' if got is None else 'not expected'}"
    if got is not None and wanted is not None:
        error = float((got - wanted).abs().max() / wanted.abs().max().clamp(min=1.0)) if got.numel() else 0.0
        assert error <= tolerance, f"{name}: off by {error:.2e}"


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


def check_case(rank: int, world: int, case: Case) -> None:
    tolerance = TOLERANCE[case.dtype]
    moe, head = sharded(case, world)
    reference = Reference(case, moe)
    owned = {f"{unit}.{expert}": p for (unit, expert), p in moe.engine.shards.named_parameters().items()}
    optimizer = ExpertOptimizer(
        Trainables(owned, moe.replicated_parameters()),
        AdamW(weight_decay=WEIGHT_DECAY),
        LearningRate(LEARNING_RATE[case.dtype]),
        torch.device("cpu"),
    )
    empty_rows = range((world - 1) * ROWS // world, ROWS) if case.scenario == "empty rank" and world > 1 else range(0)
    seen = gradients_of(optimizer)
    calibrations = 0
    for step in range(case.steps):
        before = {name: p.detach().clone() for name, p in owned.items()}
        moments = {name: moments_of(optimizer, name) for name in owned}
        batches = [micro_batch(step, micro, empty_rows) for micro in range(MICRO_STEPS)]
        result = train_step(
            moe,
            head,
            optimizer,
            [rows_of(batch, rank, world) for batch in batches],
            num_labels=sum(int((b.targets != -100).sum()) for b in batches),
            step=step,
            rules=StepRules(aux_coef=AUX_COEF, max_grad_norm=MAX_NORM),
        )
        calibrations += moe.engine.shards.plans.calibrations
        loss, norm, idle = reference.gradients(step, empty_rows)
        assert abs(result.loss - loss) <= tolerance * max(1, abs(loss)), f"step {step}: loss {result.loss} against {loss}"
        assert abs(result.grad_norm - norm) <= tolerance * max(1, norm), f"step {step}: norm {result.grad_norm} against {norm}"
        for unit, expert in moe.engine.shards.named_parameters():
            layer = unit.layer
            _distance(
                f"step {step}, expert {layer}.{expert}", seen[f"{layer}.{expert}"], reference.flat((layer, expert), grad=True), tolerance
            )
        for name, parameter in reference.replicated.items():
            _distance(f"step {step}, {name}", seen[name], parameter.grad, tolerance)
        reference.optimizer.step()
        reference.optimizer.zero_grad()
        for (unit, expert), parameter in moe.engine.shards.named_parameters().items():
            layer = unit.layer
            name = f"{layer}.{expert}"
            _distance(f"step {step}, expert {name} after", parameter.detach(), reference.flat((layer, expert), grad=False), tolerance)
            if (layer, expert) in idle:
                assert torch.equal(parameter.detach(), before[name]), f"idle expert {name} moved"
                after = moments_of(optimizer, name)
                assert after.keys() == moments[name].keys(), f"idle expert {name} got moments"
                assert all(torch.equal(after[key], moments[name][key]) for key in after), f"moments of idle expert {name} moved"
        for name, parameter in moe.replicated_parameters().items():
            _distance(f"step {step}, {name} after", parameter.detach(), reference.replicated[name].detach(), tolerance)
        assert_groups_equal(moe, optimizer)
    if case.policy == "elsewhere" and world > 1:
        assert moe.engine.shards.bytes_sent > sum(store.bytes_sent for store in moe.engine.shards.stores.values()), "no token left its rank"
    assert (0 < calibrations < case.steps * MICRO_STEPS * 2) == (case.plan == "calibrated"), calibrations
    if case.scenario == "idle experts" and case.num_experts > case.top_k:
        assert idle, "the scenario did not leave any expert idle"


@contextmanager
def calibrating_at_whim() -> Iterator[None]:
    """Any plan in place of any other, not only where that pays; the same on every rank."""
    whims = itertools.cycle((1.0, 0.0, 1.0, 1.0, 0.0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_plans, "calibration_gain", lambda *_: next(whims))
        yield


def _check_cases(rank: int, world: int, cases: list[Case]) -> None:
    for case in cases:
        try:
            with calibrating_at_whim():
                check_case(rank, world, case)
        except BaseException as error:
            raise AssertionError(f"{case}: {error}") from error


def cases_of(policy: str, dtype: torch.dtype) -> list[Case]:
    return [Case(policy, e, k, scenario, dtype) for e, k, scenario in itertools.product((3, 8), (1, 2), SCENARIOS)]


SLOW_3, SLOW_4 = (pytest.param(world, marks=pytest.mark.slow) for world in (3, 4))


@pytest.mark.parametrize("world", [1, 2, SLOW_3, 4])
@pytest.mark.parametrize("policy", EVERY_CASE)
def test_sharded_training_equals_one_process_in_fp64(policy: str, world: int) -> None:
    run_ranks(world, _check_cases, cases_of(policy, torch.float64), timeout=240)


@pytest.mark.parametrize("world", [1, 2, SLOW_3, 4])
def test_sharded_training_equals_one_process_in_fp32(world: int) -> None:
    cases = [Case(policy, 8, 2, scenario, torch.float32) for policy in EVERY_CASE for scenario in SCENARIOS]
    run_ranks(world, _check_cases, cases, timeout=240)


@pytest.mark.parametrize(("world", "shard_size"), [(2, 1), pytest.param(4, 1, marks=pytest.mark.slow), (4, 2)])
def test_sharding_groups_smaller_than_the_world_equal_one_process(world: int, shard_size: int) -> None:
    """Each group plans for itself; with an empty rank, and at 4 ranks in groups of 1, a whole group has no tokens."""
    cases = [Case(policy, 8, 2, scenario) for policy, scenario in zip(("full", "hecate", "static_ep", "auto"), SCENARIOS, strict=True)]
    cases += [
        Case("random 7", 3, 1, "idle experts"),
        Case("hecate", 8, 2, "empty rank", rematerialize=True, checkpointing=True),
        Case("llep", 8, 2, "hot expert", plan="exact", prefetch=0),
        Case("hecate", 8, 2, "idle experts", torch.float32),
    ]
    if shard_size > 1:
        cases += [Case("random 5", 8, 2, "hot expert", plan="calibrated"), Case("elsewhere", 3, 1, "empty rank", torch.float32)]
    run_ranks(world, _check_cases, [replace(case, shard_size=shard_size) for case in cases], timeout=240)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_activation_checkpointing_changes_nothing(world: int) -> None:
    cases = [Case(policy, 8, 2, "empty rank", checkpointing=True) for policy in EVERY_CASE]
    run_ranks(world, _check_cases, cases, timeout=240)


@pytest.mark.parametrize("world", [1, 3, SLOW_4])
def test_whenever_replicas_come_and_go_it_equals_one_process(world: int) -> None:
    cases = [
        Case("hecate", 8, 2, "hot expert", rematerialize=True),
        Case("full", 8, 2, "idle experts", rematerialize=True, prefetch=2, checkpointing=True),
        Case("llep", 8, 2, "idle experts", plan="exact"),
        Case("random 3", 3, 1, "empty rank", plan="exact", rematerialize=True, prefetch=0, checkpointing=True),
        Case("random 5", 8, 2, "empty rank", plan="calibrated", checkpointing=True),
        Case("random 6", 8, 2, "hot expert", plan="calibrated", rematerialize=True, prefetch=2),
        Case("random 8", 8, 2, "empty rank", prefetch=0),
    ]
    run_ranks(world, _check_cases, cases[:5] if world == 1 else cases, timeout=240)


@pytest.mark.parametrize("world", [1, 2])
def test_whatever_computes_the_experts_it_equals_one_process(world: int) -> None:
    """Triton's kernels are interpreted. They save views of the replicas, whose memory comes and goes under `rematerialize`."""
    alone = Case("full", 3, 2, "idle experts", torch.float32, kernels="triton", steps=1)
    cases = [alone if world == 1 else replace(alone, policy="hecate", scenario="empty rank", rematerialize=True, steps=2)]
    cases += [Case("hecate", 3, 2, "empty rank", torch.float32, kernels="reference", steps=2)]
    run_ranks(world, _check_cases, cases, timeout=240)


@pytest.mark.parametrize("world", [3, SLOW_4])
def test_every_other_policy_equals_one_process(world: int) -> None:
    cases = []
    for policy in sorted(set(POLICIES) - set(EVERY_CASE)):
        cases += [Case(policy, 8, 2, "hot expert", checkpointing=True), Case(policy, 3, 1, "empty rank")]
    run_ranks(world, _check_cases, cases, timeout=480)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_tokens_may_all_be_served_elsewhere_though_their_experts_are_here(world: int) -> None:
    cases = [Case("elsewhere", 8, 2, "idle experts", checkpointing=True), Case("elsewhere", 3, 1, "empty rank", torch.float32)]
    run_ranks(world, _check_cases, cases, timeout=240)


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    world=st.integers(2, 4), experts=st.integers(1, 9), k=st.integers(1, 3), scenario=st.sampled_from(SCENARIOS), seed=st.integers(0, 10**6)
)
def test_any_placement_and_quotas_equal_one_process(world: int, experts: int, k: int, scenario: str, seed: int) -> None:
    run_ranks(world, _check_cases, [Case(f"random {seed}", experts, min(k, experts), scenario)], timeout=120)


def test_the_tiny_topology_makes_hecate_materialize_some_experts_and_not_all() -> None:
    """Otherwise the suite would test two policies and call them three."""
    cost = LayerCost(trainable_bytes=10_000.0, non_moe_flops=1e6)
    given_ = PlanInput(np.repeat(np.arange(4), 2)[None], None, topology(4), cost, np.full(4, 2))
    where_ED = POLICIES["hecate"](given_).where_LED[0]
    assert 8 < where_ED.sum() < 32


def test_random_plans_leave_owners_and_tokens_where_they_are_without_service() -> None:
    """Otherwise the suite would test no more than topology-aware dispatch does."""
    cost = LayerCost(trainable_bytes=10_000.0)
    random = np.random.default_rng(0)
    found = {"no quotas": 0, "idle owner": 0, "everywhere, served elsewhere": 0}
    for seed in range(20):
        plan = random_planner(seed)
        for loads_LED in (None, random.integers(0, 9, size=(2, 8, 4)).astype(float)):
            given_ = PlanInput(np.tile(np.repeat(np.arange(4), 2), (2, 1)), loads_LED, topology(4), cost, np.full(4, 2))
            made = plan(given_)
            if made.quota_LED is None:
                found["no quotas"] += 1
                continue
            np.testing.assert_allclose(made.quota_LED.sum(-1), given_.expected_LED.sum(-1))
            assert not made.quota_LED[~made.where_LED].any()
            found["idle owner"] += int((made.quota_LED[given_.owned_LED] == 0).sum())
            not_at_home = (made.quota_LED == 0) & (given_.expected_LED > 0)
            found["everywhere, served elsewhere"] += int(not_at_home[made.where_LED.all((1, 2))].sum())
    assert min(found.values()) >= 5, found
