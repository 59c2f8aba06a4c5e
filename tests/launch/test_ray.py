"""Jobs on a Ray cluster of four raylets on this machine, two of them labelled fast and two slow."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hecate.launch.membership.job_states import State
from hecate.launch.ray_job.status import DeviceState, JobStatus, read_status
from hecate.launch.run_folder import processes_below
from testing.processes import OVERRIDES, command_line, hecate, listening, read_until, wait_until_gone
from testing.tiny_run import make_workshop
from tests.launch.cluster import ROOT, Job, RayCluster, cluster_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed (extra `ray`)"),
]
KINDS = ("fast", "fast", "slow", "slow")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_workshop(tmp_path_factory.mktemp("workshop"))
    flops = "flops: [3e9, 3e9, 1e9, 1e9], memory: [3e9, 3e9, 1e9, 1e9]"
    topology = f"nodes: [{{devices: 4, {flops}}}]\nintra_node: {{bandwidth: 1e9, latency: 1e-5}}\n"
    (folder / "mixed.yaml").write_text(topology, encoding="utf-8")
    (folder / ".env").write_text("SECRET=1", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def cluster(workshop: Path) -> Iterator[RayCluster]:
    with cluster_of(KINDS, workshop) as made:
        yield made


def training(status: JobStatus) -> list[int]:
    return [device.device for device in status.devices if device.state is DeviceState.TRAINING]


def steps_of(run: Path) -> list[int]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [record["step"] for record in records if record["kind"] == "step"]


@pytest.mark.timeout(600)  # five starts of ranks, beside other work
def test_a_job_goes_on_whatever_it_loses(cluster: RayCluster, workshop: Path) -> None:
    """Shares by speed and memory; a process is killed, the others go on and another
    takes its place; a node is lost and left out, another comes and joins; a device that
    is held up is named and gets less; a signal saves and ends it. Not one step is lost or done twice."""
    run = workshop / "runs" / "life"
    overrides = ["topology=mixed.yaml", "ray.labels=['kind=in(fast,slow)']", "ray.report_steps=2", "max_steps=100000", "fssdp.redundancy=1"]
    with cluster.job("ray", run, *overrides, "moe.num_experts=8", "--address", cluster.address, "--metrics-port", "0") as job:
        # As the job began: beside other work a device may soon be slow, and be given less, or hang.
        note = re.compile(r"generation 0: 4 ranks from step 0; sequences: (.*)")
        status = job.wait_for(lambda s: s.state is State.RUNNING and s.generation == 0 and note.search(job.output) is not None, 150)
        (begun,) = note.findall(job.output)
        assert re.findall(r"device (\d) \(.*?\) (\d)", begun) == [("0", "3"), ("1", "3"), ("2", "1"), ("3", "1")]
        assert [device.experts for device in status.devices] == [6, 6, 2, 2]
        status = job.wait_for(lambda s: training(s) == [0, 1, 2, 3] and s.step >= 4, 150)
        kinds = [cluster.nodes.index(cluster.node_of(device)) // 2 for device in status.devices]
        assert kinds == [0, 0, 1, 1], "fast nodes are devices 0 and 1"
        assert f'hecate_state{{state="{status.state.value}"}} 1' in scraped(job)
        shown = subprocess.run([sys.executable, "-m", "hecate", "status", str(run)], capture_output=True, text=True, check=True, cwd=ROOT)
        assert "running" in shown.stdout

        spares = wait_for_spares(cluster, status)
        os.kill(status.devices[2].pid, signal.SIGKILL)
        step = status.step
        status = job.wait_for(lambda s: s.generation == 2 and training(s) == [0, 1, 2, 3] and s.step > step)
        assert status.devices[2].pid in spares
        assert "3 ranks from step" in job.output, "the others waited for it"
        assert "device 2" in job.output
        assert "the worker's process died" in job.output

        lost = cluster.node_of(status.devices[3])
        cluster.remove(lost)
        step = status.step
        status = job.wait_for(lambda s: s.generation == 3 and training(s) == [0, 1, 2] and s.step > step)
        assert "the worker's node died" in job.output
        assert sum(device.sequences or 0 for device in status.devices) == 8, "a step keeps its sequences"

        cluster.add("slow")
        step = status.step
        status = job.wait_for(lambda s: s.generation == 4 and training(s) == [0, 1, 2, 3] and s.step > step, 120)

        busiest = max(status.devices, key=lambda device: device.sequences or 0)
        number, named = busiest.device, f"straggler: device {busiest.device} "
        before = job.output.count(named)
        with held_up(busiest.pid):
            job.wait_for(lambda s: job.output.count(named) > before and (s.devices[number].sequences or 0) < (busiest.sequences or 0), 120)

        job.process.send_signal(signal.SIGTERM)
        assert job.end() == 128 + signal.SIGTERM, job.output[-3000:]
    steps = steps_of(run)
    assert steps == sorted(set(steps)), "a step was done twice"
    # A step that was at its end when a rank was lost is finished, without a record.
    assert len(set(range(1, steps[-1] + 1)) - set(steps)) <= 2, steps
    assert (run / f"checkpoint-{steps[-1]}" / "COMMIT").is_file()
    assert read_status(run).state is State.STOPPED


def test_a_stopped_worker_is_ended_by_name_on_a_node_that_is_not_the_controllers(cluster: RayCluster, workshop: Path) -> None:
    """Without somebody on its node it would count as silent after ten seconds, in other words."""
    run = workshop / "runs" / "stopped"
    overrides = ["ray.workers=2", "ray.labels=['kind=slow']", "ray.report_steps=1", "max_steps=100000", "fssdp.redundancy=1"]
    with cluster.job("ray", run, *overrides, "--address", cluster.address) as job:
        status = job.wait_for(lambda s: training(s) == [0, 1] and s.step >= 2, 150)
        os.kill(status.devices[1].pid, signal.SIGSTOP)
        status = job.wait_for(lambda s: s.generation >= 1 and s.step > status.step)
        assert "(rank 1): the worker was stopped (for 1." in job.output, job.output[-3000:]
        assert "did not answer" not in job.output


def wait_for_spares(cluster: RayCluster, status: JobStatus) -> set[int]:
    """Workers' processes beside those of the devices: one on each of the four nodes."""
    deadline, spares = time.monotonic() + 60, set[int]()
    while time.monotonic() < deadline:
        spares = cluster.workers() - {device.pid for device in status.devices}
        if len(spares) == len(KINDS):
            return spares
        time.sleep(0.1)
    raise AssertionError(f"no spares: {spares}")


