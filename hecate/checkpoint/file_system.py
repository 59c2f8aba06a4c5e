"""Ask a folder's file system, before anything is saved there, whether it has room and can do what a save needs."""

import contextlib
import errno
import os
import secrets
from collections.abc import Callable
from pathlib import Path

from hecate.checkpoint.files import CheckpointError
from hecate.checkpoint.manifest import COMMIT
from hecate.io.durable import delete_files, sync_folder, write_durable

_NONCE_BYTES = 8
_LACKING = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM}
"""The errors of a file system that does not have an operation."""


def require_disk_room(final: Path, needed: int) -> None:
    """Check that the disk has room for one more checkpoint. A file system that does not tell its size is taken to have room.

    Args:
        final: the folder that the checkpoint is to be.
        needed: bytes of all its files.

    Raises:
        CheckpointError: there is less room.
    """
    root = final.parent
    nearest = next(folder for folder in (root, *root.absolute().parents) if folder.exists())
    found = os.statvfs(nearest)
    free = found.f_bavail * found.f_frsize
    if found.f_blocks and free < needed:
        raise CheckpointError(
            f"cannot save {final.name}: {root} has {free:,} bytes free, and {needed:,} are needed\n"
            f"  older checkpoints there are untouched, and one is deleted only after a newer one was saved\n"
            "  keep fewer of them (save_total_limit), free space, or set output_dir to another disk"
        )


def require_durable(root: Path) -> None:
    """Try all that a save does to files in the folder: create, write, fsync, rename, delete. Nothing is left of it.

    One rank calls it. The folder is created if it does not exist. Raises CheckpointError: one of these fails; the text says which.
    """
    # A name that `remove_stale_staging` deletes, should the process be killed meanwhile.
    probe = root / f"checkpoint-0.tmp-{secrets.token_hex(_NONCE_BYTES)}"
    renamed = probe.with_name(f"{probe.name}r")
    attempts: dict[str, Callable[[], object]] = {
        "create a folder": lambda: probe.mkdir(parents=True),
        "write a file and call fsync on it": lambda: write_durable(probe / COMMIT, [b"\n"]),
        "call fsync on a folder": lambda: sync_folder(probe),
        "rename a folder": lambda: os.rename(probe, renamed),
        "delete a folder": lambda: delete_files(renamed),
    }
    for attempted, attempt in attempts.items():
        try:
            attempt()
        except OSError as error:
            for folder in (probe, renamed):
                with contextlib.suppress(OSError):
                    delete_files(folder)
            raise CheckpointError(f"{root}: cannot {attempted} there: {error.strerror}\n  {advice(error)}") from error


def advice(error: OSError) -> str:
    """How to mend what a file system refuses."""
    if error.errno in _LACKING:
        return (
            "this file system lacks an operation without which a checkpoint could be torn by a crash\n"
            "  set output_dir to a local disk, or to NFS, Lustre or another one with rename and fsync, and copy checkpoints from there"
        )
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return "raise the number of files that a process may have open (ulimit -n)"
    return "free space there, or set output_dir to another disk"
