"""`hecate launch`: mistakes found before anything is started."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest

from hecate.errors import UserError
from hecate.launch import local_launcher, node_launcher, node_messages
from hecate.launch.addresses import Endpoint, find_endpoint, interface_of, wait_for
from hecate.launch.membership.job_policy import JobPolicy
from hecate.launch.node_launcher import node_range
from hecate.launch.node_messages import JobShape, MessageStore
from hecate.ranks.launcher_files import TOKEN_VARIABLE
from testing.tiny_run import make_workshop
from tests.launch.cluster import ROOT


def free_endpoint() -> Endpoint:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return find_endpoint(f"127.0.0.1:{server.getsockname()[1]}")


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
    assert (found.host, found.port, found.local_address, found.on_this_node) == ("127.0.0.1", 29477, "127.0.0.1", True)
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.7") is None
    with socket.create_server(("127.0.0.1", 0)) as taken:
        busy = find_endpoint(f"127.0.0.1:{taken.getsockname()[1]}")
        wait_for(busy, limit_seconds=0)
    with pytest.raises(UserError, match="no answer for"):
        wait_for(busy, limit_seconds=0)


JOB = JobShape("a", 2, 2, 1, survives=False, output_dir="runs/x")


def test_the_first_of_two_launchers_on_a_machine_leads_and_the_second_one_comes_to_it() -> None:
    meeting = free_endpoint()
    assert MessageStore.host(meeting, JOB, b"secret") is not None
    assert MessageStore.host(meeting, JOB, b"secret") is None
    with pytest.raises(UserError, match="another job meets there, 'a' of 2 nodes with 1 ranks each, which start again, into runs/x"):
        MessageStore.host(meeting, replace(JOB, output_dir="runs/y"), b"secret")
    with pytest.raises(UserError, match="give all nodes the same --token-file"):
        MessageStore.host(meeting, JOB, b"another")


def test_a_meeting_point_where_something_else_listens_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_messages, "_ANSWER", timedelta(seconds=0.1))
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UserError, match="another program may use the port"):
        MessageStore.host(find_endpoint(f"127.0.0.1:{taken.getsockname()[1]}"), JOB, b"secret")
    with (
        pytest.raises(UserError, match="has just ended\n  give the same command again"),
        mock.patch.object(node_messages, "StoreServer", side_effect=OSError(errno.EADDRINUSE, "in use")),
    ):
        MessageStore.host(free_endpoint(), JOB, b"secret")
    with (
        pytest.raises(UserError, match="this node cannot listen at this address: Permission denied"),
        mock.patch.object(node_messages, "StoreServer", side_effect=OSError(errno.EACCES, "Permission denied")),
    ):
        MessageStore.host(free_endpoint(), JOB, b"secret")


MISTAKES = {
    "several nodes and no meeting point": (["--nnodes", "2"], "--rdzv-endpoint"),
    "an unknown key": (["learning_rat=1"], "learning_rate"),
    "another number of devices": (["topology={workshop}/three.yaml"], "3 devices"),
    "a topology for a job that may shrink": (["--nnodes", "1:2", "topology={workshop}/three.yaml"], "topology=auto"),
    "no secret": (["--nnodes", "2", "--rdzv-endpoint", "127.0.0.1:{port}"], "--token-file: several nodes need a secret"),
    "a port in use": (
        ["--nnodes", "2", "--rdzv-endpoint", "127.0.0.1:{port}", "--token-file", "{workshop}/token"],
        "another program may use the port",
    ),
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


SRUN = '#!/bin/sh\nshift\nexec "$@"\n'
SCONTROL = "#!/bin/sh\necho node17\necho node18\n"


@pytest.mark.parametrize("interrupted", [False, True])
def test_the_slurm_script_gives_what_the_command_takes(workshop: Path, tmp_path: Path, interrupted: bool) -> None:
    """It asks for the first node as the meeting point, and goes on with a run that has a checkpoint."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text, encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    if interrupted:
        (tmp_path / "runs" / "checkpoint-50").mkdir(parents=True)
        (tmp_path / "runs" / "checkpoint-50" / "COMMIT").touch()
    path = os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]])
    variables = {"SLURM_JOB_ID": "12345", "SLURM_JOB_NODELIST": "node[17-18]", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "3"}
    variables |= {"CONFIG": str(workshop / "config.yaml"), "OUTPUT": str(tmp_path / "runs"), "PATH": path}
    script = ["bash", "-x", str(ROOT / "examples" / "two_nodes" / "slurm.sbatch")]
    done = subprocess.run(script, env={**os.environ, **variables}, capture_output=True, text=True, timeout=60, check=False)
    # All arguments are good, so the first thing that it meets is that there is no such node.
    assert done.returncode == 2, done.stderr
    assert "--rdzv-endpoint node17:32345: the host node17 is unknown" in done.stderr
    assert f" resume={str(interrupted).lower()} save_steps=50" in done.stderr


@pytest.mark.parametrize("endpoint", [None, "127.0.0.1:{port}"])
@pytest.mark.parametrize("survives", [False, True])
def test_no_rank_is_started_where_what_runs_first_fails(
    survives: bool, endpoint: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = tmp_path / "ranks"
    program = f"import pathlib, sys; sys.exit(2 if '--check' in sys.argv else pathlib.Path({str(ranks)!r}).touch())"
    for starter in (node_launcher, local_launcher):
        monkeypatch.setattr(starter, "forking", lambda *_: nullcontext([sys.executable, "-c", program]))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = endpoint and endpoint.format(port=free.getsockname()[1])
    job = node_launcher.NodesJob(
        name="job",
        output_dir=str(tmp_path / "run"),
        nodes=(1, 2 if meeting else 1),
        ranks_per_node=1,
        endpoint=meeting,
        policy=JobPolicy(copied=survives, most=0),
        first=["--check"],
    )
    with mock.patch.dict(os.environ, {TOKEN_VARIABLE: "x" * 32}):
        assert node_launcher.launch("program", [], job) == 2
    assert not ranks.exists()
