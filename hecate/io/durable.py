"""Durable file operations: after a function of this module has returned, its changes survive a power cut, unless it says otherwise.

Each change is one call of `os`, so that a test can kill the process before any of them. Functions raise OSError unchanged, because
only their callers can say what was being saved.
"""

import contextlib
import ctypes
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from io import FileIO
from pathlib import Path

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def write_durable(path: Path, blocks: Iterable[memoryview | bytes]) -> int:
    """Create `path`, which must not exist, write the blocks to it, fsync and close it. Returns the number of bytes written."""
    return _create(path, blocks, durable=True)


def replace_file(path: Path, blocks: Iterable[memoryview | bytes], *, durable: bool = True, mode: int = 0o644) -> None:
    """Write the blocks to `path`, in place of what is there: a reader sees the old content or the new one, never a part.

    If writing fails, the old file stays.

    Args:
        durable: the new content survives a power cut. False: nobody needs it after one, so that nothing waits for the disk.
        mode: who may read it.
    """
    staged = path.with_name(f"{path.name}.tmp")
    try:
        staged.unlink(missing_ok=True)
        _create(staged, blocks, durable=durable, mode=mode)
        os.rename(staged, path)
    except BaseException:  # Ctrl-C, too
        with contextlib.suppress(OSError):
            staged.unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(path.parent)


def replace_output(path: Path, blocks: Iterable[memoryview | bytes]) -> None:
    """Write the blocks to a file that a user names, as `replace_file`, but not durably.

    A link stays, and the file it leads to is replaced; what is no regular file, such as /dev/stdout, is written to.
    """
    target = Path(os.path.realpath(path))
    if not target.exists() or target.is_file():
        replace_file(target, blocks, durable=False)
        return
    with open(path, "wb") as stream:
        stream.writelines(blocks)


def open_to_append(path: Path) -> FileIO:
    """Open a file to append to, or make it; not durably. A link is not followed: who left it would choose the file that is written to."""
    return FileIO(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644), "ab")


def make_folder(folder: Path) -> None:
    """Make a folder and those above it that there are not, durably. No error if it exists."""
    missing = [path for path in (folder, *folder.absolute().parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Call fsync on a folder, so that the names of its files survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def delete_files(folder: Path) -> None:
    """Delete the files and links in `folder`, then `folder` itself. Raises OSError if it has a subfolder. No error if it does not exist."""
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir(folder):
            os.unlink(folder / name)
        os.rmdir(folder)


@contextlib.contextmanager
def new_folder(folder: Path, *, mark: str = "") -> Iterator[Path]:
    """Create `folder` with all its files or not at all.

    Yields a staging folder beside it, into which the block writes durably. After the block it is renamed to `folder`; if the block, or
    the rename, raises an error or is interrupted, it is deleted.

    Args:
        mark: goes into the name of the staging folder, before a random part.
    """
    staging = folder.with_name(f"{folder.name}.tmp-{mark}{secrets.token_hex(4)}")
    try:
        staging.mkdir(parents=True)
        yield staging
        sync_folder(staging)
        os.rename(staging, folder)
        sync_folder(folder.parent)
    except BaseException:  # Ctrl-C, too
        with contextlib.suppress(OSError):
            delete_files(staging)
        raise


def successor_of(folder: Path) -> Path:
    """The name under which to write what `put_in_place` puts in the place of a folder. What a killed process has left is removed."""
    for left in folder.parent.glob(f"{folder.name}.tmp-*"):
        shutil.rmtree(left, ignore_errors=True)
    return folder.with_name(f"{folder.name}.tmp-next")


def put_in_place(successor: Path, folder: Path) -> None:
    """Put a folder, which is durable, in the place of another one, if that exists, which is then deleted.

    Where the file system can exchange two names, as those of Linux can, one of the two has the name `folder` at any moment.
    """
    if os.path.lexists(folder):
        _exchange(successor, folder)
        sync_folder(folder.parent)
        shutil.rmtree(successor)
    else:
        os.rename(successor, folder)
        sync_folder(folder.parent)


def _exchange(first: Path, second: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "renameat2"):
        failed = libc.renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE)
        if not failed:
            return
    aside = first.with_name(f"{first.name}-old")
    os.rename(second, aside)
    os.rename(first, second)
    os.rename(aside, first)


def _create(path: Path, blocks: Iterable[memoryview | bytes], *, durable: bool, mode: int = 0o644) -> int:
    size = 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        for block in blocks:
            rest = memoryview(block)
            size += len(rest)
            while len(rest):
                rest = rest[os.write(descriptor, rest) :]
        if durable:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return size
