"""A folder for what the processes of one run share while they live, gone when their launcher is gone, however that ends."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_REMOVE = 'trap "" INT TERM HUP; read _; rm -rf -- "$1"'


@contextmanager
def run_folder() -> Iterator[Path]:
    """The folder. A small process removes it when this one leaves the block or dies, even by SIGKILL."""
    folder = tempfile.mkdtemp(prefix="hecate-")
    with subprocess.Popen(["/bin/sh", "-c", _REMOVE, "sh", folder], stdin=subprocess.PIPE, start_new_session=True) as janitor:
        try:
            yield Path(folder)
        finally:
            assert janitor.stdin is not None
            janitor.stdin.close()
