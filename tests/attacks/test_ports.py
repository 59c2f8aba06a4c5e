"""Who reaches the meeting point of several nodes without holding the job's secret runs no code, joins nothing and stops nothing."""

from __future__ import annotations

import base64
import json
import os
import pickle
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from hecate.io.json_records import to_json_values
from hecate.launch.node_messages import JobShape, NodeReport
from hecate.launch.run_folder import processes_below
from testing.processes import hecate, listening, read_rest, read_until
from testing.tiny_run import make_workshop


class Plants:
    """Unpickling it makes a file."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._file),)


@contextmanager
def waiting_node(workshop: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A launcher that waits for the second of two nodes, and the port at which it does."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    given = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-endpoint", f"127.0.0.1:{port}", "--token-file", str(workshop / "token")]
    with hecate(
        "launch", *given, str(workshop / "config.yaml"), f"output_dir={workshop}/runs/a", *options, temporary=workshop / "tmp"
    ) as node:
        deadline = time.monotonic() + 120
        while True:
            with suppress(OSError):
                socket.create_connection(("127.0.0.1", port)).close()
                break
            assert node.poll() is None, read_rest(node)
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield node, port


def forge(port: int, key: str, value: bytes) -> None:
    """Set a key as a client of torch's store does, which may be told nothing."""
    with suppress(dist.DistError):
        limit = timedelta(seconds=2)
        store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False, timeout=limit)
        store.set(key, value)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux: /proc")
@pytest.mark.parametrize("redundancy", [pytest.param(0, id="without backups"), pytest.param(1, id="with backups", marks=pytest.mark.slow)])
def test_a_stranger_at_the_meeting_point_runs_nothing_and_joins_nothing(tmp_path: Path, redundancy: int) -> None:
    workshop, planted = make_workshop(tmp_path), tmp_path / "planted"
    with waiting_node(workshop, f"fssdp.redundancy={redundancy}") as (node, port):
        report = NodeReport(beat=0, address="10.9.9.9", ended={}, files=(), mistakes={}, stopping=False, leaves=False)
        shape = JobShape("other", 1, 1, 1, survives=True, output_dir="x")
        forged = {
            # torch's rendezvous unpickles this key once a second.
            "torch.rendezvous.hecate": base64.b64encode(pickle.dumps(Plants(planted))),
            "report-1": json.dumps(to_json_values(report)).encode(),
            "arrivals": b"1",
            "job": json.dumps(to_json_values(shape)).encode(),
        }
        with ThreadPoolExecutor() as strangers:  # each waits some seconds for an answer
            list(strangers.map(partial(forge, port), forged, forged.values()))
        for said in (b"GET / HTTP/1.1\r\n\r\n", b"\x00" * 4096, os.urandom(4096)):
            with socket.create_connection(("127.0.0.1", port)) as stranger, suppress(OSError):
                stranger.sendall(said)
        held = [socket.create_connection(("127.0.0.1", port)) for _ in range(100)]
        assert listening([node.pid, *processes_below(node.pid)]) == {"127.0.0.1"}
        time.sleep(2)
        assert node.poll() is None, "it waits for a node of its own"
        assert not planted.exists()
        assert len(held) == 100
    assert not planted.exists()


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux: /proc")
@pytest.mark.parametrize("command", ["train", "launch"])
def test_a_run_goes_on_under_what_strangers_send_to_each_of_its_ports(tmp_path: Path, command: str) -> None:
    """Of one machine. Garbage, HTTP, half a message, and a hundred connections that are held open."""
    workshop = make_workshop(tmp_path)
    given = ["--nproc-per-node", "2"] if command == "launch" else []
    wanted = ["nproc=2"] if command == "train" else []
    overrides = [f"output_dir={workshop}/runs/a", "max_steps=60", "data.eval=[]", "eval.on_start=false", "eval.generate=false", *wanted]
    with hecate(command, *given, str(workshop / "config.yaml"), *overrides, temporary=workshop / "tmp") as run:
        read_until(run, "step 2/")
        pids = [run.pid, *processes_below(run.pid)]
        ports = listening_ports(pids)
        held = []
        for port in ports:
            for said in (b"GET / HTTP/1.1\r\n\r\n", b"\x00" * 4096, os.urandom(4096), b"\xff\xff\xff\x7f", b""):
                with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=2) as stranger:
                    stranger.sendall(said)
            for _ in range(100):
                with suppress(OSError):
                    held.append(socket.create_connection(("127.0.0.1", port), timeout=2))
        rest = read_rest(run)
        assert run.wait(120) == 0, rest
        assert "step 60/60" in rest, rest
        for one in held:
            one.close()


def listening_ports(pids: list[int]) -> set[int]:
    """The ports of loopback that these processes listen on."""
    inodes = set()
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").glob("*"):
            with suppress(OSError):
                inodes.add(os.readlink(descriptor).removeprefix("socket:[").removesuffix("]"))
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return {int(row[1].partition(":")[2], 16) for row in rows if row[3] == "0A" and row[9] in inodes}
