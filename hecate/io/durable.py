"""Durable writes, and reads that stay inside a folder: the only place that touches the disk for checkpoints.

Everything goes through `os` calls one by one, so that a test can stop the process before each of them. Writers raise
OSError as it comes; who knows what was being saved turns it into a message.
"""

import contextlib
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from hecate.checkpoint.errors import CheckpointError


def write_durable(path: Path, blocks: Iterable[memoryview | bytes]) -> int:
    """Create `path`, which must not exist, write the blocks into it, fsync, close. Returns the bytes written."""
    size = 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        for block in blocks:
            rest = memoryview(block)
            size += len(rest)
            while len(rest):
                rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return size


def sync_folder(folder: Path) -> None:
    """fsync a folder: the names in it survive a power cut afterwards."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def delete_files(folder: Path) -> None:
    """Delete the files and links of `folder`, then `folder`. A subfolder in it is an OSError."""
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir(folder):
            os.unlink(folder / name)
        os.rmdir(folder)


@contextlib.contextmanager
def open_inside(folder: Path, name: str) -> Iterator[int]:
    """Descriptor of the plain file `name` in `folder`; CheckpointError for a link, pipe or folder in its place."""
    path = folder / name
    assert Path(name).name == name, f"{name!r} is not a bare file name"
    try:
        # O_NONBLOCK: opening a pipe that someone left there must not wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: the file is missing") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be opened as a plain file: {error.strerror} (a link is not followed)") from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise CheckpointError(f"{path}: not a plain file")
        yield descriptor
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    finally:
        os.close(descriptor)


def read_small(folder: Path, name: str, limit: int) -> bytes:
    """The bytes of the plain file `name` in `folder`, which may hold at most `limit` bytes."""
    with open_inside(folder, name) as descriptor:
        size = os.fstat(descriptor).st_size
        if size > limit:
            raise CheckpointError(f"{folder / name}: {size} bytes, more than the {limit} such a file may have")
        data = bytearray(size)
        count = read_at(descriptor, memoryview(data), 0)
    return bytes(data[:count])


def read_at(descriptor: int, into: memoryview, offset: int) -> int:
    """Fill `into` from the file's `offset` on. Returns the bytes read: fewer only at the end of the file."""
    done = 0
    while done < len(into):
        count = os.preadv(descriptor, [into[done:]], offset + done)
        if count == 0:
            break
        done += count
    return done
