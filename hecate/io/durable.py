"""Durable writes: what a function here has written survives a power cut once it has returned.

Everything goes through `os` calls one by one, so that a test can stop the process before each of them. The functions raise OSError as it
comes; their callers can say what was being saved.
"""

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path


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
