"""Keeps two runs out of one folder: both would write the same files, and each would take the other's checkpoints for damaged."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hecate.errors import UserError

_log = logging.getLogger(__name__)


@contextmanager
def one_writer(folder: str) -> Iterator[None]:
    """Hold a run's folder until the end of the block, or of this process. It is made if need be, and removed if nothing was put into it.

    Nothing is left in the folder: the lock is on the folder itself, which file systems of one machine allow, and some of several refuse. A
    line says so then, and nobody is held out.

    Raises:
        UserError: another run has it, or it cannot be made.
    """
    path = Path(folder)
    missing = [parent for parent in (path, *path.parents) if not parent.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        held = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise UserError(f"output_dir: {folder}: {error.strerror or error}") from None
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"output_dir: {folder}: another run is writing to it\n  wait for its end or stop it, or choose another output_dir"
            ) from None
        except OSError as error:
            _log.warning(f"hecate: output_dir: {folder}: cannot be locked ({error.strerror}), so nothing keeps another run out of it")
        yield
    finally:
        os.close(held)
        with suppress(OSError):
            for parent in missing:
                parent.rmdir()
