"""Experts over linears, sharded over any ranks, train as one process with plain autograd does (tests/plain_mola.py)."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hecate.config import RouterConfig
from hecate.elastic.move_experts import move_experts
from hecate.parallel.comm import expert_store
from testing.ranks import run_ranks
from tests.hecate.equivalence_cases import MICRO_STEPS, assert_groups_equal, calibrating_at_whim, policies_at, random_owners
from tests.hecate.linear_cases import LinearCase, PlainModel, ShardedTraining, near
from tests.hecate.watching import gradients_of, moments_of

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}


def check_case(rank: int, world: int, case: LinearCase, *, reshard: bool = False) -> None:
    tolerance = TOLERANCE[case.dtype]
    sharded = ShardedTraining(case, rank, world)
    plain = PlainModel(case, sharded.moe)
    shards, calibrations, ever_idle = sharded.moe.engine.shards, 0, False
    seen = gradients_of(sharded.optimizer)
    for step in range(case.steps):
        before = {name: parameter.detach().clone() for name, parameter in sharded.optimizer.owned.items()}
        result = sharded.step(step)
        calibrations += shards.plans.calibrations
        loss, aux, norm, idle = plain.step(step, sharded.empty_rows)
        for name, got, wanted in (("loss", result.loss, loss), ("aux", result.aux_loss, aux), ("norm", result.grad_norm, norm)):
            assert abs(got - wanted) <= tolerance * max(1, abs(wanted)), f"step {step}: {name} {got} against {wanted}"
        for name in {*sharded.optimizer.owned, *sharded.moe.replicated_parameters()}:
            near(f"step {step}, {name}", seen[name], plain.flat(name, grad=True), tolerance)
        plain.optimizer.step()
        plain.optimizer.zero_grad()
        for name, parameter in {**sharded.optimizer.owned, **sharded.moe.replicated_parameters()}.items():
            near(f"step {step}, {name} after", parameter.detach(), plain.flat(name, grad=False), tolerance)
            if name in idle:
                ever_idle = True
                assert torch.equal(parameter.detach(), before[name]), f"idle expert {name} moved"
        for unit, linear in plain.linears.items():
            if case.router.bias == "balancing":
                bias = sharded.optimizer.buffers[f"layers.{unit}.router.bias"]
                assert torch.equal(bias, linear.expert_bias), f"step {step}: the bias of {unit}"
        assert_groups_equal(sharded.moe, sharded.optimizer)
        if reshard:
            move_experts(sharded.moe.engine, sharded.optimizer, random_owners(sharded.moe, 10 * step + world))
        _padding_is_zero(case, sharded)
    units = len(plain.linears)
    if case.router.bias == "balancing":
        assert any(bias.any() for bias in sharded.optimizer.buffers.values()), "no bias has moved"
    if case.plan != "exact":  # a layer may plan anew after its router, or not, as it is predicted to be faster
        assert (0 < calibrations < case.steps * MICRO_STEPS * units) == (case.plan == "calibrated"), calibrations
    if case.scenario == "idle experts" and max(case.experts) > case.top_k and world == 1:
        assert ever_idle, "the scenario did not leave any expert idle"


def _padding_is_zero(case: LinearCase, sharded: ShardedTraining) -> None:
    """Parameters and moments beyond an expert's own rank."""
    for (unit, expert), chunk in sharded.moe.engine.shards.named_parameters().items():
        if case.ranks:
            a, b = (spec.shape for spec in sharded.moe.engine.shards.families[unit].layout().trainable)
            name = f"{unit}.{expert}"
            for values in (chunk.detach(), *moments_of(sharded.optimizer, name).values()):
                if values.numel() == chunk.numel():
                    of_a, of_b = values[: a[0] * a[1]].view(a), values[a[0] * a[1] :].view(b)
                    assert not of_a[case.ranks[expert] :].any()
                    assert not of_b[:, case.ranks[expert] :].any()


