"""Two network namespaces act as two nodes with a slow link: `hecate launch` and Ray train across them. Needs root."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
import torch.distributed as dist

from hecate.launch.membership.job_states import State
from hecate.launch.profile.fit import topology_from
from hecate.launch.profile.probe import ProbeSizes
from hecate.launch.profile.run import measure
from hecate.launch.ray_job.status import DeviceState, JobStatus
from hecate.launch.run_folder import processes_below
from hecate.parallel.cluster.topology import Topology
from hecate.parallel.cluster.topology_file import parse_topology
from hecate.ranks.ranks import connect, lost_a_peer
from testing.namespaces import INTERFACE, missing_for_slow_link, slow_link
from testing.processes import OVERRIDES, hecate, losses, rank_process, read_rest, read_until, running, wait_until_gone
from testing.ranks import run_ranks
from testing.tiny_run import make_workshop
from tests.launch.cluster import OF_RAYLETS, ROOT, Job, environment, make_token
from tests.launch.profile.ranks import ranks_of

LACKING = missing_for_slow_link()
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300), pytest.mark.skipif(LACKING is not None, reason=str(LACKING))]
HOSTS = ("10.201.77.1", "10.201.77.2")
RATE, BYTES_PER_SECOND = "500mbit", 62.5e6
SIZES = ProbeSizes(matmul=64, copy_bytes=1 << 16, small_bytes=64, large_bytes=1 << 22, seconds=0.05)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workshop(tmp_path_factory.mktemp("workshop"))


def probed(rank: int, world_size: int) -> Topology:
    ranks = ranks_of(rank, world_size)
    return topology_from(measure(ranks, (0, 0, 1, 1), ("CPU",) * 4, SIZES))


def test_the_probe_finds_the_rate_of_the_link() -> None:
    with slow_link(RATE) as names:
        topology = run_ranks(4, probed, namespaces=[names[0], names[0], names[1], names[1]])[0]
    assert 0.6 * BYTES_PER_SECOND < topology.inter_node.bandwidth < 1.05 * BYTES_PER_SECOND
    assert topology.intra_node.bandwidth > 3 * topology.inter_node.bandwidth


def cut_off(rank: int, _world_size: int, store: str) -> bool:
    """A rank notices that its peer's machine is gone, although no packet announces its end."""
    dist.destroy_process_group()
    ranks = connect(dist.FileStore(store, 2), rank, 2)
    ranks.barrier()
    if rank == 0:
        subprocess.run(["ip", "link", "set", INTERFACE, "down"], check=True)
    try:
        ranks.barrier()
    except RuntimeError as error:
        return lost_a_peer(error)
    return False


def test_a_node_without_power_is_noticed(tmp_path: Path) -> None:
    with slow_link() as names:
        assert run_ranks(2, cut_off, str(tmp_path / "store"), timeout=60, namespaces=names) == [True, True]


def test_a_run_without_backups_shrinks_and_grows_until_the_meeting_point_is_lost(workshop: Path) -> None:
    """The example's script runs on two nodes. A rank is killed on each node, and all ranks start again. A node is cut off and ends, and the
    other one goes on alone until it is back. The node that hosts the meeting point is lost, and the other one ends with a clear error."""
    temporary, run = workshop / "tmp", workshop / "runs" / "two"
    given = [*OVERRIDES, "fssdp.policy=hecate_paper", f"output_dir={run}", "max_steps=100000"]
    meeting = f"{HOSTS[0]}:29433"
    with slow_link() as names, ExitStack() as stack:

        def node(number: int) -> subprocess.Popen[str]:
            command = ["ip", "netns", "exec", names[number], str(ROOT / "examples" / "two_nodes" / "run.sh")]
            variables = {
                "MEETING": meeting,
                "TOKEN_FILE": str(workshop / "token"),
                "NODES": "1:2",
                "RANKS": "1",
                "CONFIG": str(workshop / "config.yaml"),
                "SAVE_STEPS": "5",
            }
            return stack.enter_context(running([*command, *given], temporary, **variables))

        nodes = [node(0), node(1)]
        wait_for_checkpoint(run, of_ranks=2)
        for launcher in nodes:
            kill_any_rank(launcher)
            wait_for_checkpoint(run, of_ranks=2)
        set_link(names[1], "down")
        wait_for_checkpoint(run, of_ranks=1)
        printed_by_cut_off = read_rest(nodes[1], 1)
        set_link(names[1], "up")
        nodes[1] = node(1)
        wait_for_checkpoint(run, of_ranks=2)
        below = [*processes_below(nodes[0].pid), *processes_below(nodes[1].pid)]
        nodes[0].kill()
        printed = read_rest(nodes[1], 1)
        assert wait_until_gone(below, temporary) == []
    for text in (printed_by_cut_off, printed):
        assert f"the meeting point of the nodes, {meeting}, is lost" in text
        assert "Traceback" not in text
        assert "frame #" not in text
    steps = losses(run)
    assert sorted(steps) == list(range(1, len(steps) + 1))


