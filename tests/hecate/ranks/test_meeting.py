"""Ranks of one generation meet in a file on one machine, and through a server on several; never those of two generations."""

from __future__ import annotations

import socket
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from hecate.ranks.launcher_files import MEETING_VARIABLE, STORE_VARIABLE
from hecate.ranks.meeting import meeting_store


@pytest.mark.parametrize("nodes", [1, 2])
def test_each_generation_meets_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nodes: int) -> None:
    monkeypatch.setenv(STORE_VARIABLE, str(tmp_path / "store"))
    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    # The server ends with the object.
    server = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach())
    if nodes > 1:
        monkeypatch.setenv(MEETING_VARIABLE, f"127.0.0.1:{port}")
    first, again, next_one = meeting_store(0, 2), meeting_store(0, 2), meeting_store(1, 2)
    for store in (first, again, next_one):
        store.set_timeout(timedelta(seconds=5))
    first.set("address", "of rank 0")
    assert again.get("address") == b"of rank 0"
    assert not next_one.check(["address"])
    assert server.check(["generation-0/address"]) == (nodes > 1)
    assert {path.name for path in tmp_path.iterdir()} == (set() if nodes > 1 else {"store-0", "store-1"})


def test_a_server_that_is_gone_is_an_error_that_ranks_expect(monkeypatch: pytest.MonkeyPatch) -> None:
    """They try the next generation after every RuntimeError."""
    monkeypatch.setattr("hecate.ranks.meeting._TIMEOUT", timedelta(seconds=0.2))
    with socket.create_server(("127.0.0.1", 0)) as closed:
        monkeypatch.setenv(MEETING_VARIABLE, f"127.0.0.1:{closed.getsockname()[1]}")
    with pytest.raises(RuntimeError):
        meeting_store(0, 2)