def _check_cases(rank: int, world: int, cases: list[LinearCase], reshard: bool = False) -> None:
    for case in cases:
        try:
            with calibrating_at_whim():
                check_case(rank, world, case, reshard=reshard)
        except BaseException as error:
            raise AssertionError(f"{case}: {error}") from error


SLOW_3, SLOW_4 = (pytest.param(world, marks=pytest.mark.slow) for world in (3, 4))


def test_experts_over_linears_train_as_one_process() -> None:
    run_ranks(2, _check_cases, [LinearCase("hecate_paper", "empty rank", (0, 4), steps=2)], timeout=240)


SHARDS = (
    LinearCase("hecate_paper", "idle experts", (2, 4), pairs="shards", steps=2),
    LinearCase("static_ep", "empty rank", (1, 1), 1, pairs="shards", steps=2, checkpointing=True),
)
"""several experts of each linear; and the system of MoS, one pair each"""


def test_shards_of_a_pool_train_as_one_process_while_their_owners_change() -> None:
    run_ranks(2, _check_cases, list(SHARDS), True, timeout=240)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_shards_of_a_pool_under_every_policy(world: int) -> None:
    cases = [replace(case, policy=policy) for policy in policies_at(world) for case in SHARDS]
    cases += [LinearCase("random 4", "hot expert", (3, 0), pairs="shards", prefetch=2), LinearCase("elsewhere", pairs="shards")]
    cases += [replace(case, shard_size=2) for case in SHARDS] if world == 4 else []
    run_ranks(world, _check_cases, cases, timeout=580)
    run_ranks(world, _check_cases, cases[:4], True, timeout=580)


def test_one_plain_pair_for_each_linear_needs_no_router() -> None:
    run_ranks(2, _check_cases, [LinearCase("hecate_paper", "empty rank", (1, 0), 1, steps=2)], timeout=240)


@pytest.mark.slow
def test_on_one_rank() -> None:
    run_ranks(1, _check_cases, [LinearCase("hecate_paper"), LinearCase("full", "idle experts", (0, 4), 1)], timeout=240)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_under_every_policy(world: int) -> None:
    cases = []
    for policy in policies_at(world, 1):
        cases += [LinearCase(policy, "hot expert", checkpointing=True), LinearCase(policy, "empty rank", (3, 1), 1)]
    cases += [LinearCase("random 3", "idle experts", (2, 5)), LinearCase("elsewhere", "idle experts", (5, 0))]
    run_ranks(world, _check_cases, cases, timeout=580)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_whenever_replicas_of_linears_come_and_go(world: int) -> None:
    cases = [
        LinearCase("hecate_paper", "hot expert", rematerialize=True),
        LinearCase("full", "idle experts", (4, 2), rematerialize=True, prefetch=2, checkpointing=True),
        LinearCase("llep", "idle experts", (2, 4), plan="exact"),
        LinearCase("random 3", "empty rank", (3, 1), 1, plan="exact", rematerialize=True, prefetch=0, checkpointing=True),
        LinearCase("random 8", "empty rank", prefetch=0),
    ]
    if world > 1:
        cases += [
            LinearCase("random 5", "empty rank", plan="calibrated", checkpointing=True),
            LinearCase("random 6", "hot expert", plan="calibrated", rematerialize=True, prefetch=2),
        ]
    run_ranks(world, _check_cases, cases, timeout=580)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3, 4])
def test_while_their_owners_change(world: int) -> None:
    cases = [LinearCase("hecate_paper", "idle experts", (2, 4)), LinearCase("random 4", "empty rank", rematerialize=True)]
    run_ranks(world, _check_cases, cases, True, timeout=580)


@pytest.mark.slow
def test_in_sharding_groups_smaller_than_the_world() -> None:
    cases = [LinearCase("hecate_paper", "empty rank"), LinearCase("random 7", "idle experts", (2, 4), checkpointing=True)]
    cases += [LinearCase("hecate_paper", "empty rank", **SMORA)]
    run_ranks(4, _check_cases, [replace(case, shard_size=2) for case in cases], timeout=580)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_whatever_computes_them(world: int) -> None:
    """Triton's kernels are interpreted."""
    cases = [LinearCase("hecate_paper", "empty rank", dtype=torch.float32, kernels=kernels, steps=1) for kernels in ("triton", "reference")]
    cases += [replace(cases[0], rematerialize=True)] if world > 1 else []
    run_ranks(world, _check_cases, cases, timeout=580)


