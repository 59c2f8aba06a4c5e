"""A folder for what the processes of one run share while they live, gone when their launcher is gone, however that ends."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_REMOVE = 'trap "" INT TERM HUP; read _; for _ in 1 2 3 4 5 6 7 8 9; do rm -rf -- "$1" && break; sleep 1; done 2> /dev/null'
"""again, while processes that are about to die still write there"""


@contextmanager
def run_folder(within: str | None = None) -> Iterator[Path]:
    """The folder. A small process removes it when this one leaves the block or dies, even by SIGKILL.

    Args:
        within: left out: where temporary files go.
    """
    folder = tempfile.mkdtemp(prefix="hecate-", dir=within)
    # Else torch leaves a folder for kernels that it compiles, of which there are none, beside this one.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(folder, "inductor"))
    with subprocess.Popen(["/bin/sh", "-c", _REMOVE, "sh", folder], stdin=subprocess.PIPE, start_new_session=True) as janitor:
        try:
            yield Path(folder)
        finally:
            assert janitor.stdin is not None
            janitor.stdin.close()
