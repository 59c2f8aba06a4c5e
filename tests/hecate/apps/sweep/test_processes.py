"""The processes of a sweep: what follows from the way in which each ends. A small program stands in for `hecate train`."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from hecate.apps.sweep.checks import checked_configs
from hecate.apps.sweep.sweep_file import load_run_sweep
from hecate.config import Config
from hecate.errors import UserError
from hecate.launch.many_runs import processes
from hecate.launch.many_runs.devices import check_ranks, check_share, places_environment, visible_gpus
from hecate.launch.many_runs.ledger import at_work, read_entries, working_alone
from hecate.launch.many_runs.processes import reason_of, train_runs

STAND_IN = """
import os, pathlib, signal, sys, time
given = dict(one.split("=", 1) for one in sys.argv[1:] if "=" in one)
folder = pathlib.Path(given["output_dir"].strip('"'))
with open("calls.txt", "a") as calls:
    print(folder.name, given.get("resume", "new"), os.environ.get("OMP_NUM_THREADS", "-"), file=calls, flush=True)
(folder / "metrics.jsonl").touch()
if pathlib.Path("mended").exists():
    sys.exit(0)
if given["lora.r"] == "2":
    sys.exit("hecate: run.yaml: no such model")
if given["lora.r"] == "4":
    stopped = []
    signal.signal(signal.SIGINT, lambda *_: stopped.append(1))
    (folder / "checkpoint-1").mkdir(exist_ok=True)
    print("ready", flush=True)
    while not stopped:
        time.sleep(0.01)
    sys.exit(130)
"""


@pytest.fixture
def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (folder / "stand_in.py").write_text(STAND_IN, encoding="utf-8")
    monkeypatch.setattr(processes, "PROGRAM", (sys.executable, "stand_in.py"))
    monkeypatch.setattr(processes, "latest_good", lambda root: next(root.glob("checkpoint-*"), None))
    monkeypatch.setattr(processes, "_POLL_SECONDS", 0.01)
    return folder


def sweep(folder: Path, ranks: str, *overrides: str, variables: Mapping[str, str] | None = None) -> tuple[int, list[str]]:
    """The exit status, and what was said."""
    (folder / "sweep.yaml").write_text(f"run: run.yaml\noutput_dir: runs\ngrid: {{lora.r: {ranks}}}\n", encoding="utf-8")
    loaded, said = load_run_sweep("sweep.yaml", overrides), []
    configs = checked_configs(loaded, read_entries(loaded), lambda config: None)

    def environment(place: int, config: Config) -> Mapping[str, str]:
        return variables or {}

    return train_runs(loaded, configs, ["train"], environment, said.append), said


def states(folder: Path) -> dict[str, str]:
    return {name: entry.state.value for name, entry in read_entries(load_run_sweep("sweep.yaml")).items()}


def calls(folder: Path) -> list[str]:
    found = (folder / "calls.txt").read_text(encoding="utf-8").splitlines()
    (folder / "calls.txt").unlink()
    return sorted(found)


def interrupt_when(ready: Path) -> threading.Thread:
    """Send this process SIGINT once the file says "ready"."""

    def wait() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (ready.exists() and "ready" in ready.read_text(encoding="utf-8")):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_the_same_command_goes_on_with_what_is_not_finished(stand_in: Path) -> None:
    """The run of rank 2 fails, that of rank 4 is stopped by Ctrl-C, which leaves the last one for the next call."""
    thread = interrupt_when(stand_in / "runs/sweep/r-4.log")
    status, said = sweep(stand_in, "[1, 2, 4, 8]", variables={"OMP_NUM_THREADS": "1"})
    thread.join()
    assert status == 130
    assert states(stand_in) == {"r-1": "finished", "r-2": "failed", "r-4": "stopped"}
    assert any(line.startswith("r-2: failed after") and line.endswith("status 1: hecate: run.yaml: no such model") for line in said)
    assert calls(stand_in) == ["r-1 new 1", "r-2 new 1", "r-4 new 1"]
    (stand_in / "mended").touch()
    status, said = sweep(stand_in, "[1, 2, 4, 8]", "jobs=2", variables={"OMP_NUM_THREADS": "1"})
    assert status == 0
    assert said[0] == "sweep of 4 runs, 1 of them finished already"
    assert calls(stand_in) == ["r-2 new 1", "r-4 true 1", "r-8 new 1"]
    assert (stand_in / "runs/sweep/r-2.before-1/metrics.jsonl").exists()  # it had left no checkpoint
    assert set(states(stand_in).values()) == {"finished"}
    with pytest.raises(UserError, match=r"runs/r-1: was begun with other values: max_steps was 10, and is 20 now\n.*another output_dir"):
        sweep(stand_in, "[1, 2, 4, 8]", "max_steps=20")
    assert sweep(stand_in, "[1, 2, 4, 8]", "save_steps=5")[0] == 0  # changes no figure
    assert not (stand_in / "calls.txt").exists()


def test_a_failed_run_lets_the_others_go_on_and_is_in_the_exit_status(stand_in: Path) -> None:
    assert sweep(stand_in, "[2, 8]")[0] == 1
    assert states(stand_in) == {"r-2": "failed", "r-8": "finished"}


def test_a_run_that_fails_again_says_why_again(stand_in: Path) -> None:
    """It begins anew, and its log with it."""
    for _ in range(2):
        status, said = sweep(stand_in, "[2]")
        assert status == 1
        assert any(line.endswith("status 1: hecate: run.yaml: no such model") for line in said), said


def test_there_may_be_more_places_than_runs(stand_in: Path) -> None:
    assert sweep(stand_in, "[1, 8]", "jobs=5")[0] == 0
    assert states(stand_in) == {"r-1": "finished", "r-8": "finished"}


def test_one_sweep_at_a_time_works_in_a_folder(stand_in: Path) -> None:
    assert not at_work("runs")
    with working_alone("runs"):
        assert at_work("runs")
        with pytest.raises(UserError, match="another hecate sweep or federate, or a run that one has started, is at work"):
            sweep(stand_in, "[1]")
    assert not at_work("runs")


def test_the_reason_is_the_last_error() -> None:
    rank = "hecate: rank 0 of 2 ended with status 1; the run is stopped; resume=true goes on from its last checkpoint, if any"
    assert reason_of(f"step 1\nTraceback ...\n  x = 1\ntorch.OutOfMemoryError: no room\n{rank}\n") == "torch.OutOfMemoryError: no room"
    assert reason_of(f"step 1\n{rank}\n") == rank
    assert reason_of("step 1\nKilled\n") == "Killed"
    assert reason_of("") == "it has printed nothing"


def test_runs_at_once_share_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("hecate.launch.many_runs.devices.usable_cores", lambda: 16)
    gpus = ["0", "1", "2", "3", "4"]
    assert [places_environment(place, 2, gpus, 2) for place in (0, 1)] == [{"CUDA_VISIBLE_DEVICES": "0,1"}, {"CUDA_VISIBLE_DEVICES": "2,3"}]
    assert places_environment(1, 2, [], 4) == {"OMP_NUM_THREADS": "2"}
    assert places_environment(0, 1, gpus, 4) == {}
    check_ranks(2, 2, gpus)
    with pytest.raises(UserError, match="nproc: 3 ranks, but with jobs: 2 each run gets 2 of 5 GPUs"):
        check_ranks(3, 2, gpus)
    with pytest.raises(UserError, match="jobs: 6 runs at once, but this machine has 5 GPUs"):
        check_share(6, gpus)
    monkeypatch.setenv("HECATE_COLLECTIVES", "gloo")
    assert visible_gpus() == []
