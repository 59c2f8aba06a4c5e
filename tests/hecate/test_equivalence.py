"""The central test: training sharded over any ranks, under any policy, is the same computation as one process with plain autograd.

Each rank trains its share of a tiny random Llama for three AdamW steps, and trains the plain reference (tests/plain_mixlora.py) on
everything, from the same values. Then each compares: losses, gradient norms, every owned and replicated gradient, every parameter.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hecate.data.batches import Batch
from hecate.experts.pairs.source_table import trains_a
from hecate.experts.pairs.sources.nola import Nola
from hecate.experts.pairs.sources.shards import ShardPairs
from hecate.model.moe_model import MoeModel
from hecate.optim.adamw import AdamW
from hecate.optim.optimizer import ExpertOptimizer, LearningRate, Trainables
from hecate.parallel.cost.cost_model import LayerCost
from hecate.parallel.plan.measured_modes import modes_of
from hecate.parallel.planners import POLICIES, PlanInput
from hecate.parallel.values.units import Unit
from hecate.train.extensions.replayed_routing import ReplayedRouting
from hecate.train.steps.step import StepBatches, StepRules, train_step
from testing.ranks import run_ranks
from tests import plain_mixlora
from tests.hecate.equivalence_cases import (
    AUX_COEF,
    LEARNING_RATE,
    MAX_NORM,
    MICRO_STEPS,
    ROWS,
    WEIGHT_DECAY,
    Case,
    assert_groups_equal,
    calibrating_at_whim,
    initial_values,
    micro_batch,
    policies_at,
    random_planner,
    recorded,
    router_bias,
    rows_of,
    sharded,
    tiny_llama,
    topology,
)
from tests.hecate.watching import gradients_of, moments_of
from tests.plain_allora import row_norm_product
from tests.plain_mos import PlainPool

EVERY_CASE = ("full", "hecate_paper", "static_ep")
"""policies that go through every case: all replicas, some, none; the others' plans are of a kind with the random ones"""
SCENARIOS = ("balanced", "hot expert", "idle experts", "empty rank")
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


class Reference:
    """The plain model with the same values, and its own optimizer."""

    def __init__(self, case: Case, moe: MoeModel) -> None:
        self.case = case
        self.model = tiny_llama(case.dtype).requires_grad_(False)
        self.layers: list[plain_mixlora.PlainMixlora] = []
        self.chunks: dict[str, list[torch.Tensor]] = {}
        self.pool, pair_of = plain_pool(moe, case)
        """in which all experts train; None: each trains its chunk"""
        trained_in_pool = [] if self.pool is None else list(self.pool.shards.values())
        self.replicated: dict[str, torch.Tensor] = {}
        specs = moe.engine.shards.families[Unit(0)].layout().trainable
        values = moe.replicated_parameters()
        lora = case.lora
        of = plain_mixlora.product if lora.eta is None else partial(row_norm_product, eta=lora.eta)
        for index, layer in enumerate(self.model.model.layers):
            experts = []
            for expert in range(case.num_experts):
                flat = initial_values(Unit(index), expert, sum(s.numel for s in specs)).to(case.dtype)
                parts = flat.split([s.numel for s in specs])
                experts.append({s.name: part.view(s.shape) for s, part in zip(specs, parts, strict=True)})
            router = values[f"layers.{index}.router"].detach()
            fixed = fixed_of(moe, Unit(index), case)
            layer.mlp = plain_mixlora.PlainMixlora(
                layer.mlp,
                router,
                router_bias(case),
                experts,
                lora.scale,
                case.top_k,
                logit_scale=50,
                of=of,
                fixed=fixed,
                pair_of=pair_of.get(Unit(index)),
            )
            self.layers.append(layer.mlp)
            self.replicated[f"layers.{index}.router"] = layer.mlp.router
            for expert in range(case.num_experts):
                names = [s.name.replace(".", "_") for s in specs]
                self.chunks[f"{index}.{expert}"] = [layer.mlp.experts[expert][name] for name in names]
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                key = f"layers.{index}.self_attn.{name}"
                a, b = moe.attention[index, f"self_attn.{name}"].lora_A.detach(), values[f"{key}.B"].detach()
                plain = plain_mixlora.PlainLora(getattr(layer.self_attn, name), a, b, lora.scale, of=of, trains_a=trains_a(lora))
                setattr(layer.self_attn, name, plain)
                self.replicated |= {f"{key}.A": plain.a, f"{key}.B": plain.b} if trains_a(lora) else {f"{key}.B": plain.b}
        parameters = [p for each in self.chunks.values() for p in each] + list(self.replicated.values()) + trained_in_pool
        self.parameters = parameters
        self.optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)

    def gradients(self, step: int, empty_rows: range) -> tuple[float, float, set[str]]:
        """(cross-entropy, gradient norm, idle experts); gradients of idle experts are None."""
        batches = micro_batches(self.case, step, empty_rows)
        num_labels = sum(int((b.targets != -100).sum()) for b in batches)
        total, reached = 0.0, set()
        for batch in batches:
            loss, cross = plain_mixlora.plain_loss(self.model, self.layers, batch, num_labels, MICRO_STEPS, AUX_COEF)
            loss.backward()
            total += cross
            for index, layer in enumerate(self.layers):
                assert layer.expert_TK is not None
                reached |= {f"{index}.{int(e)}" for e in layer.expert_TK.unique()}
        idle = set(self.chunks) - reached
        for key in idle:
            for parameter in self.chunks[key]:
                parameter.grad = None
        return total, plain_mixlora.clip(self.parameters, MAX_NORM), idle

    def flat(self, name: str, *, grad: bool) -> torch.Tensor | None:
        if ".pool." in name:
            assert self.pool is not None
            return self.pool.block(int(name.rpartition(".")[2]), grad=grad)
        parts = [p.grad if grad else p.detach() for p in self.chunks[name]]
        if not parts:  # an empty chunk never has a gradient
            return None if grad else torch.empty(0)
        return None if any(p is None for p in parts) else torch.cat([p.flatten() for p in parts if p is not None])