def test_a_node_joins_where_nothing_had_failed_and_a_signal_to_it_stops_both(workshop: Path) -> None:
    """No loss has come before; the ranks save, and go on where they were."""
    temporary, run = workshop / "tmp", workshop / "runs" / "joined"
    given = [*OVERRIDES, "fssdp.policy=hecate_paper", f"output_dir={run}", "max_steps=100000"]
    with slow_link() as names, ExitStack() as stack:

        def node(number: int) -> subprocess.Popen[str]:
            command = ["ip", "netns", "exec", names[number], str(ROOT / "examples" / "two_nodes" / "run.sh")]
            variables = {
                "HECATE_TOKEN": "of this test" * 3,
                "NODES": "1:2",
                "RANKS": "1",
                "CONFIG": str(workshop / "config.yaml"),
                "SAVE_STEPS": "5",
            }
            return stack.enter_context(running([*command, *given], temporary, MEETING=f"{HOSTS[0]}:29434", **variables))

        nodes = [node(0)]
        wait_for_checkpoint(run, of_ranks=1)
        nodes.append(node(1))
        wait_for_checkpoint(run, of_ranks=2)
        nodes[1].send_signal(signal.SIGTERM)
        signalled, printed = read_rest(nodes[1], 143), read_rest(nodes[0], 143)
    assert "hecate: stopping: the ranks finish their step and save" in signalled
    assert "a node has joined" in printed
    assert "a signal to another node has stopped the job, whose ranks have saved" in printed
    steps = losses(run)
    assert sorted(steps) == list(range(1, len(steps) + 1))
    assert (run / f"checkpoint-{len(steps)}").is_dir()