def scraped(job: Job) -> str:
    import urllib.request

    address = re.search(r"http://127\.0\.0\.1:\d+/metrics", job.output)
    assert address is not None
    with urllib.request.urlopen(address[0], timeout=10) as answer:
        return str(answer.read().decode())


class held_up:
    """A process that gets a fifth of its time: stopped for 40 ms, running for 10, again and again."""

    def __init__(self, pid: int) -> None:
        code = f"import os, signal, time\nwhile True:\n    os.kill({pid}, signal.SIGSTOP); time.sleep(0.04)\n"
        self._code = code + f"    os.kill({pid}, signal.SIGCONT); time.sleep(0.01)\n"
        self._pid = pid

    def __enter__(self) -> None:
        self._process = subprocess.Popen([sys.executable, "-c", self._code])

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.kill(self._pid, signal.SIGCONT)


def test_a_job_is_submitted_and_its_exit_status_comes_back(cluster: RayCluster, workshop: Path) -> None:
    run, taken = workshop / "runs" / "submitted", workshop / "runs" / "taken"
    (taken / "checkpoint-1").mkdir(parents=True)
    overrides = ["max_steps=3", "ray.workers=2", "ray.labels=['kind=in(fast,slow)']", "--address", cluster.dashboard]
    with cluster.job("submit", run, *overrides) as good, cluster.job("submit", taken, *overrides) as bad:
        assert bad.end(150) == 2, bad.output[-4000:]
        assert good.end(150) == 0, good.output[-4000:]
    assert "exists and is not empty" in bad.output
    assert "step 3/3" in good.output
    assert steps_of(run) == [1, 2, 3]