def plain_pool(moe: MoeModel, case: Case) -> tuple[PlainPool | None, dict[Unit, Callable[[int, str], tuple[torch.Tensor, torch.Tensor]]]]:
    """The pool with the values that `sharded` gives its blocks, and what makes each unit's pairs of it. Only values are handed over."""
    shards = moe.engine.shards
    if not shards.pools:
        return None, {}
    (pool,) = shards.pools.values()
    specs = pool.layout().trainable
    blocks_NC = torch.stack([initial_values(pool.unit, block, pool.layout().trainable_numel) for block in range(pool.num_experts)])
    plain = PlainPool(blocks_NC.to(case.dtype), [(spec.name, *spec.shape) for spec in specs], case.lora.shards.per_vector)

    def pair_of(source: ShardPairs) -> Callable[[int, str], tuple[torch.Tensor, torch.Tensor]]:
        return lambda expert, name: plain.pair(name, {spec.name: source.index(spec.name)[expert] for spec in specs}, case.lora.rank)

    found = {}
    for unit, family in shards.families.items():
        source = family.pair_source
        assert isinstance(source, ShardPairs)
        found[unit] = pair_of(source)
    return plain, found


def fixed_of(moe: MoeModel, unit: Unit, case: Case) -> dict[str, torch.Tensor]:
    """What all experts of a unit have alike and do not train. Only values are handed to the reference."""
    source = moe.engine.shards.families[unit].pair_source
    if isinstance(source, Nola):
        return source.drawn
    if trains_a(case.lora):
        return {}
    pairs = source.stacked(torch.zeros(1, source.sizes.trained_numel, dtype=case.dtype), torch.arange(1))
    return {f"{name}.A": of.a_SrI[0] for name, of in pairs.items()}


def _distance(name: str, got: torch.Tensor | None, wanted: torch.Tensor | None, tolerance: float) -> None:
    assert (got is None) == (wanted is None), f"{name}: gradient {'missing' if got is None else 'not expected'}"
    if got is not None and wanted is not None:
        error = float((got - wanted).abs().max() / wanted.abs().max().clamp(min=1.0)) if got.numel() else 0.0
        assert error <= tolerance, f"{name}: off by {error:.2e}"


def micro_batches(case: Case, step: int, empty_rows: range) -> list[Batch]:
    batches = [micro_batch(step, micro, empty_rows) for micro in range(MICRO_STEPS)]
    return batches if case.replay is None else [recorded(batch, case.num_experts, case.top_k) for batch in batches]


