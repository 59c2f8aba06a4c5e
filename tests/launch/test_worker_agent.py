"""A worker and its agent: what each sees of the other's end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hecate.launch.run_folder import processes_below
from hecate.launch.worker_agent import WorkerAgent
from tests.launch.processes import wait_until_gone

AGENT = """
import sys, time
from hecate.launch.worker_agent import WorkerAgent
agent = WorkerAgent("", 1, "127.0.0.1")
print(agent.ping(), flush=True)
time.sleep(60)
"""


@pytest.fixture
def agent() -> Any:
    made = WorkerAgent("", 1, "127.0.0.1")
    assert made.ping() is True
    yield made
    made._process.kill()
    made._process.wait()


def test_orders_are_carried_out_in_another_process_in_their_order(agent: WorkerAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    agent.tell("take", "7")
    agent.tell("take", "3,4")
    facts = agent.facts()
    assert facts["gpus"] == "3,4"
    assert facts["pid"] == agent._process.pid != os.getpid()
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


@pytest.mark.parametrize(("number", "text"), [(signal.SIGKILL, "it was killed by SIGKILL"), (signal.SIGSEGV, "it was killed by SIGSEGV")])
def test_a_worker_that_dies_is_told_of_with_its_cause(agent: WorkerAgent, number: int, text: str) -> None:
    os.kill(agent._process.pid, number)
    assert list(agent.events()) == [{"kind": "down", "text": text}]
    for _ in range(2):
        with pytest.raises(RuntimeError, match=text):
            agent.ping()
    agent.tell("stop")  # to nobody


def test_an_order_that_cannot_be_carried_out_ends_the_worker_with_its_traceback(agent: WorkerAgent) -> None:
    agent.tell("begin", {"rank": 0})
    (event,) = agent.events()
    assert event["kind"] == "down"
    assert "Assignment" in event["text"] or "KeyError" in event["text"]
    assert event["text"].startswith("Traceback")


@pytest.mark.parametrize("stopped", [False, True])
def test_a_worker_dies_with_its_agent(tmp_path: Path, stopped: bool) -> None:
    with subprocess.Popen([sys.executable, "-c", AGENT], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "True\n"
        (worker,) = processes_below(process.pid)
        if stopped:
            os.kill(worker, signal.SIGSTOP)
        process.kill()
    assert wait_until_gone([worker], tmp_path) == []


def test_the_worker_runs_the_hecate_of_its_agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hecate").mkdir()
    (tmp_path / "hecate" / "__init__.py").write_text("raise ImportError('another one')", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    agent = WorkerAgent("", 1, "127.0.0.1")
    assert agent.ping() is True
    agent._process.kill()
    agent._process.wait()