MOVED = 0.02
"""how far a balancing bias moves in a step: enough to change choices"""
SMORA = {
    "experts": (16, 20),
    "top_k": 4,
    "rank": 1,
    "router": RouterConfig(score="sigmoid", bias="balancing", bias_in_weights=True, bias_rate=MOVED),
}
"""single ranks, which are multiplied densely where a rank has them all"""
SYSTEMS: tuple[dict[str, Any], ...] = (
    SMORA,
    {"router": RouterConfig(score="sigmoid", bias="balancing", bias_rate=MOVED)},
    {"router": RouterConfig(score="sigmoid")},
    {"router": RouterConfig(bias="learned", weights="one", balance="sample"), "top_k": 1},
    {"router": RouterConfig(score="sigmoid", bias="learned", weights="gate", balance="sample")},
    {"router": RouterConfig(dense=True, weights="gate"), "top_k": 4, "experts": (4, 2)},
    {"pairs": "fixed_a"},
    {"pairs": "nola", "experts": (0, 4)},
    {"eta": 1.5, "experts": (0, 4)},
    {"pairs": "fixed_a", "eta": 1.5, "router": RouterConfig(weights="gate")},
    {"ranks": (1, 3, 2), "experts": (3, 3)},
    {"ranks": (3, 1), "experts": (2, 0)},
)
SCENARIOS = ("balanced", "hot expert", "idle experts", "empty rank")


def test_with_other_routers_pairs_and_ranks_they_train_as_one_process() -> None:
    some = [{**SMORA, "experts": (16, 0)}, {"ranks": (1, 3), "experts": (2, 0)}]
    run_ranks(2, _check_cases, [LinearCase("hecate_paper", "empty rank", steps=2, **system) for system in some], timeout=240)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("system", SYSTEMS, ids=str)
def test_with_any_system_they_train_as_one_process(system: dict[str, Any], world: int) -> None:
    """Each policy is that of every system at one of 2 to 4 ranks. On one rank, all policies have the same plan."""
    number = SYSTEMS.index(system)
    policies = ("full",) * len(SCENARIOS) if world == 1 else (*policies_at(world, number), "elsewhere")
    scenarios = itertools.islice(itertools.cycle(SCENARIOS), number % len(SCENARIOS), None)
    cases = [LinearCase(policy, scenario, **system) for policy, scenario in zip(policies, scenarios, strict=False)]
    cases += [
        LinearCase("full", "balanced", rematerialize=True, checkpointing=True, **system),
        LinearCase("llep", "hot expert", plan="exact", prefetch=0, **system),
    ]
    run_ranks(world, _check_cases, cases, world > 1, timeout=580)


@pytest.mark.slow
@pytest.mark.parametrize("system", [SMORA, SYSTEMS[-4], SYSTEMS[-2]], ids=str)
def test_on_grouped_kernels(system: dict[str, Any]) -> None:
    """Interpreted."""
    run_ranks(
        2, _check_cases, [LinearCase("hecate_paper", "empty rank", dtype=torch.float32, kernels="triton", steps=1, **system)], timeout=580
    )


def test_the_units_of_a_layer_travel_in_one_message(one_rank: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    """In each of two micro-steps the seven units of two layers come together, forward and, freed meanwhile, backward again."""
    seen: list[int] = []
    together = expert_store.sparse_all_gather_many

    def counting(parts: list[Any], group: dist.ProcessGroup) -> Any:
        seen.append(len(parts))
        return together(parts, group)

    monkeypatch.setattr(expert_store, "sparse_all_gather_many", counting)
    ShardedTraining(LinearCase("full", rematerialize=True), 0, 1).step(0)
    assert seen == [7] * 8
