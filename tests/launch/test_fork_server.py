"""A rank forked by the fork server behaves, for its launcher, like a process started directly."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hecate.launch import fork_server, forked_rank
from testing.processes import wait_until_gone

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere ranks are started plainly")

# A server that imports nothing, whose ranks run their first argument.
SERVER = """
import os, signal, socket, sys, time
from hecate.launch.fork_server import wait_for_orders
order = wait_for_orders(socket.socket(fileno=int(sys.argv[1])))
exec(order.arguments[0])
"""
PROGRAM = "hecate.train.rank_main"
WAIT = "print(os.getpid(), flush=True); time.sleep(600)"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(fork_server, "_SERVER", (sys.executable, "-c", SERVER))
    return tmp_path


@pytest.fixture
def command(folder: Path) -> Iterator[tuple[str, ...]]:
    with fork_server.forking(folder, os.environ, PROGRAM) as command:
        yield command


def start(command: tuple[str, ...], *arguments: str, **options: object) -> subprocess.Popen[str]:
    return subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, text=True, **options)  # type: ignore[call-overload, no-any-return]


def pid_of(process: subprocess.Popen[str]) -> int:
    assert process.stdout is not None
    return int(process.stdout.readline())


def test_arguments_environment_folder_output_and_status_are_the_commands(command: tuple[str, ...], folder: Path) -> None:
    what = "print(order.arguments[1:], os.environ['WHO'], 'PATH' in os.environ, os.getcwd()); sys.exit(7)"
    (folder / "below").mkdir()
    both = [start(command, what, "a", "b c", env={"WHO": who}, cwd=folder / "below") for who in ("first", "second")]
    for who, process in zip(("first", "second"), both, strict=True):
        assert process.communicate(timeout=60)[0] == f"['a', 'b c'] {who} False {folder}/below\n"
        assert process.returncode == 7


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_the_rank(command: tuple[str, ...], number: signal.Signals) -> None:
    process = start(command, f"signal.signal({int(number)}, lambda *_: sys.exit(5)); {WAIT}")
    pid_of(process)
    process.send_signal(number)
    assert process.wait(timeout=60) == 5


def test_a_signal_to_all_processes_of_a_service_leaves_ranks_the_time_to_save(command: tuple[str, ...]) -> None:
    what = f"signal.signal(signal.SIGTERM, lambda *_: sys.exit(5)); print(os.getppid(), flush=True); {WAIT}"
    process = start(command, what)
    server = pid_of(process)
    pid_of(process)
    os.kill(server, signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 5


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGABRT])
def test_a_killed_rank_looks_like_one(command: tuple[str, ...], number: signal.Signals) -> None:
    process = start(command, WAIT)
    os.kill(pid_of(process), number)
    assert process.wait(timeout=60) == -number


def test_killing_whoever_stands_for_a_rank_kills_it_and_no_other(command: tuple[str, ...], tmp_path: Path) -> None:
    doomed, other = start(command, WAIT), start(command, WAIT)
    pid = pid_of(doomed)
    doomed.kill()
    assert wait_until_gone([pid], tmp_path / "none") == []
    assert other.poll() is None
    os.kill(pid_of(other), signal.SIGKILL)
    assert other.wait(timeout=60) == -signal.SIGKILL


def test_nothing_outlives_the_block(folder: Path) -> None:
    with fork_server.forking(folder, os.environ, PROGRAM) as command:
        process = start(command, f"signal.signal(signal.SIGTERM, signal.SIG_IGN); {WAIT}")
        pid = pid_of(process)
    assert process.wait(timeout=60) == 1
    assert wait_until_gone([pid], folder / "none") == []


def test_without_a_server_ranks_start_plainly(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with fork_server.forking(folder, os.environ, PROGRAM) as command:
        pass
    process = start(command, stderr=subprocess.PIPE)
    assert f"python -m {PROGRAM} CONFIG" in process.communicate(timeout=60)[1]
    assert process.returncode == 2
    deep = folder / ("x" * 100)
    deep.mkdir()
    with fork_server.forking(deep, os.environ, PROGRAM) as command:
        assert command == (sys.executable, "-P", "-m", PROGRAM)


def answered(folder: Path, answer: bytes) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """What a rank's process does when a server, played by the test, gives this answer; and the order that it has sent."""
    path = folder / "socket"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        command = [sys.executable, forked_rank.__file__, str(path), PROGRAM, "a", "b c"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={"WHO": "me"}, cwd=folder) as process:
            client, _ = server.accept()
            with client:
                size, descriptors, _, _ = socket.recv_fds(client, 8, 3)
                order = json.loads(client.recv(int.from_bytes(size, "little"), socket.MSG_WAITALL))
                assert len(descriptors) == 3
                for descriptor in descriptors:
                    os.close(descriptor)
                client.sendall(answer)
            _, errors = process.communicate(timeout=60)
    return subprocess.CompletedProcess(command, process.returncode, "", errors), order


def test_an_order_says_what_the_rank_is_to_be_and_the_answer_how_it_ended(tmp_path: Path) -> None:
    done, order = answered(tmp_path, b"7\n")
    assert order["arguments"] == ["a", "b c"]
    assert order["environment"]["WHO"] == "me"
    assert order["folder"] == str(tmp_path)
    assert (done.returncode, done.stderr) == (7, "")


@pytest.mark.parametrize(("answer", "status"), [(b"-9\n", -9), (b"-15\n", -15), (b"", 1)])
def test_a_killed_rank_and_a_lost_server_are_told_apart(tmp_path: Path, answer: bytes, status: int) -> None:
    done, _ = answered(tmp_path, answer)
    lost = "hecate: the process that the ranks are forked from has ended\n"
    assert (done.returncode, done.stderr) == (status, "" if answer else lost)


def test_preloading_leaves_a_process_that_can_be_forked() -> None:
    """After the preload there is one thread, no GPU is in use, and a rank has nothing more to import."""
    code = (
        "import os\nfrom hecate.train.rank_main import preload\npreload()\nimport sys, torch\n"
        "assert len(os.listdir('/proc/self/task')) == 1\nassert not torch.cuda.is_initialized()\n"
        "assert {'hecate.train.build', 'transformers.modeling_utils'} <= sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, timeout=120)
