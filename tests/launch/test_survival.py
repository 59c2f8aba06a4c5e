"""When ranks or launchers are killed, the run continues or restarts, ends with the same result, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hecate.launch.run_folder import processes_below
from testing.commands import run_hecate
from testing.processes import OVERRIDES, hecate, kill_rank, listening, losses, read_rest, read_until, wait_until_gone
from testing.tiny_run import make_workshop

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux: /proc, and a parent's death signal")
STEPS = 40


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workshop(tmp_path_factory.mktemp("workshop"))


def arguments(workshop: Path, name: str, *overrides: str) -> list[str]:
    return [str(workshop / "config.yaml"), *OVERRIDES, f"output_dir={workshop}/runs/{name}", *overrides]


@pytest.fixture(scope="module")
def whole(workshop: Path) -> dict[int, tuple[float, float]]:
    done = run_hecate(["train", *arguments(workshop, "whole", f"max_steps={STEPS}", "nproc=2")], timeout=240)
    assert done.returncode == 0, done.stderr
    return losses(workshop / "runs/whole")


@pytest.mark.slow
def test_a_launched_run_starts_again_from_its_checkpoint(workshop: Path, whole: dict[int, tuple[float, float]]) -> None:
    temporary = workshop / "tmp-again"
    given = arguments(workshop, "again", f"max_steps={STEPS}", "save_steps=3")
    with hecate("launch", "--nproc-per-node", "2", *given, temporary=temporary) as process:
        read_until(process, "step 5/")
        kill_rank(process.pid, 1)
        printed = read_rest(process)
    assert "rank 1 was killed by SIGKILL; all ranks start again from the last checkpoint" in printed
    assert "resumed after step " in printed
    assert "Traceback" not in printed
    assert losses(workshop / "runs/again") == whole
    assert wait_until_gone([], temporary) == []


def test_those_left_go_on_and_another_takes_the_place(workshop: Path, whole: dict[int, tuple[float, float]]) -> None:
    """Rank 0 of two, which writes the terminal and the metrics, is killed. The other rank goes on alone without losing a step until a third
    process has loaded and joined; then a signal stops both."""
    given = arguments(workshop, "left", "max_steps=100000", "nproc=2", "fssdp.redundancy=1", "logging_steps=1")
    temporary = workshop / "tmp-left"
    with hecate("train", *given, temporary=temporary) as process:
        read_until(process, "step 5/")
        kill_rank(process.pid, 0)
        alone = read_until(process, "2 ranks go on after step")
        if f"step {STEPS}/" not in alone:
            read_until(process, f"step {STEPS}/")
        read_until(process, "step ")
        process.send_signal(signal.SIGTERM)
        printed = read_rest(process, 128 + signal.SIGTERM)
    assert "1 ranks go on" in alone
    assert "Traceback" not in alone + printed
    saved = sorted((workshop / "runs/left").glob("checkpoint-*"))
    assert len(saved) == 1
    assert len(list(saved[0].glob("rank-*-of-00002.safetensors"))) == 2
    steps = losses(workshop / "runs/left")
    for step, values in whole.items():
        assert steps[step] == pytest.approx(values, rel=1e-9), step
    assert wait_until_gone([], temporary) == []


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_the_launcher_saves_the_step_it_comes_in(workshop: Path, number: signal.Signals, status: int) -> None:
    name, temporary = f"signal-{number}", workshop / f"tmp-signal-{number}"
    given = arguments(workshop, name, "max_steps=100000", "logging_steps=1")
    with hecate("launch", "--nproc-per-node", "2", *given, temporary=temporary) as process:
        read_until(process, "step 2/")
        process.send_signal(number)
        printed = read_rest(process, status)
    assert "Traceback" not in printed
    (saved,) = (workshop / "runs" / name).glob("checkpoint-*")
    assert saved.name == f"checkpoint-{max(losses(workshop / 'runs' / name))}"
    assert (saved / "COMMIT").is_file()
    assert wait_until_gone([], temporary) == []


PLAIN_TORCHRUN = (str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc-per-node", "2", "--max-restarts", "1")


@pytest.mark.slow
def test_plain_torchrun_trains_and_goes_on_after_a_restart(workshop: Path, whole: dict[int, tuple[float, float]]) -> None:
    given = arguments(workshop, "plain", f"max_steps={STEPS}", "save_steps=3")
    environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    command = [*PLAIN_TORCHRUN, "-m", "hecate", "train", *given]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment) as process:
        read_until(process, "step 5/")
        (second,) = (pid for pid in processes_below(process.pid) if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes())
        os.kill(second, signal.SIGKILL)
        printed = read_rest(process)
    assert "resumed after step " in printed
    assert losses(workshop / "runs/plain") == whole


@pytest.mark.slow
@pytest.mark.parametrize(("command", "overrides"), [("train", ["nproc=2"]), ("launch", ["nproc=1"])])
def test_a_killed_launcher_leaves_nothing(workshop: Path, command: str, overrides: list[str]) -> None:
    """Other machines cannot reach its processes while they run. For `hecate ray` see test_ray."""
    temporary = workshop / f"tmp-killed-{command}"
    given = arguments(workshop, f"killed-{command}", "max_steps=100000", *overrides)
    with hecate(command, *given, temporary=temporary) as process:
        read_until(process, "step 2/")
        below = processes_below(process.pid)
        assert len(below) >= 2
        assert any(temporary.iterdir()), "there is nothing that could be left"
        assert listening([process.pid, *below]) == {"127.0.0.1"}
        os.kill(process.pid, signal.SIGKILL)
    assert wait_until_gone(below, temporary) == []
