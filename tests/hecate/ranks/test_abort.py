"""The abort of NCCL's groups is one for all of a process, and afterwards nothing is read that they have written."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from hecate.elastic.move_experts import refuse_different_owners
from hecate.engine.step import exchange_counts
from hecate.model.parameter_parts import TensorParts
from hecate.optim.optimizer import ExpertOptimizer, LearningRate, Trainables
from hecate.parallel.comm.aborts import AbortedError, is_aborted, note_abort
from hecate.parallel.comm.dispatch import dispatch
from hecate.parallel.transfer.transfer_plan import TokenPlan
from hecate.parallel.values.units import Unit
from hecate.ranks import backend
from hecate.ranks.backend import abort_nccl, is_nccl
from hecate.ranks.groups import TensorGroups
from hecate.ranks.ranks import Ranks, connect, join_ranks
from hecate.train.steps.step_totals import exchange_totals
from testing.ranks import run_ranks
from tests.hecate.ranks.stand_in import gloo_as_nccl
from tests.hecate.train.in_process import ranks_of_default_group

CPU = torch.device("cpu")


def abort_by_many(rank: int, world: int) -> list[Any]:
    """Several threads abort at once, and the rank leaves; what is aborted and destroyed, and what was known when that began."""
    ranks, known = ranks_of_default_group(rank, world), []
    with gloo_as_nccl() as made, mock.patch.object(dist, "destroy_process_group") as destroy:
        whole = distributed_c10d._abort_process_group

        def note(group: Any = None) -> None:
            known.append(ranks.aborted)
            whole(group)

        with mock.patch.object(distributed_c10d, "_abort_process_group", note):
            threads = [threading.Thread(target=ranks.abort) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            ranks.leave()
        try:
            ranks.all_max(1.0)
        except (AbortedError, RuntimeError, ValueError) as error:
            known.append(ranks.aborted and not isinstance(error, AssertionError))
        return [made["aborted"], destroy.call_count, dist.is_initialized(), known]


def test_an_abort_is_one_for_all_groups_whoever_asks_for_it() -> None:
    assert run_ranks(1, abort_by_many) == [[[None], 0, False, [True, True]]]


class WaitsForOthers:
    """A group of NCCL whose abort waits for the device, and so until the kernels of all groups have ended."""

    def __init__(self, aborts: threading.Barrier) -> None:
        self._aborts, self.ended = aborts, False

    def abort(self) -> None:
        self._aborts.wait(timeout=20)
        self.ended = True


def test_no_abort_waits_for_one_that_has_not_begun() -> None:
    aborts, books = threading.Barrier(3), mock.Mock()
    groups = [WaitsForOthers(aborts) for _ in range(3)]
    books._world.pg_names = dict.fromkeys(groups, "name")
    with mock.patch.object(backend, "distributed_c10d", books), mock.patch.object(dist, "is_initialized", return_value=True):
        abort_nccl()
    assert all(group.ended for group in groups), "an abort has waited in vain for the others"
    assert all(map(is_aborted, groups))  # type: ignore[arg-type]
    books._abort_process_group.assert_called_once_with()


def old_ranks_abort(rank: int, world: int) -> tuple[int, bool]:
    """A thread aborts ranks that this process has left for others, which must not be harmed."""
    old = ranks_of_default_group(rank, world)
    with gloo_as_nccl() as made:
        old.leave()
        new = connect(dist.HashStore(), rank, world)
        old.abort()
        alive = new.all_max(3.0) == 3.0
        new.leave()
    return len(made["aborted"]), alive


def test_an_abort_of_ranks_that_were_left_harms_no_others() -> None:
    assert run_ranks(1, old_ranks_abort) == [(2, True)]


def gloo_aborts(rank: int, world: int) -> tuple[bool, bool]:
    ranks: Ranks = ranks_of_default_group(rank, world)
    assert not is_nccl(ranks.groups.world)
    with mock.patch.object(distributed_c10d, "_abort_process_group") as whole:
        ranks.leave()
        return whole.called, ranks.aborted


def test_gloo_is_aborted_by_its_connections() -> None:
    assert run_ranks(1, gloo_aborts) == [(False, True)]


def refused_reads(rank: int, world: int) -> list[str]:
    """The names of the functions that give what the collectives of aborted groups have written. (gloo's still run.)"""
    ranks = ranks_of_default_group(rank, world)
    optimizer = ExpertOptimizer(Trainables({}, {}), mock.Mock(), LearningRate(1.0), CPU)
    owners, engine = {Unit(0): np.zeros(2, dtype=np.int64)}, mock.Mock()
    engine.shards.groups, engine.shards.stores = ranks.groups, {Unit(0): mock.Mock(device=CPU)}
    dispatched = torch.ones(2, 3), torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1), torch.arange(2)
    plan = TokenPlan(bound_EB=np.array([[0.5]]), slot_DE=np.array([[0], [0]]))
    parts = TensorParts({}, {"w": 0}, TensorGroups(tensor=ranks.groups.tokens, data=ranks.groups.tokens))
    reads: dict[str, Callable[[], object]] = {
        "all_max": lambda: ranks.all_max(1.0),
        "all_sum": lambda: ranks.all_sum(torch.ones(2)),
        "all_gather": lambda: ranks.all_gather(torch.ones(2)),
        "all_most": lambda: ranks.all_most([1.0]),
        "broadcast_from": lambda: ranks.broadcast_from(0, b"" if rank == 0 else None),
        "exchange_counts": lambda: exchange_counts(torch.ones(2, dtype=torch.int64), ranks.groups.tokens).get(),
        "exchange_totals": lambda: exchange_totals(optimizer.squares(), optimizer.squares(), ranks.groups.world),
        "refuse_different_owners": lambda: refuse_different_owners(engine, owners),
        "dispatch": lambda: dispatch(*dispatched, plan, ranks.groups.tokens),
        "whole": lambda: parts.whole("w", torch.ones(2)),
    }
    for read in reads.values():
        read()
    note_abort(ranks.all_groups())
    given = []
    for name, read in reads.items():
        try:
            read()
        except AbortedError:
            continue
        given.append(name)
    return given


def test_nothing_that_an_aborted_group_has_written_is_used() -> None:
    assert run_ranks(2, refused_reads) == [[], []]


def fails_after_regrouping(rank: int, world: int) -> list[bool]:
    dist.destroy_process_group()
    joined: list[Ranks] = []

    def regroup_and_fail() -> None:
        with join_ranks() as first:
            first.leave()
            joined.extend([first, connect(dist.HashStore(), 0, 1)])
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        regroup_and_fail()
    return [ranks.aborted for ranks in joined]


def test_an_error_breaks_off_the_groups_that_replaced_the_first() -> None:
    assert run_ranks(1, fails_after_regrouping) == [[True, True]]