def check_case(rank: int, world: int, case: Case) -> None:
    tolerance = TOLERANCE[case.dtype]
    moe, head = sharded(case, world)
    reference = Reference(case, moe)
    owned = {f"{unit}.{expert}": p for (unit, expert), p in moe.engine.shards.named_parameters().items()}
    optimizer = ExpertOptimizer(
        Trainables(owned, moe.replicated_parameters()),
        AdamW(weight_decay=WEIGHT_DECAY),
        LearningRate(LEARNING_RATE),
        torch.device("cpu"),
    )
    empty_rows = range((world - 1) * ROWS // world, ROWS) if case.scenario == "empty rank" and world > 1 else range(0)
    seen = gradients_of(optimizer)
    calibrations, modes = 0, set()
    for step in range(case.steps):
        before = {name: p.detach().clone() for name, p in owned.items()}
        moments = {name: moments_of(optimizer, name) for name in owned}
        batches = micro_batches(case, step, empty_rows)
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
            [*([] if case.replay is None else [ReplayedRouting(case.replay, moe.engine.shards.device)])],
        )
        calibrations += moe.engine.shards.plans.calibrations
        modes |= set(moe.engine.shards.plans.chosen_modes.values())
        loss, norm, idle = reference.gradients(step, empty_rows)
        assert abs(result.loss - loss) <= tolerance * max(1, abs(loss)), f"step {step}: loss {result.loss} against {loss}"
        assert abs(result.grad_norm - norm) <= tolerance * max(1, norm), f"step {step}: norm {result.grad_norm} against {norm}"
        for name in owned:
            _distance(f"step {step}, expert {name}", seen[name], reference.flat(name, grad=True), tolerance)
        for name, parameter in reference.replicated.items():
            _distance(f"step {step}, {name}", seen[name], parameter.grad, tolerance)
        reference.optimizer.step()
        reference.optimizer.zero_grad()
        for name, parameter in owned.items():
            _distance(f"step {step}, expert {name} after", parameter.detach(), reference.flat(name, grad=False), tolerance)
            if name in idle:
                assert torch.equal(parameter.detach(), before[name]), f"idle expert {name} moved"
                after = moments_of(optimizer, name)
                assert after.keys() == moments[name].keys(), f"idle expert {name} got moments"
                assert all(torch.equal(after[key], moments[name][key]) for key in after), f"moments of idle expert {name} moved"
        for name, parameter in moe.replicated_parameters().items():
            _distance(f"step {step}, {name} after", parameter.detach(), reference.replicated[name].detach(), tolerance)
        assert_groups_equal(moe, optimizer)
    if case.policy == "elsewhere" and world > 1:
        assert moe.engine.shards.bytes_sent > sum(store.bytes_sent for store in moe.engine.shards.stores.values()), "no token left its rank"
    allowed = modes_of(case.plan, case.prefetch)
    chooses = len(allowed) > 1
    calibrating = case.plan == "calibrated" or (chooses and case.steps > 2)
    assert (0 < calibrations < case.steps * MICRO_STEPS * 2) == calibrating, calibrations
    assert modes <= set(allowed), modes
    assert (len(modes) > 1) == chooses, modes
    if case.scenario == "idle experts" and case.num_experts > case.top_k:
        assert idle, "the scenario did not leave any expert idle"


def _check_cases(rank: int, world: int, cases: list[Case]) -> None:
    for case in cases:
        try:
            with calibrating_at_whim():
                check_case(rank, world, case)
        except BaseException as error:
            raise AssertionError(f"{case}: {error}") from error


def cases_of(policy: str, sizes: Iterable[tuple[int, int]]) -> list[Case]:
    """Args: sizes: numbers of experts, and of those of a token."""
    return [Case(policy, experts, top_k, scenario) for (experts, top_k), scenario in itertools.product(sizes, SCENARIOS)]


SLOW_1, SLOW_2, SLOW_3, SLOW_4 = (pytest.param(world, marks=pytest.mark.slow) for world in (1, 2, 3, 4))


QUICK = (("full", 2, ((3, 1),)), ("hecate_paper", 3, ((8, 2),)))
"""of every policy, world size and number of experts, those that are not left to the slow tests"""
SIZES = ((3, 1),), ((8, 2),), ((3, 2), (8, 1))


@pytest.mark.parametrize(
    ("policy", "world", "sizes"),
    [pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow) for case in itertools.product(EVERY_CASE, (1, 2, 3, 4), SIZES)],
    ids=str,
)
def test_sharded_training_equals_one_process_in_fp64(policy: str, world: int, sizes: Iterable[tuple[int, int]]) -> None:
    run_ranks(world, _check_cases, cases_of(policy, sizes), timeout=240)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_sharded_training_equals_one_process_in_fp32(world: int) -> None:
    cases = [Case(policy, 8, 2, scenario, torch.float32) for policy in EVERY_CASE for scenario in SCENARIOS]
    run_ranks(world, _check_cases, cases, timeout=240)


