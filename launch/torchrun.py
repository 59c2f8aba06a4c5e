"""`hecate launch`: start the ranks of a node with torch's elastic agent, which starts them again after a failure.

Each node runs one agent. It starts the node's ranks and watches them. When a rank dies or a node comes or goes, the agents start all ranks
again, and the run goes on from its last checkpoint, on as many ranks as there are then. A job on one node listens on loopback only: its
agent and its ranks meet through files.

A run with `fssdp.redundancy` needs no agent, since its ranks go on without those that are lost: on one node the local launcher starts
them, on several `hecate.launch.surviving_nodes`.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hecate.config import Config
from hecate.errors import USER_ERROR_EXIT, UserError
from hecate.launch.addresses import Endpoint, check_free, find_endpoint, wait_for
from hecate.launch.foreign_texts import AgentAction, agent_action
from hecate.launch.fork_server import forking
from hecate.launch.local_launcher import RANK_SETTINGS, launch_local, run_first
from hecate.launch.rank_command import RankCommand, cause_of
from hecate.launch.run_folder import run_folder
from hecate.launch.stopped_ranks import end_stopped_ranks
from hecate.parallel.mesh import make_mesh
from hecate.ranks.cores import usable_cores
from hecate.ranks.gpu_allocator import gpu_allocator_defaults
from hecate.ranks.launcher_files import (
    ERRORS_VARIABLE,
    LAUNCHED_VARIABLE,
    LOST_PEER_EXIT,
    MEETING_VARIABLE,
    STORE_VARIABLE,
    all_saved,
    failure_of,
    mistakes,
    note_again,
)
from hecate.ranks.sockets import notice_lost_machines, tcp_sockets
from hecate.train.preflight import check_devices

_QUICK = {"keep_alive_interval": 1, "keep_alive_max_attempt": 3, "last_call_timeout": 3}
"""Seconds. With these a dead node is noticed in half of the time that torch's own settings take."""
_SHUTDOWN_SECONDS = 7 * 24 * 3600
"""how long ranks may take to save after a signal"""
_SAVED_SECONDS = 5.0
"""after this time since all ranks of this node have saved and ended, the signal has not come to this node"""
_LOOK_SECONDS = 5.0
"""how often the connections to the meeting point are looked at"""


def node_range(text: str) -> tuple[int, int]:
    """Read the value of --nnodes, `N` or `MIN:MAX`, as the smallest and the largest number of nodes.

    Raises:
        UserError: the text has neither form.
    """
    low, colon, high = text.partition(":")
    if not low.isdigit() or (colon and not high.isdigit()) or not 1 <= int(low) <= int(high or low):
        raise UserError(f"--nnodes {text!r}: must be a number of nodes, or MIN:MAX for a job that may shrink and grow, as in 2:4")
    return int(low), int(high or low)


def check_fit(config: Config, nodes: tuple[int, int], ranks_per_node: int) -> None:
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
    from hecate.config.topology import whole_topology

    devices = whole_topology(config, ()).topology.world_size
    if nodes[0] != nodes[1]:
        raise UserError(f"topology: {config.topology} has {devices} devices, but the job may shrink and grow (--nnodes): use topology=auto")
    if devices != nodes[0] * ranks_per_node:
        raise UserError(
            f"topology: {config.topology} has {devices} devices, but the job has {nodes[0] * ranks_per_node} ranks\n"
            f"  ({nodes[0]} nodes of {ranks_per_node}: --nnodes, --nproc-per-node)"
        )


@dataclass(frozen=True, kw_only=True)
class TorchrunJob:
    """The settings of a job. They must be the same on all of its nodes."""

    name: str
    nodes: tuple[int, int]
    """smallest and largest number of nodes"""
    ranks_per_node: int
    endpoint: str | None
    """HOST:PORT where the nodes meet; None: there is one node"""
    max_restarts: int
    """How often the ranks may be started again after a failure. Where they survive: how many may be started in place of lost ones."""
    survives: bool = False
    """whether the ranks can go on without one that dies (`fssdp.redundancy`)"""
    together: int = 1
    """see `hecate.launch.local_launcher.launch_local`"""
    first: Sequence[str] = ()
    """likewise, on each node"""


