"""Run the command line in a process that is forked from one with torch and transformers loaded: their import takes most of a small command.

The process that its ranks are forked from (`hecate.launch.fork_server`) is forked from the command's process for the same reason.

Tests of what a user meets at the very start (imports, signals, terminals) start `python -m hecate` by themselves.
"""

from __future__ import annotations

import atexit
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from testing.ranks import fork_server_process


def run_hecate(
    arguments: Sequence[str], *, folder: Path | None = None, environment: Mapping[str, str] | None = None, given: str = "", timeout: float
) -> subprocess.CompletedProcess[str]:
    """Run `hecate` with these arguments to its end, and return its status and what it has printed.

    Args:
        folder: the working directory; None: this process's.
        environment: of the command; None: this process's. What torch and numba read when they are imported is of no effect.
        given: its standard input.

    Raises:
        subprocess.TimeoutExpired: it has not ended after `timeout` seconds, and was killed.
    """
    with tempfile.TemporaryFile("w+") as stdin, tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        stdin.write(given)
        stdin.seek(0)
        streams = [_path(stream) for stream in (stdin, stdout, stderr)]
        where, variables = str(folder or Path.cwd()), dict(os.environ if environment is None else environment)
        process: Any = fork_server_process(_command, (list(arguments), where, variables, streams))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(["hecate", *arguments], timeout, _text(stdout), _text(stderr))
        return subprocess.CompletedProcess(["hecate", *arguments], process.exitcode, _text(stdout), _text(stderr))


def _command(arguments: list[str], folder: str, environment: dict[str, str], streams: list[str]) -> None:
    for number, path in enumerate(streams):
        opened = os.open(path, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_APPEND)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["hecate", *arguments]
    from hecate.cli import main
    from hecate.launch import fork_server

    started = fork_server._start
    fork_server._start = lambda *given: _ForkedServer(*given) if _is_single() else started(*given)  # type: ignore[assignment,return-value]
    main()


class _ForkedServer:
    """What `subprocess.Popen` gives for a fork server, of one that is forked from this process instead of started anew."""

    def __init__(self, listening: socket.socket, environment: Mapping[str, str], program: str) -> None:
        reading, writing = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        self._pid = os.fork()
        if self._pid == 0:
            _become_server(reading, listening.fileno(), environment, program)
        os.close(reading)
        self.stdin = os.fdopen(writing, "wb")

    def wait(self) -> int:
        _, status = os.waitpid(self._pid, 0)
        return os.waitstatus_to_exitcode(status)


def _become_server(stdin: int, listening: int, environment: Mapping[str, str], program: str) -> None:
    """Go on as `python -m hecate.launch.fork_server` with the modules that this process has loaded, and never return."""
    from hecate.io.process_end import run_and_end
    from hecate.launch import fork_server

    os.setsid()
    os.dup2(stdin, 0)
    os.closerange(3, listening)
    os.closerange(listening + 1, os.sysconf("SC_OPEN_MAX"))
    atexit._clear()
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [fork_server.__file__, str(listening), program]
    run_and_end(fork_server.main)


def _is_single() -> bool:
    """Whether this process has one thread, so that forking it is safe."""
    return len(os.listdir("/proc/self/task")) == 1


def _path(stream: IO[str]) -> str:
    """A name by which another process opens a file that has none."""
    return f"/proc/{os.getpid()}/fd/{stream.fileno()}"


def _text(stream: IO[str]) -> str:
    stream.seek(0)
    return stream.read()
