"""Ranks of one generation meet in a file on one machine, and through a server on several; never those of two generations."""

from __future__ import annotations

import socket
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from hecate.ranks.job_store import JobStore, StoreServer
from hecate.ranks.launcher_files import MEETING_VARIABLE, STORE_VARIABLE, TOKEN_VARIABLE
from hecate.ranks.meeting import WatchedStore, meeting_store

SECRET = "the secret of this test, and long"


@pytest.mark.parametrize("nodes", [1, 2])
def test_each_generation_meets_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nodes: int) -> None:
    monkeypatch.setenv(STORE_VARIABLE, str(tmp_path / "store"))
    server = StoreServer("127.0.0.1", 0, SECRET.encode())
    if nodes > 1:
        monkeypatch.setenv(MEETING_VARIABLE, f"127.0.0.1:{server.port}")
        monkeypatch.setenv(TOKEN_VARIABLE, SECRET)
    first, again, next_one = meeting_store(0, 2), meeting_store(0, 2), meeting_store(1, 2)
    for store in (first, again, next_one):
        store.set_timeout(timedelta(seconds=5))
    first.set("address", "of rank 0")
    assert again.get("address") == b"of rank 0"
    assert not next_one.check(["address"])
    seen = JobStore("127.0.0.1", server.port, SECRET.encode(), timedelta(seconds=5)).check(["generation-0/address"])
    assert seen == (nodes > 1)
    assert {path.name for path in tmp_path.iterdir()} == (set() if nodes > 1 else {"store-0", "store-1"})


def test_a_server_that_is_gone_is_an_error_that_ranks_expect(monkeypatch: pytest.MonkeyPatch) -> None:
    """They try the next generation after every RuntimeError."""
    monkeypatch.setattr("hecate.ranks.meeting._TIMEOUT", timedelta(seconds=0.2))
    monkeypatch.setenv(TOKEN_VARIABLE, SECRET)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        monkeypatch.setenv(MEETING_VARIABLE, f"127.0.0.1:{closed.getsockname()[1]}")
    with pytest.raises(RuntimeError):
        meeting_store(0, 2)


@pytest.mark.parametrize("kind", ["file", "server"])
def test_a_watched_store_is_one_whose_waits_end_when_they_are_useless(tmp_path: Path, kind: str) -> None:
    """gloo's ranks would wait in it for a rank that was lost, and nothing else interrupts them."""
    server = StoreServer("127.0.0.1", 0, SECRET.encode())
    ours = JobStore("127.0.0.1", server.port, SECRET.encode(), timedelta(seconds=30))
    base = ours if kind == "server" else dist.FileStore(str(tmp_path / "store"), 2)
    wanted = [True]
    store = WatchedStore(dist.PrefixStore("generation-1", base), lambda: wanted[-1], timedelta(seconds=0.5))
    store.set("address", b"\x00\xff")
    assert store.get("address") == b"\x00\xff"
    assert (store.add("n", 2), store.check(["n"]), store.check(["m"])) == (2, True, False)
    with pytest.raises(RuntimeError, match=r"Wait timeout|nobody has set them"):
        store.get("never")
    wanted.append(False)
    began = time.monotonic()
    with pytest.raises(dist.DistError, match="another rank was lost while the ranks connected"):
        store.wait(["never"], timedelta(days=1))
    assert time.monotonic() - began < 60
