"""Finds the workers of a Ray job whose processes were stopped, as by SIGSTOP, on every node of the job.

Such a worker answers nobody, but Ray takes it for alive. Only its own node sees the state of its process. The controller looks at the
workers of its own node itself; on each other node an actor looks, which holds no device and costs a process of Ray.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from hecate.launch.stopped_ranks import LOOK_SECONDS, StoppedRanks


class NodeWatch:
    """The Ray actor that looks at the processes of one node. It imports neither torch nor what training needs."""

    def __init__(self) -> None:
        self._pid_of: dict[int, int] = {}

    def watch(self, pid_of: dict[int, int]) -> None:
        """Look at these processes from now on: number of a worker -> id of its process."""
        self._pid_of = pid_of

    def stopped(self) -> Iterator[tuple[int, float]]:
        """Yield each worker that has been stopped for a while, and for how many seconds, each time that it is seen so."""
        found = StoppedRanks()
        while True:
            yield from found.look(self._pid_of).items()
            time.sleep(LOOK_SECONDS)

    def end(self, number: int) -> None:
        """Kill a worker that is stopped. Ray would ask it to end first, and wait for its answer."""
        end_process(self._pid_of.get(number))


def end_process(pid: int | None) -> None:
    """Kill a process, if it still lives."""
    if pid is not None:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


class NodeWatches:
    """What watches the nodes of one job."""

    def __init__(self, ray: Any, own_node: str) -> None:
        """Args:
        own_node: id of the node that this process runs on.
        """
        self._ray, self._own_node = ray, own_node
        self._found = StoppedRanks()
        self._pid_of: dict[str, dict[int, int]] = {}
        """a node's id -> the number of a worker -> the id of its process"""
        # By a node's id, for those that are not the controller's.
        self._actors: dict[str, Any] = {}
        self._streams: dict[str, Any] = {}
        self._stopped: set[int] = set()
        """the workers that the last look has found stopped"""

    def look(self, pid_of: Mapping[str, dict[int, int]]) -> dict[int, float]:
        """The workers that have been stopped for `STOPPED_SECONDS`, and for how many seconds. It never waits, and must be called often.

        Args:
            pid_of: node id -> number of a worker -> id of its process, of all workers that are to be watched from now on.
        """
        for node, pids in pid_of.items():
            if node != self._own_node and pids != self._pid_of.get(node):
                self._watch(node, pids)
        self._pid_of = dict(pid_of)
        found = self._found.look(pid_of.get(self._own_node, {}))
        nodes = {stream: node for node, stream in self._streams.items()}
        ready, _ = self._ray.wait(list(nodes), num_returns=len(nodes), timeout=0) if nodes else ([], [])
        for stream in ready:
            try:
                number, seconds = self._ray.get(next(stream))
                found[number] = seconds
            except (self._ray.exceptions.RayError, StopIteration):  # the actor or its node was lost; another one is started
                self._forget(nodes[stream])
        self._stopped = set(found)
        return found

    def end(self, number: int) -> None:
        """Kill a worker if it was found stopped."""
        if number not in self._stopped:
            return
        node = next((node for node, pids in self._pid_of.items() if number in pids), None)
        if node == self._own_node:
            end_process(self._pid_of[node][number])
        elif node in self._actors:
            self._actors[node].end.remote(number)

    def close(self) -> None:
        for node in list(self._actors):
            self._ray.kill(self._actors[node], no_restart=True)
            self._forget(node)

    def _watch(self, node: str, pids: dict[int, int]) -> None:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        if node not in self._actors:
            strategy = NodeAffinitySchedulingStrategy(node, soft=False)
            # The stream takes one thread for good, and orders the other one.
            described = self._ray.remote(NodeWatch).options(num_cpus=0, max_restarts=0, max_concurrency=2, scheduling_strategy=strategy)
            self._actors[node] = described.remote()
            self._streams[node] = self._actors[node].stopped.options(num_returns="streaming").remote()
        self._actors[node].watch.remote(pids)

    def _forget(self, node: str) -> None:
        for held in (self._actors, self._streams, self._pid_of):
            held.pop(node, None)