def test_a_job_submitted_to_a_cluster_without_authentication_joins_it_so(tmp_path: Path) -> None:
    """Neither the variable nor a token is on the cluster's nodes, so the job has what its submitter was told to set."""
    folder, none = make_workshop(tmp_path), {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "none")}
    with cluster_of(("only",), folder, RAY_AUTH_MODE="", **none) as cluster:
        given = ["max_steps=3", "ray.workers=1", "--address", cluster.dashboard]
        with cluster.job("submit", folder / "runs" / "open", *given, RAY_AUTH_MODE="disabled", **none) as job:
            assert job.end(150) == 0, job.output[-4000:]
    assert "step 3/3" in job.output


def test_a_run_that_ends_well_prints_no_trace_and_its_status_has_the_last_step(cluster: RayCluster, workshop: Path) -> None:
    run = workshop / "runs" / "well"
    with cluster.job("ray", run, "max_steps=3", "ray.workers=2", "ray.labels=['kind=fast']", "--address", cluster.address) as job:
        assert job.end(150) == 0, job.output[-4000:]
    last = [line for line in job.lines if line.strip()][-1]
    assert "(Worker pid" in last, "the summary is the last that is printed"
    assert not re.search(r"Traceback|Exception raised|frame #|TCPStore", job.output)
    status = read_status(run)
    assert (status.step, status.max_steps) == (3, 3), "of a run that is shorter than ray.report_steps"
    assert status.loss is not None


def test_killing_the_launcher_leaves_nothing(cluster: RayCluster, workshop: Path) -> None:
    run, temporary = workshop / "runs" / "orphaned", workshop / "temporary"
    temporary.mkdir()
    overrides = ["max_steps=100000", "ray.workers=1", "ray.report_steps=1", "--address", cluster.address]
    with cluster.job("ray", run, *overrides, TMPDIR=str(temporary)) as job:
        job.wait_for(lambda s: s.step >= 1, 150)
        workers = cluster.workers()
        job.process.kill()
        job.end()
    assert len(workers) >= 1
    assert wait_until_gone([*workers], temporary, 30) == []


def test_a_private_ray_is_alone_and_ends_with_its_launcher(workshop: Path) -> None:
    run = workshop / "runs" / "private"
    temporary = Path(tempfile.mkdtemp(dir="/tmp"))  # Ray's files go to /tmp anyway where the path of a socket would get too long
    given = [str(workshop / "config.yaml"), *OVERRIDES, f"output_dir={run}", "max_steps=100000", "ray.workers=1", "ray.report_steps=1"]
    with hecate("ray", *given, "--address", "local", temporary=temporary) as process:
        printed = read_until(process, "step 1/")
        assert "(Worker pid" in printed
        assert "\x1b" not in printed, "codes of colours, though this is no terminal"
        below = processes_below(process.pid)
        assert any("raylet" in command_line(pid) for pid in below)
        assert listening([process.pid, *below]) == {"127.0.0.1"}
        ranks = [pid for pid in below if command_line(pid).startswith("ray::Worker")]
        assert ranks
        for pid in ranks:
            assert (os.getpriority(os.PRIO_PROCESS, pid), os.sched_getscheduler(pid)) == (0, os.SCHED_OTHER)
        modest = {command_line(pid) for pid in below if os.sched_getscheduler(pid) == os.SCHED_IDLE}
        assert any("log_monitor" in command for command in modest), "it interrupts the ranks"
        assert not any("gcs_server" in command or "raylet/raylet" in command for command in modest)
        assert any(temporary.iterdir()), "there is nothing that could be left"
        process.kill()
    assert wait_until_gone(below, temporary, 30) == []
    temporary.rmdir()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


