"""`hecate launch`: mistakes found before anything is started, and two nodes."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from hecate.errors import UserError
from hecate.launch.addresses import check_free, find_endpoint, interface_of, wait_for
from hecate.launch.torchrun import node_range
from tests.launch.processes import OVERRIDES, hecate, kill_rank, losses, read_rest, wait_until_gone
from tests.namespaces import missing_for_slow_link, slow_link
from tests.tiny_run import make_workshop

LACKING = missing_for_slow_link()


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workshop(tmp_path_factory.mktemp("workshop"))


@pytest.mark.parametrize(("text", "nodes"), [("1", (1, 1)), ("3", (3, 3)), ("2:4", (2, 4))])
def test_numbers_of_nodes(text: str, nodes: tuple[int, int]) -> None:
    assert node_range(text) == nodes


@pytest.mark.parametrize("text", ["", "0", "-1", "two", "4:2", "1:2:3", "1.5"])
def test_other_numbers_of_nodes_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="--nnodes"):
        node_range(text)


@pytest.mark.parametrize("text", ["", ":1", "host:", "10.0.0.1:0", "10.0.0.1:99999", "10.0.0.1:http", "no such host:1"])
def test_other_endpoints_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="--rdzv-endpoint"):
        find_endpoint(text)


def test_an_endpoint_on_this_node() -> None:
    found = find_endpoint("127.0.0.1:29477")
    assert (found.host, found.port, found.local_address, found.is_here) == ("127.0.0.1", 29477, "127.0.0.1", True)
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.7") is None
    with socket.create_server(("127.0.0.1", 0)) as taken:
        busy = find_endpoint(f"127.0.0.1:{taken.getsockname()[1]}")
        wait_for(busy, patience=0)
        with pytest.raises(UserError, match="cannot listen"):
            check_free(busy)
    check_free(busy)
    with pytest.raises(UserError, match="nobody has answered"):
        wait_for(busy, patience=0)


MISTAKES = {
    "several nodes and no meeting point": (["--nnodes", "2"], "--rdzv-endpoint"),
    "an unknown key": (["learning_rat=1"], "learning_rate"),
    "another number of devices": (["topology={workshop}/three.yaml"], "3 devices"),
    "a topology for a job that may shrink": (["--nnodes", "1:2", "topology={workshop}/three.yaml"], "topology=auto"),
    "a port in use": (["--nnodes", "2", "--rdzv-endpoint", "127.0.0.1:{port}"], "cannot listen"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_found_before_anything_is_started(workshop: Path, name: str) -> None:
    options, wanted = MISTAKES[name]
    (workshop / "three.yaml").write_text("nodes: [{devices: 3, flops: 1e9, memory: 1e9}]\nintra_node: {bandwidth: 1e9, latency: 1e-6}\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        given = [option.format(workshop=workshop, port=taken.getsockname()[1]) for option in options]
        arguments = ["--nproc-per-node", "2", str(workshop / "config.yaml"), f"output_dir={workshop}/runs/bad", *given]
        done = subprocess.run([sys.executable, "-m", "hecate", "launch", *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert wanted in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 8
    assert not (workshop / "runs/bad").exists()


@pytest.mark.skipif(LACKING is not None, reason=str(LACKING))
def test_two_nodes_and_a_rank_killed_on_the_one_without_the_meeting_point(workshop: Path) -> None:
    temporary = workshop / "tmp"
    with slow_link() as names, ExitStack() as stack:
        processes = []
        for namespace in names:
            options = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-endpoint", "10.201.77.1:29433"]
            given = [str(workshop / "config.yaml"), *OVERRIDES, f"output_dir={workshop}/runs/two", "max_steps=60", "save_steps=5"]
            command = ["ip", "netns", "exec", namespace]
            processes.append(stack.enter_context(hecate("launch", *options, *given, temporary=temporary, command=command)))
        # Which node has rank 0, and with it the terminal, is not known before.
        for node, rank in ((1, 0), (1, 1)):
            _wait_for_checkpoint(workshop / "runs/two")
            try:
                kill_rank(processes[node].pid, rank)
                break
            except AssertionError:
                continue
        printed = "".join(read_rest(process) for process in processes)
    assert "all start again from the last checkpoint" in printed
    assert "resumed after step" in printed
    assert sorted(losses(workshop / "runs/two")) == list(range(1, 61))
    assert wait_until_gone([], temporary) == []


def _wait_for_checkpoint(folder: Path) -> None:
    deadline = time.monotonic() + 200
    while not list(folder.glob("checkpoint-[0-9]*/COMMIT")) and time.monotonic() < deadline:
        time.sleep(0.01)