def test_nodes_with_backups_lose_no_step_and_come_again(workshop: Path) -> None:
    """The second of two nodes is cut off for some seconds, comes again by itself, is killed, and is started again; each loses a rank.
    The loss of each step is that of a run that loses nobody. At last the first node is lost, and the other one ends with a clear error."""
    temporary, run, alone = workshop / "tmp-backups", workshop / "runs" / "backups", workshop / "runs" / "alone"
    config = [str(workshop / "config.yaml"), *OVERRIDES, "deterministic=true", "fssdp.policy=hecate_paper", "logging_steps=1"]
    meeting = f"{HOSTS[0]}:29435"
    options = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-endpoint", meeting, "--token-file", str(workshop / "token")]
    with slow_link() as names, ExitStack() as stack:

        def node(number: int) -> subprocess.Popen[str]:
            given = [*options, *config, "fssdp.redundancy=1", "max_steps=100000", f"output_dir={run}"]
            command = ["ip", "netns", "exec", names[number]]
            return stack.enter_context(hecate("launch", *given, temporary=temporary, command=command))

        def lose(how: Callable[[], object], first: int) -> str:
            """Lose a rank; the first of those that are left, which says so, is then on the node `first`."""
            how()
            return read_until(nodes[first], "1 ranks go on after step")

        nodes = [node(0), node(1)]
        printed = read_until(nodes[0], "step 5/")
        printed += lose(lambda: set_link(names[1], "down"), first=0)
        assert f"node {HOSTS[1]} has not been heard of for 3 s; its 1 ranks count as killed" in printed
        set_link(names[1], "up")
        printed += read_until(nodes[0], "2 ranks go on after step")
        printed += lose(lambda: os.kill(rank_process(nodes[1].pid, 2), signal.SIGKILL), first=0)
        printed += read_until(nodes[0], "2 ranks go on after step")
        printed += lose(lambda: os.kill(rank_process(nodes[0].pid, 0), signal.SIGKILL), first=1)
        printed += read_until(nodes[1], "2 ranks go on after step")
        printed += lose(nodes[1].kill, first=0)
        nodes[1] = node(1)
        printed += read_until(nodes[0], "2 ranks go on after step")
        last = int(read_until(nodes[0], "step ").rpartition("step ")[2].partition("/")[0])
        below = [*processes_below(nodes[0].pid), *processes_below(nodes[1].pid)]
        nodes[0].kill()
        assert f"the meeting point of the nodes, {meeting}, is lost" in (rest := read_rest(nodes[1], 1))
        assert wait_until_gone(below, temporary) == []
    assert "Traceback" not in printed + rest
    assert "last checkpoint" not in printed
    steps = losses(run)
    assert len([step for step in steps if step <= last]) >= last - 4, "a rank that is killed may not have written its last step"
    with hecate("train", *config, "nproc=2", f"max_steps={last}", f"output_dir={alone}", temporary=temporary) as process:
        read_rest(process)
    undisturbed = losses(alone)
    assert {step: values for step, values in steps.items() if step <= last} == {step: undisturbed[step] for step in steps if step <= last}


@pytest.mark.parametrize("redundancy", [0, 1])
def test_a_mistake_on_two_nodes_is_not_tried_again(workshop: Path, redundancy: int) -> None:
    """Ranks that start again would go on with the run that is in the folder."""
    run = workshop / "runs" / f"taken-{redundancy}"
    (run / "checkpoint-5").mkdir(parents=True)
    (run / "checkpoint-5" / "COMMIT").touch()
    token = ["--token-file", str(workshop / "token")]
    options = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-endpoint", f"{HOSTS[0]}:29434", *token]
    with slow_link() as names, ExitStack() as stack:
        processes = [
            stack.enter_context(
                hecate(
                    "launch",
                    *options,
                    str(workshop / "config.yaml"),
                    f"output_dir={run}",
                    f"fssdp.redundancy={redundancy}",
                    temporary=workshop / "tmp-taken",
                    command=["ip", "netns", "exec", name],
                )
            )
            for name in names
        ]
        printed = "".join(read_rest(process, 2) for process in processes)
    assert "exists and is not empty" in printed
    assert "resumed" not in printed


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed (extra `ray`)")
def test_ray_trains_across_and_replaces_a_rank_on_either_node_and_goes_on_without_one(workshop: Path) -> None:
    run = workshop / "runs" / "ray"
    overrides = ["data.eval=[]", "eval.generate=false", "fssdp.policy=hecate_paper", "fssdp.redundancy=1", "ray.report_steps=1"]
    command = [sys.executable, "-m", "hecate", "ray", "config.yaml", f"output_dir={run}", "max_steps=100000", *overrides]
    with slow_link(RATE) as names, raylets(names, make_token(workshop)) as variables:
        command = ["ip", "netns", "exec", names[0], *command, "--address", f"{HOSTS[0]}:6379"]
        job = Job(command, variables, workshop, run)
        try:
            status = job.wait_for(lambda s: s.state is State.RUNNING and s.step >= 2, 120)
            assert sorted(device.node.split()[0] for device in status.devices) == list(HOSTS)
            rate = parse_topology(status.topology or "", "status").inter_node.bandwidth
            # Where two ranks exchange alone, gloo's all-to-all sends one way after the other.
            assert 0.4 * BYTES_PER_SECOND < rate < 1.05 * BYTES_PER_SECOND
            for device in (0, 1):
                os.kill(status.devices[device].pid or 0, signal.SIGKILL)
                status = job.wait_for(all_train(status))
            set_link(names[1], "down")
            before = status
            status = job.wait_for(lambda s: later(s, before) and s.state is State.RUNNING)
            assert [device.node.split()[0] for device in status.devices if device.state is DeviceState.TRAINING] == [HOSTS[0]]
            job.process.send_signal(signal.SIGTERM)
            assert job.end() == 128 + signal.SIGTERM, job.output[-3000:]
        finally:
            job.close()
    assert job.output.count("the worker's process died") == 2
    assert job.output.count("the worker's node died") == 1
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [record["step"] for record in records if record["kind"] == "step"]
    assert steps == sorted(set(steps)), "a step was done twice"


