"""A save that is written beside the training: the same bytes, no message from its thread, and a failure that all ranks hear of."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch

from hecate.checkpoint import CheckpointError
from hecate.checkpoint.save import write_shard
from hecate.checkpoint.save_run import begin_save, end_save, save_state
from hecate.checkpoint.write_thread import WriteThread
from hecate.errors import UserError
from testing.ranks import run_ranks
from tests.hecate.apps.megatron.making import config_of, ranks_of, write_parts
from tests.hecate.checkpoint.saving import shards_of
from tests.hecate.checkpoint.stepping import state_of, stepped_parts


def test_what_a_thread_raises_is_raised_where_it_is_waited_for() -> None:
    def fail(go_on: Callable[[], None]) -> None:
        raise OSError(errno.EIO, "broken")

    thread = WriteThread(fail)
    with pytest.raises(OSError, match="broken"):
        thread.wait()
    assert (thread.is_writing, thread.has_failed) == (False, True)


def test_a_write_that_is_broken_off_ends_before_its_next_tensor(tmp_path: Path) -> None:
    reached, asked = threading.Event(), threading.Event()
    real = os.write

    def slow(descriptor: int, data: bytes) -> int:
        reached.set()
        assert asked.wait(30)
        return real(descriptor, data)

    with mock.patch.object(os, "write", slow):
        thread = WriteThread(lambda go_on: write_shard(tmp_path / "checkpoint-1.tmp-a", 0, 1, shards_of(1.0)[0], go_on))
        assert reached.wait(30)
        assert thread.is_writing
        thread._broken_off.set()
        asked.set()
        thread.break_off()
    with pytest.raises(CheckpointError, match="was broken off"):
        thread.wait()
    assert [path.name for path in (tmp_path / "checkpoint-1.tmp-a").iterdir()] == ["rank-00000-of-00001.safetensors"]


def saved_twice(rank: int, world: int, folder: str) -> None:
    """Save at once, and beside a step that changes the parameters."""
    ranks, parts, config = ranks_of(rank, world), stepped_parts(rank, world), config_of(Path(folder))
    root, state = Path(config.output_dir), state_of(parts, 1)
    with mock.patch("time.time", return_value=1e9):
        save_state(config, ranks, parts, state)
        if ranks.is_first:
            (root / "checkpoint-1").rename(root / "at-once")
        ranks.barrier()
        begun = begin_save(config, ranks, parts, state, background=True)
    assert begun is not None
    with torch.no_grad():
        for tensor in parts.optimizer.state_tensors().values():
            tensor.fill_(9.0)
    assert end_save(ranks, begun).folder == root / "checkpoint-1"
    assert begun.requests() == (False, False)
    assert begin_save(config, ranks, parts, state, background=True) is None


def test_what_a_thread_writes_is_the_state_when_the_save_began(tmp_path: Path) -> None:
    write_parts(tmp_path)
    run_ranks(2, saved_twice, str(tmp_path))
    root = tmp_path / "out"
    assert sorted(path.name for path in root.iterdir()) == ["at-once", "checkpoint-1"]
    names = sorted(path.name for path in (root / "at-once").iterdir())
    assert len(names) == 4
    for name in names:
        assert (root / "checkpoint-1" / name).read_bytes() == (root / "at-once" / name).read_bytes(), name


def one_disk_is_full(rank: int, world: int, folder: str) -> tuple[str, tuple[bool, bool]]:
    """Rank 1's disk is full, and rank 0 is slow to write; the error of each, and what it said in the meantime."""
    ranks, parts, config = ranks_of(rank, world), stepped_parts(rank, world), config_of(Path(folder))
    state = state_of(parts, 1)
    save_state(config, ranks, parts, state)
    told = threading.Event()

    def write(*arguments: object) -> None:
        if rank == 1:
            raise CheckpointError("rank 1's disk is full")
        assert told.wait(30)
        write_shard(*arguments)  # type: ignore[arg-type]

    with mock.patch("hecate.checkpoint.save_run.write_shard", write):
        begun = begin_save(config, ranks, parts, state.after_step(parts, tokens=1, skipped=False), background=True)
    assert begun is not None
    assert begun.thread is not None
    if rank == 1:
        begun.thread._thread.join()
    said = begun.requests()
    begun.thread._broken_off.set()
    told.set()
    with pytest.raises(UserError) as caught:
        end_save(ranks, begun, failed=True)
    return str(caught.value), said


def test_a_failure_ends_the_save_on_all_ranks_and_leaves_the_older_one(tmp_path: Path) -> None:
    write_parts(tmp_path)
    first, second = run_ranks(2, one_disk_is_full, str(tmp_path))
    assert second == ("rank 1's disk is full", (False, True))
    assert first[1] == (True, False)
    assert "was broken off" in first[0]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["checkpoint-1"]