OF_A_WORKER = re.compile(r"(\x1b\[\d+m)?\((raylet|\w+ pid=\d+)")
"""what stands before a line that Ray passes on from another process, coloured in some of its versions"""


def refused(cluster: RayCluster, command: str, *arguments: object, **changes: str) -> str:
    """The error of a job that must not begin. It leaves nothing behind, so that the next one may have the same folder."""
    run = cluster.folder / "runs" / "refused"
    with cluster.job(command, run, *arguments, **changes) as job:
        assert job.end(120) == 2, job.output[-3000:]
    ours = [line for line in job.lines if not OF_A_WORKER.match(line)]
    assert not [line for line in ours if "Traceback" in line]
    assert len(ours) <= 8, job.output
    assert not run.exists()
    return "".join(ours)


def test_no_cluster_at_the_address(cluster: RayCluster) -> None:
    assert "no Ray cluster at 127.0.0.1" in refused(cluster, "ray", "--address", f"127.0.0.1:{free_port()}")
    assert "no Ray dashboard at 127.0.0.1" in refused(cluster, "submit", "--address", f"http://127.0.0.1:{free_port()}")


def test_no_address_is_guessed(cluster: RayCluster) -> None:
    assert "no cluster is joined unasked" in refused(cluster, "ray")
    assert "HOST:PORT" in refused(cluster, "ray", "--address", "auto")
    assert "no cluster is looked for" in refused(cluster, "submit")


def test_a_wrong_token_and_none_and_one_for_all_to_read(cluster: RayCluster, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    wrong.write_text("0" * 64, encoding="utf-8")
    wrong.chmod(0o600)
    assert "does not take this token" in refused(cluster, "ray", "--address", cluster.address, RAY_AUTH_TOKEN_PATH=str(wrong))
    assert "does not take this token" in refused(cluster, "submit", "--address", cluster.dashboard, RAY_AUTH_TOKEN_PATH=str(wrong))
    assert "there is no Ray token" in refused(cluster, "ray", "--address", cluster.address, RAY_AUTH_TOKEN_PATH=str(tmp_path / "none"))
    wrong.chmod(0o644)
    assert "chmod 600" in refused(cluster, "ray", "--address", cluster.address, RAY_AUTH_TOKEN_PATH=str(wrong))


def test_not_enough_devices(cluster: RayCluster) -> None:
    found = refused(cluster, "ray", "ray.workers=9", "ray.min_workers=9", "--address", cluster.address)
    assert "needs 9, the cluster has 4" in found
    found = refused(cluster, "ray", "ray.labels=['kind=none']", "--address", cluster.address)
    assert "needs 1, the cluster has 0" in found


@pytest.mark.parametrize(("kind", "module", "wanted"), [("bare", "raise ImportError('No module named hecate')", "cannot be imported"),
                                                       ("old", "", "different versions of hecate")])  # fmt: skip
def test_a_node_without_the_package_or_with_another_version(
    cluster: RayCluster, tmp_path: Path, kind: str, module: str, wanted: str
) -> None:
    package = tmp_path / "hecate"
    package.mkdir()
    text = module or f"__version__ = '0.0.1'\n__path__.append({str(ROOT / 'hecate')!r})\n"
    (package / "__init__.py").write_text(text, encoding="utf-8")
    node = cluster.add(kind, {"PYTHONPATH": str(tmp_path)})
    try:
        overrides = [f"ray.labels=['kind=in({kind},slow)']", "ray.workers=2", "ray.start_timeout=60"]
        found = refused(cluster, "ray", *overrides, "--address", cluster.address)
    finally:
        cluster.remove(node)
    assert wanted in found