def launch(program: str, arguments: Sequence[str], job: TorchrunJob) -> int:
    """Run this node's ranks, each of them `python -m PROGRAM ARGUMENTS`, and return the exit status.

    Every node must call it with the same values.

    Raises:
        UserError: the nodes cannot meet.
    """
    several = job.nodes[1] > 1
    if several and job.endpoint is None:
        raise UserError("--rdzv-endpoint: must be given with several nodes: HOST:PORT of one of them, the same on all")
    return launch_at(program, arguments, job, find_endpoint(job.endpoint) if several and job.endpoint is not None else None)


def launch_at(program: str, arguments: Sequence[str], job: TorchrunJob, meeting: Endpoint | None) -> int:
    """`launch` with the meeting point as this node sees it; None: there is one node."""
    if job.survives and meeting is None:
        return launch_local(
            program,
            arguments,
            job.ranks_per_node,
            survives=True,
            together=job.together,
            most_replaced=job.max_restarts,
            first=job.first,
        )
    if meeting is not None and meeting.on_this_node:
        check_free(meeting)
    with run_folder() as folder:
        _set_environment(folder, meeting, job.ranks_per_node)
        if job.survives and meeting is not None:
            return _run_surviving(program, arguments, folder, meeting, job)
        if meeting is not None and not meeting.on_this_node:
            wait_for(meeting)
        return _run(program, arguments, folder, meeting, job)


