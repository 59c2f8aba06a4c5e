"""The start of process groups: which backend, with which options, and that each group works; and how ranks leave one together."""

from __future__ import annotations

import threading
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from hecate.errors import UserError
from hecate.ranks import backend
from hecate.ranks.backend import chosen_backend, forget_groups, own_device, wait_for_all
from hecate.ranks.launcher_files import COLLECTIVES_VARIABLE
from hecate.ranks.ranks import connect, lost_a_peer
from testing.ranks import run_ranks
from tests.hecate.ranks.stand_in import HangingEvent, gloo_as_nccl

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
    monkeypatch.setenv(COLLECTIVES_VARIABLE, "nccl")
    monkeypatch.setenv("NCCL_MULTI_RANK_GPU_ENABLE", "1")
    assert str(own_device("nccl")) == "cuda:1", "NCCL was told that ranks may share a GPU"
    monkeypatch.setenv(COLLECTIVES_VARIABLE, "mpi")
    with pytest.raises(UserError, match="HECATE_COLLECTIVES=mpi: must be gloo or nccl"):
        chosen_backend()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv(COLLECTIVES_VARIABLE, "nccl")
    with pytest.raises(UserError, match="no GPU"):
        chosen_backend()


def start(rank: int, world: int, store: str, shard_size: int | None) -> tuple[list[Any], list[Any], list[int], list[int]]:
    dist.destroy_process_group()
    with gloo_as_nccl() as made:
        ranks = connect(met := dist.FileStore(store, world), rank, world, shard_size, sharded_layers=True, max_ctas=8)
        assert ranks.connections == frozenset(), "gloo's way to notice a loss was used"
        groups = ranks.all_groups()
        used, exchanging = ([groups.index(group) for group in made[kind]] for kind in ("used", "exchanging"))
        ranks.leave(agreed=True)
        assert met.add("ranks-done", 0) == world, "a rank has aborted while another one was not done"
        assert made["aborted"] == [None]
    return made["default"], made["groups"], used, exchanging


def test_groups_are_made_with_their_device_and_used_once(tmp_path: Any) -> None:
    """With one sharding group the default group carries expert chunks, and with several a group of its own does. That one is urgent, and
    takes few multiprocessors. All groups of a kind are made by one split, which every rank takes part in."""
    chunks, plain = (True, 8), (False, None)
    for default, groups, used, exchanging in run_ranks(2, start, str(tmp_path / "one"), None):
        assert default == [("nccl", CPU, chunks)]
        assert groups == [([[0, 1]], plain), ([[0, 1]], plain)]
        assert used == [0, 1, 2], "experts, tokens, another sharding group"
        assert exchanging == [0, 1], "only experts and tokens have all-to-alls in steps"
    for default, groups, used, exchanging in run_ranks(2, start, str(tmp_path / "two"), 1):
        assert default == [("nccl", CPU, plain)]
        assert groups == [([[0], [1]], chunks), ([[0], [1]], plain), ([[0, 1]], plain), ([[0], [1]], plain)]
        assert used == [0, 1, 2, 3, 4], "experts, tokens, replicate, everyone, another sharding group"
        assert exchanging == [0, 1]


def hang_at_first(rank: int, world: int) -> tuple[str, bool]:
    dist.destroy_process_group()
    with (
        gloo_as_nccl(),
        mock.patch.object(HangingEvent, "ends", False),
        mock.patch.object(backend, "_FIRST_USE_LIMIT", backend.timedelta()),
    ):
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
