"""A worker of a Ray job whose process is stopped is found on its node, and ended there (`hecate.launch.ray_job.node_watch`)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from hecate.launch import stopped_ranks
from hecate.launch.ray_job.node_watch import NodeWatch, NodeWatches

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux: /proc")


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is stopped, for long enough at the second look."""
    monkeypatch.setattr(stopped_ranks, "STOPPED_SECONDS", 0.0)
    with subprocess.Popen(["sleep", "60"]) as process:
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
        yield process
        process.kill()


def test_on_the_controllers_node_it_is_found_and_only_what_was_found_is_ended(stopped: subprocess.Popen[bytes]) -> None:
    ray: Any = None
    watches = NodeWatches(ray, "here")
    with subprocess.Popen(["sleep", "60"]) as awake:
        workers = {"here": {5: awake.pid, 6: stopped.pid}}
        watches.look(workers)
        assert set(watches.look(workers)) == {6}
        watches.end(5)
        watches.end(6)
        assert stopped.wait(30) == -signal.SIGKILL
        assert awake.poll() is None, "Ray ends it"
        awake.kill()


def test_the_actor_of_another_node_says_and_ends_what_it_was_told_to_watch(stopped: subprocess.Popen[bytes]) -> None:
    actor = NodeWatch()
    actor.watch({3: os.getpid(), 4: stopped.pid})
    number, seconds = next(actor.stopped())
    assert number == 4
    assert seconds > 0
    actor.end(7)
    actor.end(4)
    assert stopped.wait(30) == -signal.SIGKILL
