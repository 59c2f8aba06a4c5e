"""A rank whose process is stopped is found, named, and ended where the run can go on without it (`hecate.launch.stopped_ranks`)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from hecate.launch import stopped_ranks
from hecate.launch.stopped_ranks import StoppedRanks
from hecate.ranks.launcher_files import leave_pid, pid_files

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux: /proc")


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


def stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)


def test_a_process_that_runs_between_two_looks_does_not_count() -> None:
    """One that is throttled by SIGSTOP and SIGCONT may be seen stopped at each look."""
    seen = [("T", 50), ("T", 51), ("T", 52), ("T", 52), ("T", 52)]
    found = StoppedRanks()
    with mock.patch.object(stopped_ranks, "_state_of", side_effect=seen), mock.patch.object(time, "monotonic") as clock:
        for now, stopped in ((0.0, {}), (1.0, {}), (2.0, {}), (3.0, {}), (4.0, {7: 2.0})):
            clock.return_value = now
            assert found.look({7: 123}) == stopped


def test_a_process_counts_once_it_has_been_stopped_long_enough(sleeper: subprocess.Popen[bytes]) -> None:
    found = StoppedRanks()
    with mock.patch.object(time, "monotonic", return_value=100.0) as clock:
        assert found.look({3: sleeper.pid}) == {}
        stop(sleeper)
        assert found.look({3: sleeper.pid}) == {}
        clock.return_value = 101.0
        assert found.look({3: sleeper.pid}) == {}, "a second is less than a second and a half"
        clock.return_value = 102.0
        assert found.look({3: sleeper.pid, 4: os.getpid()}) == {3: 2.0}
        sleeper.send_signal(signal.SIGCONT)
        os.waitid(os.P_PID, sleeper.pid, os.WCONTINUED)
        assert found.look({3: sleeper.pid}) == {}
        stop(sleeper)
        assert found.look({3: sleeper.pid}) == {}, "what it was stopped before does not count"


def test_ranks_leave_their_numbers_for_their_launcher(tmp_path: Path) -> None:
    leave_pid(tmp_path, 2)
    (tmp_path / "pid-3").touch()
    assert pid_files(tmp_path) == {2: os.getpid()}, "what is being written is not read"