def later(status: JobStatus, before: JobStatus) -> bool:
    """Whether a newer generation of ranks has done further steps."""
    return status.generation > before.generation and status.step > before.step


def all_train(before: JobStatus) -> Callable[[JobStatus], bool]:
    return lambda status: later(status, before) and [device.state for device in status.devices] == [DeviceState.TRAINING] * len(HOSTS)


@contextmanager
def raylets(names: tuple[str, str], token: Path) -> Iterator[dict[str, str]]:
    """Start a Ray cluster with one processor in each namespace and its head in the first. Gives the environment for its users."""
    variables = environment(token, **{name: value for name, value in OF_RAYLETS.items() if "WINDOWS" not in name})
    folder = tempfile.mkdtemp(prefix="hecate-ray-", dir="/tmp")  # the path of a socket has room for 107 characters
    common = [str(Path(sys.executable).parent / "ray"), "start", "--block", "--disable-usage-stats", "--num-cpus", "1"]
    common += ["--object-store-memory", str(80 << 20), "--include-log-monitor"]
    head = ["true", "--head", "--port", "6379", "--include-dashboard", "false", "--temp-dir", folder]
    other = ["false", "--address", f"{HOSTS[0]}:6379"]
    nodes = []
    try:
        for name, host, rest in zip(names, HOSTS, (head, other), strict=True):
            command = ["ip", "netns", "exec", name, *common, *rest, "--node-ip-address", host]
            node = subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            nodes.append(node)
            read_until(node, "Ray runtime started")
        yield variables
    finally:
        for node in nodes:
            node.terminate()
        for node in nodes:
            node.communicate(timeout=60)
        shutil.rmtree(folder, ignore_errors=True)


def set_link(namespace: str, state: str) -> None:
    """Set a network interface up or down; `down` is as if its cable had been pulled."""
    subprocess.run(["ip", "-n", namespace, "link", "set", INTERFACE, state], check=True)


def kill_any_rank(launcher: subprocess.Popen[str]) -> None:
    """Kill the rank of this node, which may be rank 0 or rank 1."""
    for rank in (0, 1):
        try:
            os.kill(rank_process(launcher.pid, rank), signal.SIGKILL)
        except AssertionError:
            continue
        return
    raise AssertionError("no rank runs there")


def wait_for_checkpoint(folder: Path, of_ranks: int, seconds: float = 180) -> None:
    """Wait for a checkpoint that `of_ranks` ranks write from now on."""
    deadline = time.monotonic() + seconds
    before = checkpoints_of(folder, of_ranks)
    while not checkpoints_of(folder, of_ranks) - before:
        assert time.monotonic() < deadline, f"no checkpoint of {of_ranks} ranks"
        time.sleep(0.02)


def checkpoints_of(folder: Path, ranks: int) -> set[str]:
    """Names of the complete checkpoints that so many ranks have written.

    While this function lists them, the run may rename a folder that it has completed and remove one that it prunes.
    """
    found = set()
    for name in os.listdir(folder) if folder.is_dir() else ():
        if re.fullmatch(r"checkpoint-\d+", name):
            with suppress(FileNotFoundError):
                if any(file.endswith(f"-of-{ranks:05}.safetensors") for file in os.listdir(folder / name)):
                    found.add(name)
    return found
