"""Experts over linears, sharded over any ranks, train as one process with plain autograd does (tests/plain_mola.py)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hecate.elastic.move_experts import move_experts
from hecate.parallel.comm import expert_store
from hecate.parallel.planners import POLICIES
from testing.ranks import run_ranks
from tests.hecate.equivalence_cases import MICRO_STEPS, assert_groups_equal, calibrating_at_whim
from tests.hecate.linear_cases import LinearCase, PlainModel, ShardedTraining, near, random_unit_owners
from tests.hecate.watching import gradients_of

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
        assert_groups_equal(sharded.moe, sharded.optimizer)
        if reshard:
            move_experts(sharded.moe.engine, sharded.optimizer, random_unit_owners(sharded, 10 * step + world))
    units = len(plain.linears)
    assert (0 < calibrations < case.steps * MICRO_STEPS * units) == (case.plan == "calibrated"), calibrations
    if case.scenario == "idle experts" and max(case.experts) > case.top_k and world == 1:
        assert ever_idle, "the scenario did not leave any expert idle"


def _check_cases(rank: int, world: int, cases: list[LinearCase], reshard: bool = False) -> None:
    for case in cases:
        try:
            with calibrating_at_whim():
                check_case(rank, world, case, reshard=reshard)
        except BaseException as error:
            raise AssertionError(f"{case}: {error}") from error


SLOW_3, SLOW_4 = (pytest.param(world, marks=pytest.mark.slow) for world in (3, 4))


def test_experts_over_linears_train_as_one_process() -> None:
    run_ranks(2, _check_cases, [LinearCase("hecate", "empty rank", (0, 4), steps=2)], timeout=240)


@pytest.mark.slow
def test_on_one_rank() -> None:
    run_ranks(1, _check_cases, [LinearCase("hecate"), LinearCase("full", "idle experts", (0, 4), 1)], timeout=240)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_under_every_policy(world: int) -> None:
    cases = []
    for policy in sorted(POLICIES):
        cases += [LinearCase(policy, "hot expert", checkpointing=True), LinearCase(policy, "empty rank", (3, 1), 1)]
    cases += [LinearCase("random 3", "idle experts", (2, 5)), LinearCase("elsewhere", "idle experts", (5, 0))]
    run_ranks(world, _check_cases, cases, timeout=580)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_whenever_replicas_of_linears_come_and_go(world: int) -> None:
    cases = [
        LinearCase("hecate", "hot expert", rematerialize=True),
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
    cases = [LinearCase("hecate", "idle experts", (2, 4)), LinearCase("random 4", "empty rank", rematerialize=True)]
    run_ranks(world, _check_cases, cases, True, timeout=580)


@pytest.mark.slow
def test_in_sharding_groups_smaller_than_the_world() -> None:
    cases = [LinearCase("hecate", "empty rank"), LinearCase("random 7", "idle experts", (2, 4), checkpointing=True)]
    run_ranks(4, _check_cases, [replace(case, shard_size=2) for case in cases], timeout=580)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_whatever_computes_them(world: int) -> None:
    """Triton's kernels are interpreted."""
    cases = [LinearCase("hecate", "empty rank", dtype=torch.float32, kernels=kernels, steps=1) for kernels in ("triton", "reference")]
    cases += [replace(cases[0], rematerialize=True)] if world > 1 else []
    run_ranks(world, _check_cases, cases, timeout=580)


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
