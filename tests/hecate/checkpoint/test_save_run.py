"""While ranks save, none waits in a collective for another one's files."""

from __future__ import annotations

import errno
import os
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from hecate.checkpoint import CheckpointError
from hecate.checkpoint.files import UnreadableError
from hecate.checkpoint.save_run import save_state
from hecate.checkpoint.verify import first_damage
from hecate.ranks.ranks import Ranks
from testing.ranks import run_ranks
from tests.hecate.apps.megatron.making import config_of, ranks_of, write_parts
from tests.hecate.checkpoint.saving import save, shards_of
from tests.hecate.checkpoint.stepping import state_of, stepped_parts


def saving(rank: int, world: int, folder: str, slow: str, step: int) -> str | None:
    """Save step 1, then `step` while rank 0 gets on with its files only once rank 1 has returned from a collective."""
    ranks, parts, config = ranks_of(rank, world), stepped_parts(rank, world), config_of(Path(folder), "save_total_limit=1")
    save_state(config, ranks, parts, state_of(parts, 1))
    returned, all_most = Path(folder, "returned"), Ranks.all_most
    module, _, name = slow.rpartition(".")
    real: Any = getattr(__import__(module, fromlist=[name]), name)

    def wait(*arguments: Any) -> Any:
        for _ in range(500):
            if rank or returned.exists():
                return real(*arguments)
            time.sleep(0.01)
        raise CheckpointError("rank 1 waits in a collective")

    def noted(self: Ranks, values: Any) -> list[float]:
        most = all_most(self, values)
        if rank and most[0]:
            returned.touch()
        return most

    with mock.patch(slow, wait), mock.patch.object(Ranks, "all_most", noted), mock.patch("hecate.checkpoint.save_run._POLL_SECONDS", 0.01):
        saved = save_state(config, ranks, parts, state_of(stepped_parts(rank, world), step))
    return saved.folder and saved.folder.name


SLOW = {"writing": ("save_run.write_shard", 2), "pruning": ("history.first_damage", 2), "looking": ("save_run.first_damage", 1)}


@pytest.mark.parametrize(("slow", "step"), SLOW.values(), ids=SLOW)
def test_a_rank_that_is_long_at_its_files_leaves_no_other_in_a_collective(tmp_path: Path, slow: str, step: int) -> None:
    write_parts(tmp_path)
    assert run_ranks(2, saving, str(tmp_path), f"hecate.checkpoint.{slow}", step) == [None if step == 1 else "checkpoint-2"] * 2


def verified(rank: int, world: int, folder: str) -> str | None:
    ranks, parts = ranks_of(rank, world), stepped_parts(rank, world)
    saved = save_state(config_of(Path(folder)), ranks, parts, state_of(parts, 1)).folder
    assert saved is not None
    with mock.patch("hecate.checkpoint.verify._damage_of_file", side_effect=AssertionError("it reads the whole checkpoint again")):
        return first_damage(saved)


def test_no_rank_reads_again_what_the_ranks_have_written(tmp_path: Path) -> None:
    """The first rank verifies old checkpoints, and when it is lost, another one is the first."""
    write_parts(tmp_path)
    assert run_ranks(2, verified, str(tmp_path)) == [None, None]


def with_a_stubborn_disk(rank: int, world: int, folder: str) -> tuple[str, tuple[str, ...]]:
    ranks, parts, config = ranks_of(rank, world), stepped_parts(rank, world), config_of(Path(folder), "save_total_limit=1")
    save_state(config, ranks, parts, state_of(parts, 1))
    with mock.patch("hecate.checkpoint.save_run.prune", side_effect=CheckpointError("checkpoint-1: the old checkpoint cannot be deleted")):
        saved = save_state(config, ranks, parts, state_of(stepped_parts(rank, world), 2))
    assert saved.folder is not None
    return saved.folder.name, saved.warnings


def test_an_old_checkpoint_that_cannot_be_deleted_does_not_cost_the_new_one(tmp_path: Path) -> None:
    write_parts(tmp_path)
    first, second = run_ranks(2, with_a_stubborn_disk, str(tmp_path))
    assert first == ("checkpoint-2", ("checkpoint-1: the old checkpoint cannot be deleted; the next save tries again",))
    assert second == ("checkpoint-2", ())


def with_a_failing_write(rank: int, world: int, folder: str) -> str:
    ranks, parts = ranks_of(rank, world), stepped_parts(rank, world)
    failing = mock.patch("hecate.checkpoint.save_run.write_shard", side_effect=MemoryError("no memory"))
    with failing if rank == 0 else nullcontext(), pytest.raises((CheckpointError, MemoryError)) as caught:
        save_state(config_of(Path(folder)), ranks, parts, state_of(parts, 1))
    return str(caught.value)


def test_whatever_fails_on_one_rank_ends_the_save_on_all(tmp_path: Path) -> None:
    write_parts(tmp_path)
    first, second = run_ranks(2, with_a_failing_write, str(tmp_path))
    assert first == "no memory"
    assert second.endswith("checkpoint-1: rank 0 could not write its part: MemoryError: no memory")


def after_a_failed_read(rank: int, world: int, folder: str) -> tuple[tuple[str, ...], bool]:
    """Save a step again whose checkpoint cannot be read at first: the warnings, and whether it is the one that was there."""
    ranks, parts, config = ranks_of(rank, world), stepped_parts(rank, world), config_of(Path(folder))
    first = save_state(config, ranks, parts, state_of(parts, 1)).folder
    assert first is not None
    inode = (first / "COMMIT").stat().st_ino
    ranks.barrier()
    reads, real = iter([OSError(errno.EMFILE, "Too many open files")]), os.open

    def once(path: Any, *given: Any) -> int:
        if rank == 0 and str(path).endswith("COMMIT") and (error := next(reads, None)):
            raise error
        return real(path, *given)

    with mock.patch("hecate.checkpoint.files.os.open", once):
        again = save_state(config, ranks, parts, state_of(parts, 1))
    return again.warnings, (first / "COMMIT").stat().st_ino == inode


def test_a_sound_checkpoint_whose_read_fails_once_is_not_set_aside(tmp_path: Path) -> None:
    write_parts(tmp_path)
    assert run_ranks(2, after_a_failed_read, str(tmp_path)) == [((), True)] * 2
    run = config_of(tmp_path).output_dir
    assert [path.name for path in Path(run).iterdir()] == ["checkpoint-1"]


@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE, errno.EACCES, errno.ENOMEM, errno.ESTALE])
def test_what_the_system_refuses_is_no_verdict_on_the_content(tmp_path: Path, number: int) -> None:
    folder = save(tmp_path, 1, shards_of(1.0))
    for call in ("open", "preadv"):
        refused = mock.Mock(side_effect=OSError(number, os.strerror(number)))
        with mock.patch(f"hecate.checkpoint.files.os.{call}", refused), pytest.raises(UnreadableError, match="this says nothing of"):
            first_damage(folder)
        assert first_damage(folder) is None, "it was not remembered"


def test_a_link_or_a_device_in_the_place_of_a_file_is_damage(tmp_path: Path) -> None:
    folder = save(tmp_path, 1, shards_of(1.0))
    (folder / "COMMIT").rename(tmp_path / "COMMIT")
    (folder / "COMMIT").symlink_to(tmp_path / "COMMIT")
    assert "a link is not followed" in str(first_damage(folder))
