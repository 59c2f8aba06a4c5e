"""Read a checkpoint's files without ever leaving its folder, and the error for everything that can be wrong with a checkpoint."""

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from hecate.errors import UserError


class CheckpointError(UserError):
    """A checkpoint cannot be written, or what was read is not sound. The text names the file, and the tensor if there is one."""


class UnreadableError(CheckpointError):
    """The system did not let a file be read: nothing is known of its content, and another try may succeed."""


_OF_THE_NAME = (errno.ELOOP, errno.ENXIO, errno.ENODEV, errno.ENOTDIR)
"""The errors by which a link or a device in the file's place shows."""


@contextlib.contextmanager
def open_inside(folder: Path, name: str) -> Iterator[int]:
    """Open the plain file `name` in `folder` and yield its descriptor.

    Raises:
        CheckpointError: it is a link, a pipe or a folder.
        UnreadableError: the system does not let it be opened, or in the block be read.
    """
    path = folder / name
    assert Path(name).name == name, f"{name!r} is not a bare file name"
    try:
        # O_NONBLOCK: if the name is a pipe, opening it must not wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: the file is missing") from None
    except OSError as error:
        if error.errno not in _OF_THE_NAME:
            raise _unreadable(path, error) from error
        raise CheckpointError(f"{path}: cannot be opened as a plain file: {error.strerror} (a link is not followed)") from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise CheckpointError(f"{path}: not a plain file")
        yield descriptor
    except OSError as error:
        raise _unreadable(path, error) from error
    finally:
        os.close(descriptor)


def _unreadable(path: Path, error: OSError) -> UnreadableError:
    return UnreadableError(
        f"{path}: cannot be read: {error.strerror}\n"
        "  this says nothing of what is in it: try again; if it stays so, rename the checkpoint, and an older one is taken"
    )


def read_small(folder: Path, name: str, limit: int) -> bytes:
    """Return the bytes of the plain file `name` in `folder`. Raises CheckpointError if it is larger than `limit` bytes."""
    with open_inside(folder, name) as descriptor:
        size = os.fstat(descriptor).st_size
        if size > limit:
            raise CheckpointError(f"{folder / name}: {size} bytes, more than the {limit} such a file may have")
        data = bytearray(size)
        count = read_at(descriptor, memoryview(data), 0)
    return bytes(data[:count])


def read_at(descriptor: int, into: memoryview, offset: int) -> int:
    """Read from the file's `offset` until `into` is full. Returns the number of bytes read, which is smaller only at the file's end."""
    done = 0
    while done < len(into):
        count = os.preadv(descriptor, [into[done:]], offset + done)
        if count == 0:
            break
        done += count
    return done
