"""Reads of a checkpoint's files that never leave its folder, and the error for all that can be wrong with them."""

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from hecate.errors import UserError


class CheckpointError(UserError):
    """A checkpoint that cannot be written, or cannot be trusted when read. Names the file, and the tensor if any."""


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
