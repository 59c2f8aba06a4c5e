"""The start and the abort of process groups under NCCL, on a stand-in: gloo on the CPU, which says that it is NCCL."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from hecate.elastic.move_experts import refuse_different_owners
from hecate.engine.step import exchange_counts
from hecate.errors import UserError
from hecate.model.parameter_parts import TensorParts
from hecate.optim.optimizer import ExpertOptimizer, LearningRate, Trainables
from hecate.parallel.comm.aborts import AbortedError, note_abort
from hecate.parallel.comm.dispatch import dispatch
from hecate.parallel.transfer_plan import TokenPlan
from hecate.parallel.units import Unit
from hecate.ranks import backend
from hecate.ranks.backend import chosen_backend, forget_groups, is_nccl, own_device, wait_for_all
from hecate.ranks.groups import TensorGroups
from hecate.ranks.launcher_files import COLLECTIVES_VARIABLE
from hecate.ranks.ranks import Ranks, connect, lost_a_peer
from testing.ranks import run_ranks
from tests.hecate.train.in_process import ranks_of_default_group

CPU = torch.device("cpu")


def test_a_gpu_means_nccl_unless_gloo_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "3")
    for cuda, asked, expected, device in (
        (False, "", "gloo", "cpu"),
        (False, "gloo", "gloo", "cpu"),
        (True, "", "nccl", "cuda:3"),
        (True, "nccl", "nccl", "cuda:3"),
        (True, "gloo", "gloo", "cuda:1"),
    ):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        monkeypatch.setenv(COLLECTIVES_VARIABLE, asked)
        assert (chosen_backend(), str(own_device(chosen_backend()))) == (expected, device)
    monkeypatch.setenv(COLLECTIVES_VARIABLE, "mpi")
    with pytest.raises(UserError, match="HECATE_COLLECTIVES=mpi: must be gloo or nccl"):
        chosen_backend()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv(COLLECTIVES_VARIABLE, "nccl")
    with pytest.raises(UserError, match="no GPU"):
        chosen_backend()


class _Options:
    def __init__(self, is_high_priority_stream: bool = False) -> None:
        self.urgent = is_high_priority_stream


class _Event:
    ends = True

    def record(self, stream: object) -> None:
        pass

    def query(self) -> bool:
        return self.ends


@contextmanager
def gloo_as_nccl() -> Iterator[dict[str, list[Any]]]:
    """In this process groups say that they are NCCL's, until the end of the block. Gives what they were made with and used for."""
    made: dict[str, list[Any]] = {"default": [], "groups": [], "used": [], "aborted": []}
    init, new_group, reduce, abort = dist.init_process_group, dist.new_group, dist.all_reduce, distributed_c10d._abort_process_group

    def init_process_group(name: str, device_id: Any = None, pg_options: Any = None, **named: Any) -> None:
        made["default"].append((name, device_id, pg_options is not None and pg_options.urgent))
        init("gloo", **named)

    def make_group(ranks: list[int], pg_options: Any = None, **named: Any) -> Any:
        made["groups"].append((ranks, pg_options is not None and pg_options.urgent))
        return new_group(ranks, **named)

    def all_reduce(tensor: torch.Tensor, **named: Any) -> Any:
        made["used"].append(named.get("group"))
        return reduce(tensor, **named)

    def abort_all(group: Any = None) -> None:
        made["aborted"].append(group)
        abort(group)

    cuda = mock.patch.multiple(torch.cuda, Event=_Event, current_stream=lambda device: None)
    names = {
        "init_process_group": init_process_group,
        "new_group": make_group,
        "all_reduce": all_reduce,
        "get_backend": lambda _=None: "nccl",
    }
    groups = mock.patch.multiple(dist, **names)
    options = mock.patch.object(dist, "ProcessGroupNCCL", mock.Mock(Options=_Options), create=True)
    chosen = mock.patch("hecate.ranks.ranks.chosen_backend", return_value="nccl")
    with cuda, groups, options, chosen, mock.patch.object(distributed_c10d, "_abort_process_group", abort_all):
        yield made


def start(rank: int, world: int, store: str, shard_size: int | None) -> tuple[list[Any], list[Any], list[int]]:
    dist.destroy_process_group()
    with gloo_as_nccl() as made:
        ranks = connect(met := dist.FileStore(store, world), rank, world, shard_size)
        assert ranks.connections == frozenset(), "gloo's way to notice a loss was used"
        groups = ranks.all_groups()
        groups.append(ranks.new_sharding_group())
        used = [groups.index(group) for group in made["used"]]
        ranks.leave(together=True)
        assert met.add("ranks-done", 0) == world, "a rank has aborted while another one was not done"
        assert made["aborted"] == [None]
    return made["default"], made["groups"], used


def test_groups_are_made_with_their_device_and_used_once(tmp_path: Any) -> None:
    """With one sharding group the default group carries expert chunks, and with several a group of its own does: that one is urgent."""
    for default, groups, used in run_ranks(2, start, str(tmp_path / "one"), None):
        assert default == [("nccl", CPU, True)]
        assert groups == [([0, 1], False), ([0, 1], False)]
        assert used == [0, 1, 2], "experts, tokens, another sharding group"
    for default, groups, used in run_ranks(2, start, str(tmp_path / "two"), 1):
        assert default == [("nccl", CPU, False)]
        assert groups[:5] == [([0], True), ([1], True), ([0], False), ([1], False), ([0, 1], False)]
        assert used == [0, 1, 2, 3, 4], "experts, tokens, replicate, everyone, another sharding group"


def hang_at_first(rank: int, world: int) -> tuple[str, bool]:
    dist.destroy_process_group()
    with gloo_as_nccl(), mock.patch.object(_Event, "ends", False), mock.patch.object(backend, "_FIRST_USE_LIMIT", backend.timedelta()):
        try:
            connect(dist.HashStore(), rank, world)
        except dist.DistBackendError as error:
            forget_groups()
            return str(error), lost_a_peer(error)
    return "connected", False


def test_a_group_that_cannot_be_used_is_an_error() -> None:
    ((text, lost),) = run_ranks(1, hang_at_first)
    assert "rank 0: the first collectives of its process group 0 of 2, with 1 ranks, failed" in text
    assert lost


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


def test_ranks_leave_when_the_last_one_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    store, left = dist.HashStore(), []

    def leave(rank: int) -> None:
        wait_for_all(store, 2, CPU)
        left.append(rank)

    first = threading.Thread(target=leave, args=(0,))
    first.start()
    first.join(0.1)
    assert left == []
    leave(1)
    first.join(30)
    assert sorted(left) == [0, 1]
    monkeypatch.setattr(backend, "_LEAVE_SECONDS", 0.0)
    wait_for_all(dist.HashStore(), 2, CPU)  # a rank is lost


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
        "broadcast_bytes": lambda: ranks.broadcast_bytes(b"x"),
        "exchange_counts": lambda: exchange_counts(torch.ones(2, dtype=torch.int64), ranks.groups.tokens),
        "global_grad_norm": lambda: optimizer.global_grad_norm(ranks.groups.world),
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