@pytest.mark.parametrize(
    ("world", "shard_size"), [pytest.param(2, 1, marks=pytest.mark.slow), pytest.param(4, 1, marks=pytest.mark.slow), (4, 2)]
)
def test_sharding_groups_smaller_than_the_world_equal_one_process(world: int, shard_size: int) -> None:
    """Each group plans for itself; with an empty rank, and at 4 ranks in groups of 1, a whole group has no tokens."""
    cases = [
        Case(policy, 8, 2, scenario) for policy, scenario in zip(("full", "hecate_paper", "static_ep", "auto"), SCENARIOS, strict=True)
    ]
    run_ranks(world, _check_cases, [replace(case, shard_size=shard_size) for case in cases], timeout=240)


@pytest.mark.slow
@pytest.mark.parametrize(("world", "shard_size"), [(2, 1), (4, 1), (4, 2)])
def test_whenever_replicas_of_sharding_groups_come_and_go_they_equal_one_process(world: int, shard_size: int) -> None:
    cases = [
        Case("random 7", 3, 1, "idle experts"),
        Case("hecate_paper", 8, 2, "empty rank", rematerialize=True, checkpointing=True),
        Case("llep", 8, 2, "hot expert", plan="exact", prefetch=0),
        Case("hecate_paper", 8, 2, "idle experts", torch.float32),
    ]
    run_ranks(world, _check_cases, [replace(case, shard_size=shard_size) for case in cases], timeout=240)


@pytest.mark.slow
def test_sharding_groups_calibrate_and_choose_when_they_plan() -> None:
    cases = [Case("random 5", 8, 2, "hot expert", plan="calibrated"), Case("elsewhere", 3, 1, "empty rank", torch.float32)]
    cases += [Case("random 9", 8, 2, "empty rank", plan="auto")]
    run_ranks(4, _check_cases, [replace(case, shard_size=2) for case in cases], timeout=240)


@pytest.mark.parametrize("world", [SLOW_1, SLOW_2, 3])
def test_activation_checkpointing_changes_nothing(world: int) -> None:
    cases = [Case(policy, 8, 2, "empty rank", checkpointing=True) for policy in EVERY_CASE]
    run_ranks(world, _check_cases, cases, timeout=240)


@pytest.mark.parametrize("world", [SLOW_1, 3, SLOW_4])
def test_whenever_replicas_come_and_go_it_equals_one_process(world: int) -> None:
    cases = [
        Case("hecate_paper", 8, 2, "hot expert", rematerialize=True),
        Case("full", 8, 2, "idle experts", rematerialize=True, prefetch=2, checkpointing=True),
        Case("llep", 8, 2, "idle experts", plan="exact"),
        Case("random 3", 3, 1, "empty rank", plan="exact", rematerialize=True, prefetch=0, checkpointing=True),
        Case("random 5", 8, 2, "empty rank", plan="calibrated", checkpointing=True),
        Case("random 6", 8, 2, "hot expert", plan="calibrated", rematerialize=True, prefetch=2),
        Case("random 8", 8, 2, "empty rank", prefetch=0),
        Case("random 9", 8, 2, "idle experts", plan="auto", checkpointing=True),
        Case("hecate_paper", 8, 2, "hot expert", plan="auto", rematerialize=True, prefetch=2, checkpointing=True),
    ]
    run_ranks(world, _check_cases, cases[:5] if world == 1 else cases, timeout=240)


@pytest.mark.parametrize("world", [SLOW_1, 2])
def test_whatever_computes_the_experts_it_equals_one_process(world: int) -> None:
    """Triton's kernels are interpreted. They save views of the replicas, whose memory comes and goes under `rematerialize`."""
    alone = Case("full", 3, 2, "idle experts", torch.float32, kernels="triton", steps=1)
    cases = [alone if world == 1 else replace(alone, policy="hecate_paper", scenario="empty rank", rematerialize=True, steps=2)]
    cases += [Case("hecate_paper", 3, 2, "empty rank", torch.float32, kernels="reference", steps=2)]
    run_ranks(world, _check_cases, cases, timeout=240)


