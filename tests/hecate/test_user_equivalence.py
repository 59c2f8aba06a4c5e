"""Experts that are mixed by users, sharded over any ranks, train as one process with plain autograd does (tests/plain_reclora.py)."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest

from hecate.elastic.move_experts import move_experts
from testing.ranks import run_ranks
from tests.hecate.equivalence_cases import assert_groups_equal, calibrating_at_whim, policies_at
from tests.hecate.linear_cases import near
from tests.hecate.reclora_cases import PlainUsers, UserCase, empty_rows, optimizer_of, sharded_by_users, step_by_users
from tests.hecate.watching import gradients_of

TOLERANCE = 1e-10


def check_case(rank: int, world: int, case: UserCase) -> None:
    moe, head = sharded_by_users(case, world)
    optimizer, plain, empty = optimizer_of(moe), PlainUsers(case, moe), empty_rows(case, world)
    seen, shards = gradients_of(optimizer), moe.engine.shards
    for step in range(case.steps):
        result = step_by_users(moe, head, optimizer, step, rank=rank, world=world, empty=empty)
        loss, norm = plain.step(step, empty)
        for name, got, wanted in (("loss", result.loss, loss), ("norm", result.grad_norm, norm)):
            assert abs(got - wanted) <= TOLERANCE * max(1, abs(wanted)), f"step {step}: {name} {got} against {wanted}"
        for name in {*optimizer.owned, *moe.replicated_parameters()}:
            near(f"step {step}, {name}", seen[name], plain.flat(name, grad=True), TOLERANCE)
        plain.optimizer.step()
        plain.optimizer.zero_grad()
        for name, parameter in {**optimizer.owned, **moe.replicated_parameters()}.items():
            near(f"step {step}, {name} after", parameter.detach(), plain.flat(name, grad=False), TOLERANCE)
        assert_groups_equal(moe, optimizer)
        if case.mix == "factors":
            assert all(placement.where_ED.all() for placement in shards.placements.values()), "factors need all experts everywhere"
        if case.scenario == "moving owners":
            first = {unit: (owner_E + step + 1) % shards.world_size for unit, owner_E in shards.owners.items()}
            move_experts(moe.engine, optimizer, first)


def check_cases(rank: int, world: int, cases: list[UserCase]) -> None:
    for case in cases:
        try:
            with calibrating_at_whim():
                check_case(rank, world, case)
        except BaseException as error:
            raise AssertionError(f"{case}: {error}") from error


def test_experts_mixed_by_users_train_as_one_process() -> None:
    run_ranks(2, check_cases, [UserCase("static_ep", mix, steps=2) for mix in ("factors", "products")], timeout=240)


@pytest.mark.slow
@pytest.mark.parametrize("mix", ["factors", "products"])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_under_every_policy(world: int, mix: Literal["factors", "products"]) -> None:
    policies = policies_at(world, 1 if mix == "products" else 0)
    cases = [UserCase(policy, mix, "empty rank" if mix == "products" else "balanced", steps=2) for policy in policies]
    cases += [UserCase("random 3", mix, "empty rank", (4, 1), checkpointing=True), UserCase("elsewhere", mix, "empty rank", steps=2)]
    run_ranks(world, check_cases, cases, timeout=580)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 3])
def test_whenever_replicas_come_and_go(world: int) -> None:
    cases = [
        UserCase("hecate_paper", rematerialize=True),
        UserCase("llep", "products", rematerialize=True, prefetch=2, checkpointing=True),
        UserCase("static_ep", scenario="empty rank", plan="exact", rematerialize=True, prefetch=0),
        UserCase("hecate_paper", plan="calibrated", checkpointing=True),
        UserCase("static_ep", scenario="moving owners"),
        UserCase("hecate_paper", "products", "moving owners"),
    ]
    run_ranks(world, check_cases, cases, timeout=580)


@pytest.mark.slow
def test_in_sharding_groups_smaller_than_the_world() -> None:
    cases = [UserCase("static_ep", scenario="empty rank"), UserCase("hecate_paper", "products")]
    run_ranks(4, check_cases, [replace(case, shard_size=2) for case in cases], timeout=580)
