"""The key-value store where the ranks of one generation meet to connect: a file on one machine, a server on several."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from hecate.ranks.launcher_files import MEETING_VARIABLE, STORE_VARIABLE, store_of

_TIMEOUT = timedelta(seconds=60)


def meeting_store(generation: int, world_size: int) -> dist.Store:
    """The store of a generation of ranks whose launcher has named a file or, on several nodes, a server in the environment.

    Raises:
        RuntimeError: the server cannot be reached.
    """
    if MEETING_VARIABLE in os.environ:
        host, _, port = os.environ[MEETING_VARIABLE].rpartition(":")
        return meet(host, int(port), generation)
    return dist.FileStore(str(store_of(Path(os.environ[STORE_VARIABLE]), generation)), world_size)


def meet(host: str, port: int, generation: int) -> dist.Store:
    """Connect to the part of a server's store that one generation uses. A late rank of an earlier one, in another part, meets nobody."""
    return dist.PrefixStore(
        f"generation-{generation}", dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=_TIMEOUT)
    )
