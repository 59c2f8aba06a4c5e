"""When a launcher is killed, its folder and the processes that it has named are removed, but no other process that has got their number."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hecate.launch.run_folder import start_time
from testing.processes import command_line, wait_until_gone

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")

LAUNCHER = """
import subprocess, sys, time
from hecate.launch import run_folder
own, stranger = (subprocess.Popen(["sleep", "600"], start_new_session=True) for _ in range(2))
real = run_folder.start_time
# As if a process of the launcher had ended, and the stranger had been given its number since.
run_folder.start_time = lambda pid: "1" if pid == stranger.pid else real(pid)
with run_folder.run_folder() as folder, run_folder.ending_with_launcher(folder, [own.pid, stranger.pid]):
    print(own.pid, stranger.pid, flush=True)
    time.sleep(600)
"""


def test_a_killed_launcher_takes_its_processes_and_no_stranger_along(tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", LAUNCHER], stdout=subprocess.PIPE, text=True, env=environment) as launcher:
        assert launcher.stdout is not None
        own, stranger = map(int, launcher.stdout.readline().split())
        launcher.kill()
    try:
        assert wait_until_gone([own], tmp_path) == []
        assert command_line(stranger).startswith("sleep")
    finally:
        os.kill(stranger, signal.SIGKILL)


def test_a_start_time_tells_two_processes_of_one_number_apart() -> None:
    assert int(start_time(os.getpid())) > int(start_time(1)) >= 0
    with pytest.raises(OSError, match=r".*"):
        start_time(2**22 + 1)
