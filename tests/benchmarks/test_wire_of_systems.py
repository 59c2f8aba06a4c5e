"""Every link carries the bytes that the plan says, whatever the pairs train, wherever they stand and whoever routes.

Three ranks are two nodes. Each rank counts what it passes to torch.distributed, and works out from the planner's plan and all ranks'
routing what that should be (`benchmarks.planned_bytes`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from benchmarks.gloo_steps import Wire
from benchmarks.planned_bytes import RowBytes, chunk_bytes, gathered_numbers, token_bytes
from hecate.config import RouterConfig
from hecate.engine.shards import ExpertShards
from hecate.model.moe_model import MoeModel
from hecate.parallel.planners import plan_with
from hecate.parallel.transfer.transfer_plan import fastest_route
from hecate.parallel.values.layout import ChunkSize
from hecate.parallel.values.placement import everything_everywhere
from hecate.parallel.values.units import Unit
from testing.ranks import run_ranks
from tests.hecate.equivalence_cases import MICRO_STEPS, Case, sharded, step_of_rows
from tests.hecate.linear_cases import LinearCase, ShardedTraining, sharded_linears
from tests.hecate.reclora_cases import UserCase, optimizer_of, sharded_by_users, step_by_users
from tests.hecate.separate_adapters import given_case, given_linear_case, mixed_batch, one_step
from tests.hecate.separate_adapters import optimizer_of as separate_optimizer

FLOAT64 = 8
STEPS = 2
"""the second one's plans follow the loads of the first"""
AnyCase = Case | LinearCase | UserCase
Training = tuple[MoeModel, Callable[[int], Any]]


def training_of(case: AnyCase, rank: int, world: int) -> Training:
    """The model, and a function that makes a step of it on this rank's rows."""
    if isinstance(case, UserCase):
        moe, head = sharded_by_users(case, world)
        optimizer = optimizer_of(moe)
        return moe, lambda number: step_by_users(moe, head, optimizer, number, rank=rank, world=world, empty=range(0))
    if case.router.input == "given":
        moe, head = sharded_linears(case, world) if isinstance(case, LinearCase) else sharded(case, world)
        optimizer = separate_optimizer(moe, case)
        batches = [[mixed_batch(number, micro, range(0), idle=False) for micro in range(MICRO_STEPS)] for number in range(STEPS)]
        return moe, lambda number: one_step(moe, head, optimizer, batches[number], number, rank, world)
    if isinstance(case, LinearCase):
        training = ShardedTraining(case, rank, world)
        return training.moe, training.step
    moe, head = sharded(case, world)
    optimizer = separate_optimizer(moe, case)
    return moe, lambda number: step_of_rows(moe, head, optimizer, number, rank=rank, world=world, empty_rows=range(0))


@contextmanager
def routed_experts(shards: ExpertShards) -> Iterator[list[tuple[Unit, np.ndarray, RowBytes]]]:
    """Of each call of a unit's experts in the block: this rank's choices, and the bytes of a token's row."""
    calls: list[tuple[Unit, np.ndarray, RowBytes]] = []
    dispatched, combined, under_way = shards.dispatched, shards.combined, list[tuple[Unit, Any]]()

    def noted(unit: Unit, replicas_SC: Any, routed: Any) -> Any:
        under_way.append((unit, routed))
        return dispatched(unit, replicas_SC, routed)

    def returned(work: Any, y_RD: Any, *, backward_follows: bool) -> Any:
        y_TD, (unit, routed) = combined(work, y_RD, backward_follows=backward_follows), under_way.pop()
        x_TD, weight_TK = routed.x_TD, routed.weight_TK
        row = RowBytes(
            x_TD.shape[1] * FLOAT64,
            y_TD.shape[1] * FLOAT64,
            weight_TK.shape[1] * FLOAT64,
            weight_TK.shape[1],
            x_TD.requires_grad or weight_TK.requires_grad,
        )
        calls.append((unit, routed.slot_TK.numpy().copy(), row))
        return y_TD

    shards.dispatched, shards.combined = noted, returned  # type: ignore[method-assign]
    try:
        yield calls
    finally:
        del shards.dispatched, shards.combined  # type: ignore[method-assign]


def pool_bytes(shards: ExpertShards, unit: Unit) -> np.ndarray:
    """A pool goes to every rank, and its gradient back; int64 [ranks, ranks]."""
    pool, owner_E, topology = shards.pools[unit], shards.owners[unit], shards.config.topology
    numel = pool.layout().trainable_numel
    everywhere = everything_everywhere(owner_E, topology.world_size)
    route = fastest_route(everywhere, ChunkSize(numel, FLOAT64), topology)
    numbers_WW = gathered_numbers(route, owner_E, everywhere.where_ED, numel, topology.node_of_rank)
    return (numbers_WW + numbers_WW.T) * FLOAT64


