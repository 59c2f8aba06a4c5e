"""Ranks that connect under NCCL give up a rank that is lost meanwhile, and what they have left does not disturb the next ranks."""

from __future__ import annotations

import threading
import time
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from hecate.elastic.connecting import connect_while_wanted
from hecate.ranks.backend import forget_groups
from hecate.ranks.ranks import Ranks, connect, lost_a_peer
from testing.ranks import run_ranks
from tests.hecate.ranks.stand_in import gloo_as_nccl

LONG = timedelta(seconds=60)


def test_what_connects_returns_or_raises_is_passed_on() -> None:
    ranks: Any = object()
    assert connect_while_wanted(lambda: ranks, lambda: True) is ranks

    def fail() -> Ranks:
        raise dist.DistNetworkError("no way")

    with pytest.raises(dist.DistNetworkError, match="no way"):
        connect_while_wanted(fail, lambda: True)


def lose_one(rank: int, world: int, folder: str, reason: str) -> tuple[str, bool, bool, float]:
    """Rank 0 waits in a call of C++ for rank 1 and gives it up. Then the late rank connects, and at last rank 0 with another one."""
    dist.destroy_process_group()
    first, again = dist.FileStore(f"{folder}/first", 2), dist.FileStore(f"{folder}/again", 2)
    with gloo_as_nccl():
        if rank == 1:
            again.wait(["left"], LONG)
            with pytest.raises(RuntimeError):  # the ranks have more than one group
                connect(first, 1, 2, limit=timedelta(seconds=3))
            return "", True, True, 3.0
        if rank == 2:
            again.wait(["ended"], LONG)
            total = connect(again, 1, 2, limit=LONG).all_max(3.0)
            forget_groups()
            return "", True, True, total
        began = time.monotonic()
        wanted = (lambda: time.monotonic() < began + 0.3) if reason == "lost" else (lambda: True)
        with pytest.raises(dist.DistError) as raised:
            connect_while_wanted(lambda: connect(first, 0, 2, limit=LONG), wanted, timedelta(seconds=0.3 if reason == "late" else 60))
        (thread,) = [thread for thread in threading.enumerate() if thread.name == "hecate-connect"]
        forget_groups()
        again.set("left", "1")
        thread.join(60)
        undisturbed = not thread.is_alive() and not dist.is_initialized()
        again.set("ended", "1")
        total = connect(again, 0, 2, limit=LONG).all_max(1.0) if undisturbed else 0.0
        forget_groups()
    return str(raised.value), lost_a_peer(raised.value), undisturbed, total


@pytest.mark.parametrize(("reason", "text"), [("lost", "another rank was lost while"), ("late", "not connected within 0:00:00.3")])
def test_a_rank_that_never_connects_is_given_up(tmp_path: Any, reason: str, text: str) -> None:
    (said, loss, undisturbed, total), _, (_, _, _, other) = run_ranks(3, lose_one, str(tmp_path), reason)
    assert text in said
    assert loss, "the run would end with it"
    assert undisturbed, "the thread that was given up has made groups"
    assert total == other == 3.0
