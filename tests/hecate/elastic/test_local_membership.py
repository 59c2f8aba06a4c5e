"""A rank that a local launcher has started reads from files which ranks are in the job."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from unittest import mock

import pytest
import torch

from hecate.elastic.local_membership import LocalMembership, local_membership
from hecate.errors import UserError
from hecate.ranks.launcher_files import (
    BEGINS_VARIABLE,
    JOIN_VARIABLE,
    MEMBER_VARIABLE,
    STORE_VARIABLE,
    Generation,
    ready_file,
    write_generation,
)
from hecate.ranks.ranks import Ranks
from tests.hecate.apps.megatron.making import config_of, write_parts


def member(folder: Path, monkeypatch: pytest.MonkeyPatch) -> LocalMembership:
    """Member 1 of a job that began with members 0 and 1."""
    return member_and_ranks(folder, monkeypatch)[0]


def member_and_ranks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[LocalMembership, mock.Mock]:
    """The same with its ranks, which are on NCCL."""
    monkeypatch.setattr("hecate.elastic.peer_watch.is_nccl", lambda group: True)
    ranks = mock.create_autospec(Ranks, instance=True)
    ranks.groups, ranks.rank, ranks.world_size = mock.Mock(), 1, 2
    write_parts(folder)
    config = config_of(folder, "fssdp.redundancy=1")
    assert local_membership(config, ranks) is None
    monkeypatch.setenv(MEMBER_VARIABLE, "1")
    assert local_membership(config_of(folder), ranks) is None, "its ranks do not go on"
    monkeypatch.setenv(STORE_VARIABLE, str(folder / "store"))
    write_generation(folder / "store", Generation(0, (0, 1), (0, 1)))
    made = local_membership(config, ranks)
    assert made is not None
    return made, ranks


def test_from_the_beginning_a_lost_rank_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that is to join is alone, and may be none of the members yet."""
    for joins, noticed in ((False, True), (True, False)):
        if joins:
            monkeypatch.setenv(JOIN_VARIABLE, "1")
        with mock.patch.object(threading.Thread, "start"):
            membership, ranks = member_and_ranks(tmp_path / str(joins), monkeypatch)
        write_generation(tmp_path / str(joins) / "store", Generation(1, (1,), (1,)))
        assert membership._watch.look()
        assert ranks.abort.called == noticed
        monkeypatch.delenv(MEMBER_VARIABLE)


def test_a_new_generation_is_a_request_to_regroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    membership = member(tmp_path, monkeypatch)
    assert not membership.regroup_requested()
    assert not ready_file(tmp_path / "store", 1).exists()
    membership.loaded()
    assert ready_file(tmp_path / "store", 1).exists()
    write_generation(tmp_path / "store", Generation(1, (0, 1, 2), (0, 1, 2)))
    assert membership.regroup_requested()


def test_ranks_that_were_started_again_are_watched_by_their_new_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Members 2 and 3 begin the run together, in its second generation."""
    monkeypatch.setattr("hecate.elastic.peer_watch.is_nccl", lambda group: True)
    monkeypatch.setattr(threading.Thread, "start", lambda _: None)
    ranks = mock.create_autospec(Ranks, instance=True)
    ranks.groups, ranks.rank, ranks.world_size = mock.Mock(), 1, 2
    write_parts(tmp_path)
    for name, value in ((MEMBER_VARIABLE, "3"), (BEGINS_VARIABLE, "1"), (STORE_VARIABLE, str(tmp_path / "store"))):
        monkeypatch.setenv(name, value)
    write_generation(tmp_path / "store", Generation(1, (2, 3), (0, 1)))
    membership = LocalMembership(config_of(tmp_path), ranks)
    assert not membership.regroup_requested()
    assert membership._watch.look()
    assert not ranks.abort.called
    write_generation(tmp_path / "store", Generation(2, (3,), (1,)))
    assert membership.regroup_requested()
    assert membership._watch.look()
    assert ranks.abort.called


def test_without_a_new_generation_there_is_no_next_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hecate.elastic.local_membership._GRACE", 0.05)
    assert member(tmp_path, monkeypatch).next_group() is None


def test_a_rank_that_the_launcher_left_out_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    membership = member(tmp_path, monkeypatch)

    def leave_out() -> None:
        time.sleep(0.05)
        write_generation(tmp_path / "store", Generation(1, (0,), (0,)))

    thread = threading.Thread(target=leave_out)
    thread.start()
    with pytest.raises(UserError, match="the launcher removed this rank"):
        membership.next_group()
    thread.join()


def test_why_a_group_was_not_joined_is_told_and_too_little_memory_ends_the_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("hecate.elastic.local_membership._GRACE", 0.05)
    monkeypatch.setattr("hecate.elastic.local_membership.meeting_store", mock.Mock())
    connect = mock.Mock(side_effect=[RuntimeError("[../gloo/transport/tcp/pair.cc:1] Connection closed by peer"), torch.OutOfMemoryError()])
    monkeypatch.setattr("hecate.elastic.local_membership.connect", connect)
    membership = member(tmp_path, monkeypatch)
    write_generation(tmp_path / "store", Generation(1, (1,), (1,)))
    assert membership.next_group() is None
    assert capsys.readouterr().err == "hecate: member 1 could not join group 1: another rank closed its connection\n"
    write_generation(tmp_path / "store", Generation(2, (1,), (1,)))
    with pytest.raises(torch.OutOfMemoryError):
        membership.next_group()
