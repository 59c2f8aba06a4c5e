"""A rank that is lost while experts move to new owners takes no expert's last copy along."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist

from hecate import faults
from hecate.elastic.backups import copy_to_backup_ranks
from hecate.elastic.move_experts import move_experts
from hecate.optim.adamw import AdamW
from hecate.optim.optimizer import ExpertOptimizer, LearningRate, Trainables, owned_parameters
from hecate.ranks.ranks import Ranks, connect
from hecate.ranks.sockets import tcp_sockets
from testing.ranks import run_ranks
from testing.tiny_run import make_workshop
from tests.hecate.elastic.losing import DEATH_STEP, VICTIM, Dead, make_run_in_groups, regroup, steps_until
from tests.hecate.experts.making import engine
from tests.hecate.train.in_process import Losses

UNTIL = DEATH_STEP + 2

Point = tuple[str, int, int, bool]
"""a place, and at which of its calls the victim dies; by how many ranks owners move on; whether the last rank is broken off there, too, so
that it has nothing of what comes after that place"""
POINTS: list[Point] = [
    ("move", 2, 2, True),  # the old owner has given its experts up, the new one has not received them, and their backups are lost
    ("backups", 1, 1, False),  # the new owner is lost, which has the old backups, too
    ("backups", 1, 1, True),  # the old backups are of use while the new ones are on their way
    ("backups", 2, 1, True),  # the old backups are gone on one rank before another one knows that all hold the new ones
]
MORE: list[Point] = [("move", 1, 1, False), ("move", 2, 1, False), ("move", 3, 1, False), ("move", 4, 2, True), ("backups", 3, 1, True)]
"""before the first layer, within it, and in the second one"""


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_workshop(tmp_path_factory.mktemp("workshop")))


def left(rank: int, world: int, folder: str, points: Sequence[Point], shard_size: int | None) -> list[tuple[list[str], dict[str, bool]]]:
    """For each point, the names of all experts, and of those of which this rank has a copy after the loss: whether it is right."""
    found = []
    for number, (place, call, shift, broken_off) in enumerate(points):
        if number:
            connect(dist.FileStore(f"{folder}/{number}", world), rank, world)
        made = engine({0: 5, 1: 4}, shard_size=shard_size)
        ranks = Ranks(rank, world, torch.device("cpu"), made.shards.groups, frozenset(tcp_sockets()))
        optimizer = ExpertOptimizer(Trainables(owned_parameters(made), {}), AdamW(weight_decay=0.1), LearningRate(0.1), ranks.device)
        for parameter in optimizer.owned.values():
            parameter.grad = torch.sin(parameter.detach())
        optimizer.step(1.0, None)
        copy_to_backup_ranks(made, optimizer, 1)
        parts: list[dict[str, dict[str, torch.Tensor]]] = [{} for _ in range(world)]
        dist.all_gather_object(parts, {name: optimizer.row(one) for name, one in optimizer.owned.items()})
        wanted = {name: row for part in parts for name, row in part.items()}
        fail_at(place, call, Dead if rank == VICTIM else RuntimeError if broken_off and rank == world - 1 else None)
        try:
            owners = {unit: (owner_E + shift) % (shard_size or world) for unit, owner_E in made.shards.owners.items()}
            move_experts(made, optimizer, owners, 1)
            raise AssertionError(f"no rank was lost at {place}, {call}")
        except (Dead, RuntimeError):
            faults.arm(None)
            ranks.leave()
        rows = {name: optimizer.row(one) for name, one in {**optimizer.backups, **optimizer.owned}.items()}
        found.append(
            (sorted(wanted), {name: all(torch.equal(row[key], wanted[name][key]) for key in wanted[name]) for name, row in rows.items()})
        )
    return found


@pytest.mark.parametrize(
    ("world", "points", "shard_size"), [(3, [*POINTS, *MORE], None), (4, [("move", 2, 1, True)], 2)], ids=["one", "two"]
)
def test_each_expert_has_a_right_copy_on_a_rank_that_is_left(
    tmp_path: Path, world: int, points: list[Point], shard_size: int | None
) -> None:
    """In one sharding group, and in two, which would lose the last copies of both at the same time."""
    results = run_ranks(world, left, str(tmp_path), points, shard_size)
    for number, point in enumerate(points):
        survivors = [results[rank][number] for rank in range(world) if rank != VICTIM]
        assert all(all(held.values()) for _, held in survivors), point
        assert sorted({name for _, held in survivors for name in held}) == survivors[0][0], point


def losing(rank: int, world: int, workshop: str, points: Sequence[Point], shard_size: int | None) -> list[Any]:
    """The losses of an undisturbed run, then of one for each point that loses the victim there; each with the step that it went on from."""
    ordered, name = ("fssdp.redundancy=1", "deterministic=true"), f"moving-{world}-{len(points)}"
    found: list[Any] = []
    for number, point in enumerate([None, *points]):
        if number:
            connect(dist.FileStore(f"{workshop}/{name}-{number}-again", world), rank, world)
        run = make_run_in_groups(workshop, f"{name}-{number}", rank, world, shard_size, *ordered)
        losses: dict[int, tuple[float, float, float]] = {}
        steps_until(run, DEATH_STEP, losses)
        if point is not None:
            place, call, shift, broken_off = point
            try:
                fail_at(place, call, Dead if rank == VICTIM else RuntimeError if broken_off and rank == world - 1 else None)
                with moving_on(shift):
                    run.reshard(1)
                raise AssertionError("no rank was lost")
            except Dead:
                run.ranks.leave()
                found.append((DEATH_STEP, []))
                continue
            except RuntimeError:
                faults.arm(None)
                regroup(run, f"{workshop}/{name}-{number}-left", rank - (rank > VICTIM), world - 1)
                assert run.run_state.step == DEATH_STEP
            with moving_on(1):
                assert run.reshard(1)
        steps_until(run, UNTIL, losses)
        found.append([losses[step] for step in sorted(losses)])
        run.ranks.leave()
    return found


def fail_at(wanted: str, call: int, failure: type[BaseException] | None) -> None:
    def fail(place: str, _subject: object) -> None:
        nonlocal call
        call -= place == wanted
        if call == 0 and failure is not None:
            faults.arm(None)
            raise failure

    faults.arm(fail)


def moving_on(shift: int) -> Any:
    """Let a re-shard move each expert so many ranks on."""

    def moved(_planner: object, inputs: Sequence[Any], _steps: int) -> Any:
        return [np.stack([(owner_E + shift) % given.topology.world_size for owner_E in given.owner_LE]) for given in inputs], None

    return mock.patch("hecate.elastic.move_experts.better_owners", moved)


def check(results: list[list[Any]], points: Sequence[Point]) -> None:
    whole: Losses = results[0][0]
    for number, point in enumerate(points, start=1):
        for rank, found in enumerate(results):
            assert rank == VICTIM or found[number] == whole, (point, rank)


@pytest.mark.slow
def test_no_experts_last_copy_is_lost_and_the_bits_are_those_of_the_undisturbed_run(workshop: str) -> None:
    check(run_ranks(3, losing, workshop, POINTS, None), POINTS)


@pytest.mark.slow
def test_nor_at_any_other_point_of_a_reshard(workshop: str) -> None:
    check(run_ranks(3, losing, workshop, MORE, None), MORE)


@pytest.mark.slow
def test_nor_where_the_other_sharding_group_holds_the_copies(workshop: str) -> None:
    points: list[Point] = [("move", 2, 1, True)]
    check(run_ranks(4, losing, workshop, points, 2), points)
