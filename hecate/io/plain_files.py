"""Read whole files of a bounded size, and plain files alone: who names a pipe, a device or a sparse file of a terabyte gets an error."""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from hecate.errors import UserError

MOST_BYTES = 1 << 26
"""The most bytes of a file that is read as a whole, such as a status: all that are known have less than a tenth of it."""

_PART = 1 << 20


def open_plain(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a file for reading. A link is followed; nothing is waited for.

    Raises:
        OSError: it cannot be opened, or is a folder, a pipe, a socket or a device.
    """
    try:
        # O_NONBLOCK: if the name is a pipe, opening it must not wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError:  # the name has a zero byte
        raise OSError(errno.EINVAL, "there is no file of such a name", str(path)) from None
    kind = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(kind):
        os.close(descriptor)
        if stat.S_ISDIR(kind):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        raise OSError(errno.EINVAL, "it is a pipe or a device; write its content into a file", str(path))
    return os.fdopen(descriptor, "rb")


def read_plain(path: str | os.PathLike[str], most: int = MOST_BYTES) -> bytes:
    """Return the bytes of a file. Raises OSError: as `open_plain`; or the file has more than `most` bytes, none of which is then read."""
    with open_plain(path) as file:
        size, data = os.fstat(file.fileno()).st_size, bytearray()
        # In parts, because a read takes memory for all that it asks for.
        while max(size, len(data)) <= most and (part := file.read(min(_PART, most + 1 - len(data)))):
            data += part
    if size > most or len(data) > most:
        raise OSError(errno.EFBIG, f"it has {size} bytes, and such a file at most {most}", str(path))
    return bytes(data)


def require_plain(path: str | os.PathLike[str], most: int | None = None) -> None:
    """Check a file before a library opens it by its name.

    Raises:
        OSError: as `open_plain`; or the file has more than `most` bytes. None: than the machine has memory.
    """
    with open_plain(path) as file:
        size = os.fstat(file.fileno()).st_size
    most = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if most is None else most
    if size > most:
        raise OSError(errno.EFBIG, f"it has {size} bytes, and such a file here at most {most}", str(path))


def refuse_links(folder: Path) -> None:
    """Check that a run's folder holds no links: what is written there under a name of hecate's own must not land elsewhere.

    Raises:
        UserError: it holds one.
    """
    with suppress(OSError), os.scandir(folder) as entries:  # what is wrong with the folder is said where it is read
        for entry in entries:
            if entry.is_symlink():
                raise UserError(
                    f"{folder}: {entry.name!r} is a link; in a run's folder hecate follows none\n"
                    "  put what it leads to in its place, or remove it"
                )


def read_plain_text(path: str | os.PathLike[str], most: int = MOST_BYTES) -> str:
    """As `read_plain`, as text. Raises UnicodeDecodeError, too: it is not UTF-8."""
    return read_plain(Path(path), most).decode("utf-8")
