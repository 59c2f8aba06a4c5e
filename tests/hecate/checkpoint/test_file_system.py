"""What a file system lacks is said before anything is saved there."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from unittest import mock

import pytest

from hecate.checkpoint import CheckpointError
from hecate.checkpoint.file_system import require_disk_room, require_durable
from hecate.checkpoint.history import remove_stale_staging
from tests.hecate.checkpoint.disk import Killed, watched_disk

WORDS = {"mkdir": "create a folder", "write": "write a file and call fsync on it", "rename": "rename a folder", "rmdir": "delete a folder"}


def test_a_folder_that_can_be_saved_to_is_left_as_it_was(tmp_path: Path) -> None:
    require_durable(tmp_path / "new" / "run")
    assert list((tmp_path / "new" / "run").iterdir()) == []


@pytest.mark.parametrize("operation", sorted(WORDS))
def test_an_operation_that_is_not_there_is_named(tmp_path: Path, operation: str) -> None:
    def refuse(number: int, called: str, args: tuple[object, ...]) -> None:
        if called == operation:
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    with pytest.raises(CheckpointError) as caught, watched_disk(refuse):
        require_durable(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}: cannot {WORDS[operation]} there: Operation not supported\n")
    assert "lacks an operation" in str(caught.value)
    if operation != "rmdir":
        assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_synced_is_told_from_a_file(tmp_path: Path) -> None:
    real = os.fsync

    def only_files(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        real(descriptor)

    with pytest.raises(CheckpointError, match="cannot call fsync on a folder there: Invalid"), mock.patch.object(os, "fsync", only_files):
        require_durable(tmp_path)


def test_a_full_disk_is_no_lack_and_a_kill_leaves_what_the_next_run_deletes(tmp_path: Path) -> None:
    def full(number: int, called: str, args: tuple[object, ...]) -> None:
        if called == "write":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(CheckpointError, match=r"(?s)No space left.*free space there") as caught, watched_disk(full):
        require_durable(tmp_path)
    assert "lacks" not in str(caught.value)

    def die(number: int, called: str, args: tuple[object, ...]) -> None:
        if called == "rename":
            raise Killed

    with pytest.raises(Killed), watched_disk(die):
        require_durable(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    remove_stale_staging(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_room_is_counted_in_bytes_and_a_file_system_that_tells_no_size_has_room(tmp_path: Path) -> None:
    final = tmp_path / "not there yet" / "checkpoint-3"
    with mock.patch("os.statvfs", return_value=mock.Mock(f_bavail=2, f_frsize=512, f_blocks=9)):
        require_disk_room(final, 1024)
        with pytest.raises(CheckpointError, match=r"checkpoint-3: .* has 1,024 bytes free, and 1,025 are needed"):
            require_disk_room(final, 1025)
    with mock.patch("os.statvfs", return_value=mock.Mock(f_bavail=0, f_frsize=512, f_blocks=0)):
        require_disk_room(final, 1025)
