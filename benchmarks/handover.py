"""Processes that hand the machine over to each other: each waits until it is asked for a step, takes it, and says how long it took.

Sides that cannot share a process take turns so, sample by sample. A process that waits for its turn uses no processor.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

TOOK = "took "
"""what an answer begins with; other lines that libraries print are passed over"""


class Worker:
    """A process that takes steps. It ends when it leaves the `with` block.

    Args:
        command: of a program that calls `take_steps`, or does as that does.
        settings: of its environment, beside this process's and one thread.
    """

    def __init__(self, command: Sequence[str], settings: Mapping[str, str], folder: Path | None = None) -> None:
        self._command = command
        self._process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, **settings, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._process.kill()
        self.end()

    def step(self) -> float:
        """The seconds of one step.

        Raises:
            SystemExit: the process has ended.
        """
        self.ask()
        return self.answer()

    def ask(self) -> None:
        """Ask for a step, and do not wait for it, so that ranks of one group can be asked together.

        Raises:
            SystemExit: the process has ended.
        """
        assert self._process.stdin is not None
        try:
            print(file=self._process.stdin, flush=True)
        except BrokenPipeError:
            self._failed()

    def answer(self) -> float:
        """The seconds of the step that was asked for.

        Raises:
            SystemExit: the process has ended.
        """
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(TOOK):
                return float(line.removeprefix(TOOK))
        return self._failed()

    def dismiss(self) -> None:
        """Ask for no more steps, and do not wait for the end, so that ranks of one group can leave it together."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended already
            self._process.stdin.close()

    def end(self) -> None:
        """Let the process write what it has found, and end.

        Raises:
            SystemExit: it has failed.
        """
        if self._process.returncode is None:
            assert self._process.stdin is not None
            if self._process.stdin.closed:
                self._process.stdin = None  # `communicate` would flush it
            self._process.communicate()
            if self._process.returncode > 0:
                self._failed()

    def _failed(self) -> float:
        sys.exit(f"{' '.join(map(str, self._command))[:300]} has ended (exit status {self._process.wait()})")


class WorkerGroup:
    """Ranks of one process group, which take their steps together. They end when it leaves the `with` block.

    Args:
        command: of a rank, as in `Worker`; its place in the group stands in its environment, as torch's processes read it.
        settings: of their environment.
    """

    def __init__(self, command: Sequence[str], ranks: int, settings: Mapping[str, str], folder: Path | None = None) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        group = {"WORLD_SIZE": f"{ranks}", "LOCAL_WORLD_SIZE": f"{ranks}", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}
        places = [{"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "GLOO_SOCKET_IFNAME": "lo"} for rank in range(ranks)]
        self._ranks = [Worker(command, {**settings, **group, **place}, folder) for place in places]
        self.clock: list[float] = []
        """the seconds by the clock of each step"""

    def __enter__(self) -> WorkerGroup:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        for rank in self._ranks:
            # All of them, before one is waited for: at its end a rank may wait for the others.
            rank.dismiss()
        with ExitStack() as stack:
            for rank in self._ranks:
                stack.callback(rank.__exit__, kind, *error)

    def step(self) -> float:
        """The sum of the ranks' answers for one step.

        Raises:
            SystemExit: a rank has ended.
        """
        started = time.perf_counter()
        for rank in self._ranks:
            rank.ask()
        seconds = sum(rank.answer() for rank in self._ranks)
        self.clock.append(time.perf_counter() - started)
        return seconds


def take_steps(step: Callable[[], float]) -> None:
    """Take a step for each line of the standard input, until that ends.

    Args:
        step: a function that takes one and returns its seconds.
    """
    for _ in sys.stdin:
        print(f"{TOOK}{step()!r}", flush=True)