def _set_environment(folder: Path, meeting: Endpoint | None, ranks_per_node: int) -> None:
    """Set the environment variables of this process, which the ranks inherit."""
    # Otherwise torch 2.13 gives the ranks the agents' own store, and its keys from before a restart break the ranks' meeting after it.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    os.environ[LAUNCHED_VARIABLE] = str(os.getpid())
    os.environ[ERRORS_VARIABLE] = str(folder)
    defaults = {
        **RANK_SETTINGS,
        **gpu_allocator_defaults(os.environ),
        "TQDM_DISABLE": "1",
        "OMP_NUM_THREADS": str(max(1, usable_cores() // ranks_per_node)),
    }
    if meeting is None:
        os.environ[STORE_VARIABLE] = str(folder / "store")
        defaults |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    elif meeting.interface:
        # By default gloo takes the interface of the host's own name, which on many machines is loopback.
        defaults |= {"GLOO_SOCKET_IFNAME": meeting.interface, "NCCL_SOCKET_IFNAME": meeting.interface}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def _run_surviving(program: str, arguments: Sequence[str], folder: Path, meeting: Endpoint, job: TorchrunJob) -> int:
    from hecate.launch.node_messages import JobShape
    from hecate.launch.surviving_nodes import follow, lead

    shape = JobShape(job.name, *job.nodes, job.ranks_per_node)
    with forking(folder, os.environ, program) as start:
        if status := run_first(start, job.first, folder):
            return status
        environment = {**os.environ, MEETING_VARIABLE: f"{meeting.host}:{meeting.port}"}
        own = RankCommand([*start, *arguments], environment, folder / "store", survives=True)
        if meeting.on_this_node:
            return lead(own, shape, meeting, job.together, job.max_restarts)
        return follow(own, shape, meeting)


def _run(program: str, arguments: Sequence[str], folder: Path, meeting: Endpoint | None, job: TorchrunJob) -> int:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousClosedError, RendezvousConnectionError, RendezvousError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    _listen_to_the_agent(folder)
    threading.Thread(target=end_stopped_ranks, args=(folder,), daemon=True).start()
    threading.Thread(target=_stop_with_the_ranks, args=(folder, job.ranks_per_node), daemon=True).start()
    settings: dict[str, Any] = dict(_QUICK)
    if meeting is None:
        settings["store_type"] = "file"
    else:
        settings["is_host"] = meeting.on_this_node
        threading.Thread(target=_notice_lost_meeting_point, args=(meeting,), daemon=True).start()
    launch_config = LaunchConfig(
        min_nodes=job.nodes[0],
        max_nodes=job.nodes[1],
        nproc_per_node=job.ranks_per_node,
        run_id=job.name,
        rdzv_backend="c10d",
        rdzv_endpoint=str(folder / "meeting") if meeting is None else f"{meeting.host}:{meeting.port}",
        rdzv_configs=settings,
        local_addr="127.0.0.1" if meeting is None else meeting.local_address,
        max_restarts=job.max_restarts,
        logs_specs=DefaultLogsSpecs(log_dir=str(folder)),
    )
    # After a signal ranks end their step and save, which may take long; a second signal ends them at once.
    if hasattr(launch_config, "shutdown_timeout"):  # torch 2.13
        launch_config.shutdown_timeout = _SHUTDOWN_SECONDS
    try:
        with forking(folder, os.environ, program) as start:
            if status := run_first(start, job.first, folder):
                return status
            executable, *options = start
            elastic_launch(launch_config, executable)(*options, *arguments)
    except (ChildFailedError, RendezvousConnectionError, RendezvousClosedError) as error:
        if found := mistakes(folder):
            if found[0].name != "error-0":  # rank 0 prints its own error
                print(found[0].read_text(encoding="utf-8"), file=sys.stderr)
            return USER_ERROR_EXIT
        if isinstance(error, ChildFailedError):
            return _report(error.failures, folder, job.max_restarts)
        if isinstance(error, RendezvousClosedError):
            print(
                "hecate: the job is over, because another node has given up; its own output has the reason\n"
                "  when the cause is mended, start all nodes again with resume=true",
                file=sys.stderr,
            )
            return 1
        print(
            f"hecate: the meeting point of the nodes, {launch_config.rdzv_endpoint}, is lost, and no node goes on without it\n"
            "  when the node that hosts it is back, start all nodes again with resume=true",
            file=sys.stderr,
        )
        return 1
    except SignalException as stopped:
        print(f"hecate: stopped by {signal.Signals(stopped.sigval).name}; resume=true goes on from the last checkpoint", file=sys.stderr)
        return 128 + int(stopped.sigval)
    except RendezvousError as error:
        where = "" if meeting is None else f" at {meeting.host}:{meeting.port}"
        raise UserError(
            f"the nodes could not meet{where}: {(str(error) or type(error).__name__).splitlines()[0]}\n"
            f"  {job.nodes[0]} nodes must be started, each with the same --nnodes, --rdzv-endpoint and --rdzv-id"
        ) from None
    return 0


def _stop_with_the_ranks(folder: Path, ranks_per_node: int) -> None:
    """End this process when its ranks have saved and ended because of a signal that has come to another node alone.

    Otherwise the agent takes that for the end of the run, and waits five minutes for the other node's agent.
    """
    since = time.monotonic()
    while time.monotonic() - since < _SAVED_SECONDS:
        time.sleep(0.2)
        if not all_saved(folder, ranks_per_node):
            since = time.monotonic()
    print("hecate: a signal to another node has stopped the job, whose ranks have saved", file=sys.stderr, flush=True)
    os._exit(128 + signal.SIGTERM)  # the main thread waits in a store, which no signal interrupts; what guards the run's folder removes it


def _notice_lost_meeting_point(meeting: Endpoint) -> None:
    """Break the connections to the meeting point when its machine is gone. Without that, the agent's store waits for an answer for ever.

    The store opens its connections itself, at times that are not announced, so this function looks for new ones again and again.
    """
    while True:
        notice_lost_machines({c for c in tcp_sockets() if c.peer is not None and c.peer[1] == meeting.port})
        time.sleep(_LOOK_SECONDS)


def _report(failures: dict[int, Any], folder: Path, max_restarts: int) -> int:
    """Print why the first rank that failed did so, and return the exit status."""
    if any(failure.exitcode == USER_ERROR_EXIT for failure in failures.values()):  # for example a wrong argument
        return USER_ERROR_EXIT
    said = {rank: failure_of(folder, rank) for rank in failures}
    rank = min(failures, key=lambda rank: (not said[rank], failures[rank].exitcode == LOST_PEER_EXIT, failures[rank].timestamp))
    cause = cause_of(failures[rank].exitcode, said[rank])
    print(
        f"hecate: rank {rank} {cause}, and {max_restarts} restarts are used up; resume=true goes on from the last checkpoint, if any",
        file=sys.stderr,
    )
    return 1


class _Restarts(logging.Handler):
    """Prints a line for the user when the agent logs that it starts the ranks again. The rest of its log is for torch's developers."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def emit(self, record: logging.LogRecord) -> None:
        action = agent_action(record.getMessage())
        if action is not None:
            note_again(self._folder)
        if action is None or (action is AgentAction.RANK_LOST and mistakes(self._folder)):
            return  # after a user's mistake the agent starts the ranks again, too, but these end at once
        print(f"hecate: {action.value}; all start again from the last checkpoint", file=sys.stderr, flush=True)


def _listen_to_the_agent(folder: Path) -> None:
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    agent = logging.getLogger("torch.distributed.elastic.agent.server.api")
    agent.setLevel(logging.INFO)
    agent.propagate = False
    agent.handlers = [_Restarts(folder)]