@pytest.mark.parametrize("world", [1, 2, SLOW_3, SLOW_4])
def test_training_with_forced_routing_equals_one_process_that_is_forced_alike(world: int) -> None:
    """Planned ahead from the routing, or from the loads of the steps before."""
    cases = [
        Case("llep", 8, 2, "empty rank", plan="replay"),
        Case("random 3", 3, 1, "balanced", plan="replay", rematerialize=True, prefetch=0, checkpointing=True),
        Case("hecate_paper", 8, 2, "empty rank", plan="replay", rematerialize=True, prefetch=2),
        Case("hecate_paper", 8, 2, "balanced", checkpointing=True),
        Case("random 5", 8, 2, "balanced", plan="exact"),
    ]
    more = [Case(policy, 8, 2, "balanced", plan="replay") for policy in policies_at(world)] if world > 2 else []
    if world == 4:
        more += [Case("hecate_paper", 8, 2, "empty rank", plan="replay", shard_size=2)]
    run_ranks(world, _check_cases, [replace(case, replay="force") for case in (cases[:2] if world == 1 else cases) + more], timeout=480)


SYSTEMS = ({"pairs": "fixed_a"}, {"eta": 1.5}, {"pairs": "fixed_a", "eta": 1.5}, {"pairs": "nola"}, {"pairs": "shards"})
"""FFA-LoRA, ALLoRA, both at once, NOLA, and MoS"""


def with_system(case: Case, system: dict[str, Any]) -> Case:
    """A pool lives a whole step, however replicas come and go otherwise."""
    return replace(case, **system, **({"plan": "history", "rematerialize": False} if system.get("pairs") == "shards" else {}))


def test_with_other_pairs_and_with_a_gradient_rule_it_equals_one_process() -> None:
    """Norms are those of a replica, whichever rank has it, whenever it comes and goes, and however many micro-steps there are."""
    case = Case("hecate_paper", 8, 2, "idle experts", rematerialize=True, checkpointing=True, steps=2)
    run_ranks(2, _check_cases, [with_system(case, system) for system in SYSTEMS], timeout=240)


@pytest.mark.parametrize("world", [SLOW_1, SLOW_2, SLOW_3, SLOW_4])
@pytest.mark.parametrize("system", SYSTEMS, ids=str)
def test_under_every_policy_these_systems_equal_one_process(system: dict[str, Any], world: int) -> None:
    """Each policy is that of every system at one of 2 to 4 ranks."""
    policies = policies_at(world, SYSTEMS.index(system))
    cases = [Case(policy, 8, 2, scenario) for policy, scenario in zip(policies, itertools.cycle(SCENARIOS), strict=False)]
    cases += [
        Case("static_ep", 3, 1, "empty rank"),
        Case("random 5", 8, 2, "balanced", plan="calibrated"),
        Case("llep", 8, 2, "hot expert", plan="exact", rematerialize=True, prefetch=0),
        Case("auto", 8, 2, "hot expert", kernels="reference", steps=2),
        Case("hecate_paper", 3, 2, "idle experts", torch.float32, kernels="triton", steps=2, rematerialize=True),
    ]
    cases += [Case("hecate_paper", 8, 2, "idle experts", shard_size=2)] if world == 4 else []
    run_ranks(world, _check_cases, [with_system(case, system) for case in cases], timeout=480)


@pytest.mark.parametrize(
    ("world", "like"),
    [
        (3, Case("", 8, 2, "hot expert", checkpointing=True)),
        pytest.param(3, Case("", 3, 1, "empty rank"), marks=pytest.mark.slow),
        pytest.param(4, Case("", 8, 2, "hot expert", checkpointing=True), marks=pytest.mark.slow),
        pytest.param(4, Case("", 3, 1, "empty rank"), marks=pytest.mark.slow),
    ],
    ids=("3 ranks", "3 ranks of few experts", "4 ranks", "4 ranks of few experts"),
)
def test_every_other_policy_equals_one_process(world: int, like: Case) -> None:
    cases = [replace(like, policy=policy, steps=2) for policy in sorted(set(POLICIES) - set(EVERY_CASE))]
    run_ranks(world, _check_cases, cases, timeout=480)


@pytest.mark.parametrize("world", [SLOW_1, SLOW_2, 3, SLOW_4])
def test_tokens_may_all_be_served_elsewhere_though_their_experts_are_here(world: int) -> None:
    cases = [Case("elsewhere", 8, 2, "idle experts", checkpointing=True), Case("elsewhere", 3, 1, "empty rank", torch.float32)]
    run_ranks(world, _check_cases, cases, timeout=240)


@pytest.mark.slow
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
    where_ED = POLICIES["hecate_paper"](given_).where_LED[0]
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