@dataclass
class Moved:
    """Of all ranks in all steps."""

    chunks: int = 0
    """bytes of experts and pools"""
    tokens: int = 0
    """bytes of tokens"""
    routes: set[str] = field(default_factory=set)
    """that chunks have taken"""


def check_links(rank: int, world: int, case: AnyCase) -> Moved:
    moe, step = training_of(case, rank, world)
    shards, moved = moe.engine.shards, Moved()
    for number in range(STEPS):
        planned = [(units, given, plan_with(shards.config.planner, given)) for units, given in shards.plans.inputs()]
        wire, before = Wire(world, rank), shards.bytes_sent
        with routed_experts(shards) as calls, wire.counting():
            step(number)
        of_ranks: list[Any] = [None] * world
        dist.all_gather_object(of_ranks, [expert_TK for _, expert_TK, _ in calls])
        chunks_WW = sum((pool_bytes(shards, unit) for unit in shards.pools), np.zeros((world, world), dtype=np.int64))
        tokens_WW, plans = np.zeros_like(chunks_WW), {}
        for units, given, plan in planned:
            for index, unit in enumerate(units):
                chunks_WW += chunk_bytes(given, plan, index)
                plans[unit] = plan.layer(given, index)
        for (unit, _, row), *expert_WTK in zip(calls, *of_ranks, strict=True):
            tokens_WW += token_bytes(plans[unit], shards.config.topology, expert_WTK, row)[0]
        expected = (chunks_WW + tokens_WW)[rank].tolist()
        assert wire.bytes_to == expected, f"step {number}: rank {rank} sent {wire.bytes_to}, planned are {expected}"
        counted = shards.bytes_sent - before
        assert counted == sum(wire.bytes_to), f"step {number}: rank {rank} sent {sum(wire.bytes_to)} and has counted {counted}"
        moved.chunks, moved.tokens = moved.chunks + int(chunks_WW.sum()), moved.tokens + int(tokens_WW.sum())
        moved.routes |= {transfer.chunks.route for transfer in shards.plans.transfers.values()}
    return moved


def check_all_links(rank: int, world: int, cases: list[AnyCase]) -> list[Moved]:
    found = []
    for case in cases:
        try:
            found.append(check_links(rank, world, case))
        except BaseException as error:
            raise AssertionError(f"{case}: {error}") from error
    return found


def cases_of(policy: str) -> list[AnyCase]:
    """The last one's tokens stay on their ranks, which need all factors."""
    pairs = ("fixed_a", "nola", "shards")
    return [
        *(Case(policy, 5, 2, "hot expert", pairs=source) for source in pairs),
        *(LinearCase(policy, "hot expert", (4, 5), pairs=source) for source in ("plain", *pairs)),
        LinearCase(policy, "hot expert", (1, 1), 1, pairs="shards"),
        LinearCase(policy, "hot expert", (4, 3), 3, router=RouterConfig(score="sigmoid"), eta=1.5),
        given_case(policy, "balanced"),
        given_linear_case(policy, "balanced"),
        UserCase(policy, "products"),
        UserCase(policy, "factors"),
    ]


def moved_by(cases: list[AnyCase]) -> list[Moved]:
    return run_ranks(3, check_all_links, cases, timeout=480)[0]


def test_links_carry_what_the_plan_says_also_where_no_gradient_returns() -> None:
    """Of given experts and of one pair each, nothing trains before the first unit, so that its rows have no gradients."""
    cases = [given_linear_case("static_ep", "balanced"), LinearCase("static_ep", "hot expert", (1, 1), 1, pairs="shards")]
    assert all(moved.tokens for moved in moved_by(cases))


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["static_ep", "auto", "full"])
def test_every_link_carries_what_the_plan_says(policy: str) -> None:
    found = moved_by(cases_of(policy))
    if policy == "static_ep":
        assert all(moved.tokens for moved in found[:-1])
        return
    assert all(moved.chunks for moved in found)
    if policy == "full":
        assert not any(moved.tokens for moved in found)
        return
    assert sum(moved.tokens > 0 for moved in found) > len(found) / 2
    assert set().union(*(moved.routes for moved in found)) > {"flat"}, "nothing went over leaders"
