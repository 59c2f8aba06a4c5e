"""`hecate launch`: start the ranks of a node, on one node or the same command on several.

A job on one node listens on loopback only, and its ranks meet through files. Those of several nodes meet at the address of one of them,
where nobody is answered who does not hold the job's secret (`hecate.launch.surviving_nodes`, `hecate.launch.job_secret`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from hecate.config import Config
from hecate.errors import UserError
from hecate.io.one_writer import one_writer
from hecate.launch.addresses import Endpoint, find_endpoint
from hecate.launch.fork_server import forking
from hecate.launch.job_secret import job_secret
from hecate.launch.local_launcher import default_variables, launch_local, run_first
from hecate.launch.membership.job_policy import JobPolicy
from hecate.launch.node_messages import JobShape, MessageStore
from hecate.launch.rank_command import RankCommand
from hecate.launch.run_folder import run_folder
from hecate.launch.surviving_nodes import follow, lead
from hecate.parallel.cluster.mesh import make_mesh
from hecate.ranks.launcher_files import LAUNCHED_VARIABLE, MEETING_VARIABLE, TOKEN_VARIABLE
from hecate.train.preflight import check_devices


def node_range(text: str) -> tuple[int, int]:
    """Read the value of --nnodes, `N` or `MIN:MAX`, as the smallest and the largest number of nodes.

    Raises:
        UserError: the text has neither form.
    """
    low, colon, high = text.partition(":")
    if not low.isdigit() or (colon and not high.isdigit()) or not 1 <= int(low) <= int(high or low):
        raise UserError(f"--nnodes {text!r}: must be a number of nodes, or MIN:MAX for a job that may shrink and grow, as in 2:4")
    return int(low), int(high or low)


def check_job_fits(config: Config, nodes: tuple[int, int], ranks_per_node: int) -> None:
    """Check that the job's ranks fit this node's GPUs, the configured topology, the sharding groups and the tensor groups.

    Raises:
        UserError: they do not fit one of these.
    """
    shard_size, tp_size = config.fssdp.shard_size, config.model.tensor_parallel
    if nodes[0] == nodes[1]:
        make_mesh(nodes[0] * ranks_per_node, shard_size, tp_size)
    else:
        for key, size in (("fssdp.shard_size", shard_size), ("model.tensor_parallel", tp_size)):
            if size is not None and ranks_per_node % size:
                raise UserError(
                    f"{key}: must divide the number of ranks on a node, which is {ranks_per_node}, got {size}\n"
                    "  The job may shrink and grow by whole nodes (--nnodes). Give another --nproc-per-node"
                )
    check_devices(ranks_per_node, "--nproc-per-node")
    if config.topology == "auto":
        return
    from hecate.config.files.topology import whole_topology

    devices = whole_topology(config, ()).topology.world_size
    if nodes[0] != nodes[1]:
        raise UserError(f"topology: {config.topology} has {devices} devices, but the job may shrink and grow (--nnodes): use topology=auto")
    if devices != nodes[0] * ranks_per_node:
        raise UserError(
            f"topology: {config.topology} has {devices} devices, but the job has {nodes[0] * ranks_per_node} ranks\n"
            f"  ({nodes[0]} nodes of {ranks_per_node}: --nnodes, --nproc-per-node)"
        )


@dataclass(frozen=True, kw_only=True)
class NodesJob:
    """The settings of a job. They must be the same on all of its nodes."""

    name: str
    nodes: tuple[int, int]
    """the smallest and the largest number of nodes"""
    ranks_per_node: int
    output_dir: str
    """the run's folder, which one job alone writes to"""
    endpoint: str | None
    """HOST:PORT where the nodes meet; None: there is one node"""
    token_file: Path | None = None
    """the file with the job's secret; None: the variable HECATE_TOKEN has it, or there is one node"""
    policy: JobPolicy
    """what follows when ranks are lost. The numbers of nodes say with how many ranks the job begins."""
    first: Sequence[str] = ()
    """see `hecate.launch.local_launcher.launch_local`; on each node"""


def launch(program: str, arguments: Sequence[str], job: NodesJob) -> int:
    """Run this node's ranks, each of them `python -m PROGRAM ARGUMENTS`, and return the exit status.

    Every node must call it with the same values.

    Raises:
        UserError: the nodes cannot meet.
    """
    if job.nodes[1] == 1:
        return launch_at(program, arguments, job, None, b"")
    if job.endpoint is None:
        raise UserError("--rdzv-endpoint: must be given with several nodes: HOST:PORT of one of them, the same on all")
    meeting = find_endpoint(job.endpoint)
    return launch_at(program, arguments, job, meeting, job_secret(job.token_file))


def launch_at(program: str, arguments: Sequence[str], job: NodesJob, meeting: Endpoint | None, secret: bytes) -> int:
    """`launch` with the meeting point as this node sees it, and the job's secret; None: there is one node."""
    if meeting is None:
        with one_writer(job.output_dir):
            return launch_local(program, arguments, job.ranks_per_node, job.policy, first=job.first)
    shape = JobShape(job.name, *job.nodes, job.ranks_per_node, job.policy.copied, job.output_dir)
    # Before the ranks' imports, which take seconds. Of several launchers on one machine the first one leads.
    hosted = MessageStore.host(meeting, shape, secret) if meeting.on_this_node else None
    # The node that leads alone claims the folder, which all nodes share: a second claim would refuse this very job.
    with one_writer(job.output_dir) if hosted else nullcontext(), run_folder() as folder:
        environment = _environment(meeting, secret, job.ranks_per_node)
        with forking(folder, environment, program) as start:
            if status := run_first(start, job.first, folder):
                return status
            own = RankCommand([*start, *arguments], environment, folder / "store", job.policy.copied)
            if hosted:
                return lead(own, shape, hosted, job.policy)
            return follow(own, shape, meeting, secret)


def _environment(meeting: Endpoint, secret: bytes, ranks_per_node: int) -> dict[str, str]:
    """The environment variables that are the same for all ranks of a node."""
    defaults = default_variables(ranks_per_node)
    if meeting.interface:
        # By default gloo takes the interface of the host's own name, which on many machines is loopback.
        defaults |= {"GLOO_SOCKET_IFNAME": meeting.interface, "NCCL_SOCKET_IFNAME": meeting.interface}
    own = {
        LAUNCHED_VARIABLE: str(os.getpid()),
        MEETING_VARIABLE: f"{meeting.host}:{meeting.port}",
        TOKEN_VARIABLE: secret.decode(),
    }
    return defaults | dict(os.environ) | own
