"""Start the ranks of a drill's run as each launcher of hecate does, armed with the run's faults."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from hecate.launch import node_launcher
from hecate.launch.addresses import Endpoint, find_endpoint
from hecate.launch.job_secret import job_secret
from hecate.launch.membership.job_policy import JobPolicy
from hecate.launch.ray_job.worker import Worker
from hecate.ranks.launcher_files import TOKEN_VARIABLE

Launcher = Literal["local", "node", "two_nodes", "node_again", "two_nodes_again", "ray"]
"""local: the local launcher, as `hecate train`. node, two_nodes: `hecate launch` on one node or on two, for ranks that go on after
a loss. node_again, two_nodes_again: the same for ranks that do not, all of which start again from the last checkpoint.
ray: a private cluster of this machine, as `hecate ray --address local`."""

_ALIKE = "nodes: [{{devices: {ranks}, flops: 3e9, memory: 3e9}}]\nintra_node: {{bandwidth: 1e9, latency: 1e-5}}\n"


@dataclass(frozen=True)
class LaunchRequest:
    """One run, as JSON has it."""

    launcher: Launcher
    start: tuple[str, ...]
    """see `hecate.apps.check.drill.outcome.Scope`"""
    injected: str
    """the faults, by `hecate.apps.check.drill.armed.to_text`"""
    trace: str
    """path of the file where armed ranks say what they come by"""
    joins: bool
    """whether ranks that take the place of lost ones join, or wait for the end of the run; on Ray they always join"""
    arguments: tuple[str, ...]
    """configuration and overrides"""
    ranks: int
    survives: bool
    """whether the other ranks go on after a loss"""
    restarts: int
    """how often launchers of nodes may start all ranks again, or one in place of a lost one"""

    @property
    def output(self) -> str:
        """The run's folder."""
        return next(one.removeprefix("output_dir=") for one in self.arguments if one.startswith("output_dir="))

    @property
    def rank_arguments(self) -> list[str]:
        """Arguments of the drills' program for one rank."""
        return ["rank", self.injected, self.trace, "yes" if self.joins else "no", *self.arguments]


def launch_drill(asked: LaunchRequest) -> int:
    """Run all ranks, and return the exit status."""
    if asked.launcher in ("node", "node_again"):
        return _hecate_launch(asked, nodes=1, meeting=None, secret=b"")
    if asked.launcher in ("two_nodes", "two_nodes_again"):
        return _two_nodes(asked)
    if asked.launcher == "ray":
        return _ray(asked)
    from hecate.launch.local_launcher import start_and_watch
    from hecate.launch.run_folder import run_folder

    with run_folder() as folder:
        policy = JobPolicy(copied=asked.survives, most=3 if asked.survives else 0)
        return start_and_watch([*asked.start, *asked.rank_arguments], asked.ranks, folder / "store", policy)


def node(asked: LaunchRequest, number: int, endpoint: str) -> int:
    """Run the ranks of one of two nodes on this machine, and return the exit status. Node 0 hosts the meeting point."""
    found = find_endpoint(endpoint)
    seen = replace(found, on_this_node=number == 0)  # otherwise both would host it, since they are on one machine
    return _hecate_launch(asked, nodes=2, meeting=seen, secret=job_secret(None))


def _hecate_launch(asked: LaunchRequest, nodes: int, meeting: Endpoint | None, secret: bytes) -> int:
    from hecate.apps.check.drill.run import PROGRAM

    job = node_launcher.NodesJob(
        name="drill",
        output_dir=asked.output,
        nodes=(nodes, nodes),
        ranks_per_node=asked.ranks // nodes,
        endpoint=None,
        policy=JobPolicy(copied=asked.survives, most=asked.restarts),
    )
    return node_launcher.launch_at(PROGRAM, asked.rank_arguments, job, meeting, secret)


def _two_nodes(asked: LaunchRequest) -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"127.0.0.1:{server.getsockname()[1]}"
    request = json.dumps(vars(asked))
    variables = {**os.environ, TOKEN_VARIABLE: secrets.token_hex(32)}
    processes = [subprocess.Popen([*asked.start, "node", request, str(number), endpoint], env=variables) for number in range(2)]
    try:
        return max(abs(process.wait()) for process in processes)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _ray(asked: LaunchRequest) -> int:
    from hecate.launch.ray_job.driver import LOCAL, run_on_ray

    config, *overrides = asked.arguments
    # What ranks measure of a busy machine may give all sequences to one of them.
    topology = Path(asked.trace).with_name("topology.yaml")
    topology.write_text(_ALIKE.format(ranks=asked.ranks), encoding="utf-8")
    # Workers report each step: after three losses without a report between them, the job would end.
    given = [*overrides, f"topology={topology}", f"ray.workers={asked.ranks}", "ray.report_steps=1"]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return run_on_ray(Path(config), given, LOCAL, None, worker=armed_worker(asked.injected, asked.trace, asked.ranks))


def armed_worker(injected: str, trace: str, ranks: int) -> type[Worker]:
    """The class of the actors of a Ray job whose first workers, one for each rank, meet these faults; those that replace them meet none.

    Ray sends a class made in a function to the actors' processes as it is.
    """

    class ArmedWorker(Worker):
        def __init__(self, number: int, *given: Any) -> None:
            super().__init__(number, *given)
            self._armed = injected if number < ranks else "[]", number, Path(trace)

        def events(self) -> Iterator[dict[str, Any]]:
            from hecate.apps.check.drill.armed import arm_process, from_text

            faults, number, path = self._armed
            arm_process(from_text(faults), number, path)
            yield from super().events()

    return ArmedWorker


def request_of(text: str) -> LaunchRequest:
    """Read what `json.dumps(vars(request))` has written."""
    raw = json.loads(text)
    return LaunchRequest(**{**raw, "start": tuple(raw["start"]), "arguments": tuple(raw["arguments"])})


def run_request(text: str) -> None:
    sys.exit(launch_drill(request_of(text)))


def run_node(text: str, number: str, endpoint: str) -> None:
    sys.exit(node(request_of(text), int(number), endpoint))
