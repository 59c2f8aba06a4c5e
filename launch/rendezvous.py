"""Where the workers of a job meet: a store in the controller's process, so that no rank's death takes it away."""

from __future__ import annotations

import socket
from datetime import timedelta

import torch.distributed as dist

_TIMEOUT = timedelta(seconds=60)


class Rendezvous:
    """The store's server, listening at one address only. Each generation of workers has a part of it to itself."""

    def __init__(self, host: str) -> None:
        listening = socket.create_server((host, 0))
        self.host, self.port = host, int(listening.getsockname()[1])
        # Given a host alone, the store would listen on all interfaces. It owns the descriptor from here on.
        self._store = dist.TCPStore(
            host, self.port, is_master=True, wait_for_workers=False, timeout=_TIMEOUT, master_listen_fd=listening.detach()
        )


def meet(host: str, port: int, generation: int) -> dist.Store:
    """The store of one generation, as a worker sees it. A worker of an earlier one, back from the dead, meets nobody there."""
    return dist.PrefixStore(
        f"generation-{generation}", dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=_TIMEOUT)
    )
