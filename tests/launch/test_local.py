"""The local launcher: exit codes, who is blamed, nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

# A stand-in for `python -m hecate`: what a rank does is the first argument.
RANK = """
import os, sys, time, pathlib
what, folder = sys.argv[1:3]
rank = os.environ["RANK"]
if what == "wait":
    from hecate.train.ranks import die_with_parent
    die_with_parent()
pathlib.Path(folder, f"rank-{rank}").write_text(f"{os.getpid()} {os.environ['WORLD_SIZE']} {os.environ['GLOO_SOCKET_IFNAME']}")
store = pathlib.Path(os.environ["HECATE_STORE"])
if what == "crash" and rank == "1":
    sys.exit(7)
if what == "mistake" and rank == "1":
    store.with_name("error-1").write_text("hecate: rank 1 met it alone")
    sys.exit(2)
if what == "wait" or rank == "0" and what == "crash":
    time.sleep(60)
"""


def launch(folder: Path, what: str) -> subprocess.Popen[str]:
    """launch_local with the stand-in for the ranks' program."""
    program = folder / "rank.py"
    program.write_text(RANK, encoding="utf-8")
    code = (
        "import subprocess, sys\n"
        "from hecate.launch import local\n"
        "plain = subprocess.Popen\n"
        f"local.subprocess.Popen = lambda command, env: plain([sys.executable, {str(program)!r}, *command[3:]], env=env)\n"
        f"sys.exit(local.launch_local([{what!r}, {str(folder)!r}], 2))\n"
    )
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)


def started(folder: Path) -> list[int]:
    """Process ids of the two ranks, once both run."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        texts = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("rank-*"))]
        if len(texts) == 2 and all(texts):
            assert [text.split()[1:] for text in texts] == [["2", "lo"]] * 2
            return [int(text.split()[0]) for text in texts]
        time.sleep(0.05)
    raise AssertionError("the ranks did not start")


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_all_ranks_done_is_success(tmp_path: Path) -> None:
    process = launch(tmp_path, "fine")
    assert process.wait(timeout=60) == 0


def test_a_crash_is_named_and_the_others_are_stopped(tmp_path: Path) -> None:
    process = launch(tmp_path, "crash")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "rank 1 of 2 ended with status 7" in errors
    assert all(gone(pid) for pid in started(tmp_path))


def test_a_mistake_that_only_another_rank_met_is_shown(tmp_path: Path) -> None:
    process = launch(tmp_path, "mistake")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "rank 1 met it alone" in errors


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the death signal of a parent is Linux's")
def test_killing_the_launcher_leaves_no_rank(tmp_path: Path) -> None:
    process = launch(tmp_path, "wait")
    pids = started(tmp_path)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(timeout=30)
    deadline = time.monotonic() + 10
    while not all(gone(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert all(gone(pid) for pid in pids)
