"""The key-value store where the ranks of one generation meet to connect: a file on one machine, a server on several."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from pathlib import Path

import torch.distributed as dist

from hecate.ranks.backend import chosen_backend
from hecate.ranks.job_store import JobStore
from hecate.ranks.launcher_files import MEETING_VARIABLE, STORE_VARIABLE, TOKEN_VARIABLE, store_of

_TIMEOUT = timedelta(seconds=60)
CONNECT_LIMIT = timedelta(seconds=30)
"""How long ranks that have all arrived wait for one that does not connect, before they try with those that are left."""
_SLICE = timedelta(seconds=0.2)
_WATCHED: list[dist.Store] = []
"""The watched stores, kept until the process ends: torch's own parts of a store do not keep its Python part alive."""


def meeting_store(generation: int, world_size: int) -> dist.Store:
    """The store of a generation of ranks whose launcher has named a file or, on several nodes, a server in the environment.

    Raises:
        DistError: the server cannot be reached.
    """
    if MEETING_VARIABLE in os.environ:
        host, _, port = os.environ[MEETING_VARIABLE].rpartition(":")
        return meet(host, int(port), os.environ[TOKEN_VARIABLE], generation)
    return dist.FileStore(str(store_of(Path(os.environ[STORE_VARIABLE]), generation)), world_size)


def watched(store: dist.Store, wanted: Callable[[], bool]) -> dist.Store:
    """The store with waits of at most `CONNECT_LIMIT`, which with gloo end at once where `wanted` returns False.

    NCCL asks its store in later steps, too, from threads that should not wait for Python.
    """
    store.set_timeout(CONNECT_LIMIT)
    return WatchedStore(store, wanted, CONNECT_LIMIT) if chosen_backend() == "gloo" else store


class WatchedStore(dist.Store):
    """A store whose waits end when they have become useless. gloo waits in it for the addresses of ranks, of which one may be lost."""

    def __init__(self, store: dist.Store, wanted: Callable[[], bool], limit: timedelta) -> None:
        """
        Args:
            wanted: asked several times a second by whatever waits; if it returns False, the wait ends with a `dist.DistError`.
            limit: the longest wait.
        """
        super().__init__()
        self._store, self._wanted, self._limit = store, wanted, limit
        _WATCHED.append(self)

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:  # type: ignore[override]
        deadline = time.monotonic() + (timeout or self._limit).total_seconds()
        while True:
            try:
                self._store.wait(keys, _SLICE)
            except dist.DistNetworkError:
                raise
            except RuntimeError:  # not set yet; a file store has no error of its own for that
                if not self._wanted():
                    raise dist.DistStoreError("another rank was lost while the ranks connected") from None
                if time.monotonic() > deadline:
                    raise
            else:
                return

    def get(self, key: str) -> bytes:
        self.wait([key])
        return self._store.get(key)

    def set(self, key: str, value: str | bytes) -> None:  # type: ignore[override]
        self._store.set(key, value)  # type: ignore[arg-type]  # torch's stores take bytes, too

    def add(self, key: str, amount: int) -> int:
        return self._store.add(key, amount)

    def check(self, keys: list[str]) -> bool:
        return self._store.check(keys)

    def delete_key(self, key: str) -> bool:
        return self._store.delete_key(key)

    def clone(self) -> WatchedStore:
        return self


def meet(host: str, port: int, secret: str, generation: int) -> dist.Store:
    """Connect to the part of a server's store that one generation uses. A late rank of an earlier one, in another part, meets nobody."""
    return dist.PrefixStore(f"generation-{generation}", _client(host, port, secret))


@cache
def _client(host: str, port: int, secret: str) -> JobStore:
    """The process's client of a server, the same for all generations; the cache keeps it alive, as `_WATCHED` does."""
    return JobStore(host, port, secret.encode(), _TIMEOUT)
