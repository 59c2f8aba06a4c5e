"""The local launcher: exit codes, which rank is reported as the cause, and that nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from testing.processes import wait_until_gone

# A stand-in for `hecate`: what a rank does is the first argument.
RANK = """
import os, sys, time, pathlib
what, folder = sys.argv[1:3]
rank = os.environ["RANK"]
if what == "wait":
    from hecate.io.process_end import die_with_parent
    die_with_parent(os.getppid())
given = [os.environ.get(name) for name in ("WORLD_SIZE", "GLOO_SOCKET_IFNAME", "PYTORCH_ALLOC_CONF")]
pathlib.Path(folder, f"rank-{rank}").write_text(f"{os.getpid()} {' '.join(map(str, given))}")
store = pathlib.Path(os.environ["HECATE_STORE"])
if what == "crash" and rank == "1":
    sys.exit(7)
if what == "mistake" and rank == "1":
    store.with_name("error-1").write_text("hecate: rank 1 met it alone")
    sys.exit(2)
if what == "failure" and rank == "0":
    sys.exit(3)
if what == "failure":
    time.sleep(1)
    store.with_name("failure-1").write_text("OSError: no such device")
    sys.exit(1)
if what == "refuse":
    sys.exit(2)
if what == "wait" or rank == "0" and what == "crash":
    time.sleep(60)
"""


def launch(folder: Path, what: str, *first: str) -> subprocess.Popen[str]:
    """launch_local with the stand-in for the ranks' program, which does `first` before the ranks."""
    program = folder / "rank.py"
    program.write_text(RANK, encoding="utf-8")
    code = (
        "import contextlib, sys\n"
        "from hecate.launch import local_launcher\n"
        f"local_launcher.forking = lambda *_: contextlib.nullcontext((sys.executable, {str(program)!r}))\n"
        f"sys.exit(local_launcher.launch_local('stand-in', [{what!r}, {str(folder)!r}], 2, first={first!r}))\n"
    )
    (folder / "tmp").mkdir()
    environment = {**os.environ, "TMPDIR": str(folder / "tmp")}
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, env=environment)


def started(folder: Path) -> list[int]:
    """Process ids of the two ranks, once both run."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        texts = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("rank-*"))]
        if len(texts) == 2 and all(texts):
            assert [text.split()[1:] for text in texts] == [["2", "lo", "expandable_segments:True"]] * 2
            return [int(text.split()[0]) for text in texts]
        time.sleep(0.05)
    raise AssertionError("the ranks did not start")


def test_all_ranks_done_is_success(tmp_path: Path) -> None:
    process = launch(tmp_path, "fine")
    assert process.wait(timeout=60) == 0


def test_no_rank_is_started_if_what_comes_first_fails(tmp_path: Path) -> None:
    (tmp_path / "alone").mkdir()
    process = launch(tmp_path, "fine", "refuse", str(tmp_path / "alone"))
    assert process.wait(timeout=60) == 2
    assert [str(file.relative_to(tmp_path)) for file in tmp_path.rglob("rank-*")] == ["alone/rank-0"]


def test_the_ranks_are_started_after_what_comes_first(tmp_path: Path) -> None:
    (tmp_path / "alone").mkdir()
    process = launch(tmp_path, "fine", "fine", str(tmp_path / "alone"))
    assert process.wait(timeout=60) == 0
    assert sorted(file.name for file in tmp_path.rglob("rank-*")) == ["rank-0", "rank-0", "rank-1"]


def test_a_crash_is_named_and_the_others_are_stopped(tmp_path: Path) -> None:
    process = launch(tmp_path, "crash")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "rank 1 of 2 ended with status 7" in errors
    assert wait_until_gone(started(tmp_path), tmp_path / "tmp") == []


def test_of_ranks_that_end_before_the_one_that_they_have_lost_none_is_named(tmp_path: Path) -> None:
    process = launch(tmp_path, "failure")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "rank 1 of 2 failed with OSError: no such device; the run is stopped" in errors


def test_a_mistake_that_only_another_rank_met_is_shown(tmp_path: Path) -> None:
    process = launch(tmp_path, "mistake")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "rank 1 met it alone" in errors


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the death signal of a parent is Linux's")
def test_killing_the_launcher_leaves_no_rank_and_no_file(tmp_path: Path) -> None:
    process = launch(tmp_path, "wait")
    pids = started(tmp_path)
    assert list((tmp_path / "tmp").iterdir())
    os.kill(process.pid, signal.SIGKILL)
    process.wait(timeout=30)
    assert wait_until_gone(pids, tmp_path / "tmp") == []


def test_a_signal_is_answered_at_once(tmp_path: Path) -> None:
    process = launch(tmp_path, "wait")
    pids = started(tmp_path)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert errors.count("stopping: the ranks finish their step and save; a second signal ends them at once\n") == 1
    assert errors.endswith("hecate: the ranks ended before they could save; resume=true goes on from the run's last checkpoint, if any\n")
    assert process.returncode == 128 + signal.SIGINT, "ranks that have not begun know nothing of signals"
    assert wait_until_gone(pids, tmp_path / "tmp") == []


CYCLES = """
import contextlib, os, sys
from pathlib import Path
from hecate.launch import local_launcher
from hecate.launch.membership.job_policy import JobPolicy
def held():
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), len(children), os.listdir(os.environ["TMPDIR"])
local_launcher.forking = lambda *_: contextlib.nullcontext(("/bin/true",))
before = held()
for cycle in range(int(sys.argv[1])):
    assert local_launcher.launch_local("stand-in", [], 2, JobPolicy(copied=cycle % 2 == 1)) == 0
assert held() == before, (before, held())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts in /proc")
def test_starting_and_stopping_leaks_nothing(tmp_path: Path) -> None:
    """HECATE_CYCLES=50 for more of them."""
    cycles = os.environ.get("HECATE_CYCLES", "10")
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", CYCLES, cycles], env=environment, check=True, timeout=300)
