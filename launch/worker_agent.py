"""Starts a worker as a process of its own, hands on orders to it, and what it tells to whoever asks. Knows no Ray.

As a Ray actor it keeps Ray's threads out of the rank's process. One of them asks for the interpreter a hundred times a second, and each
time the training thread would have to give it up.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import hecate
from hecate.launch.worker import Event
from hecate.local_store import LAUNCHED_VARIABLE

_END_SECONDS = 5.0


class WorkerAgent:
    """Its methods may be called by two threads: `events` by one, the others by the other."""

    def __init__(self, config: str, report_steps: int, address: str) -> None:
        """Args: of the `Worker`."""
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._line, its = socket.socketpair()
        with its:
            self._process = subprocess.Popen(
                # -P: the same hecate as here, not one in the folder that this process happens to be in
                [sys.executable, "-P", "-m", "hecate.launch.worker", str(its.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[its.fileno()],
                env={**os.environ, "PYTHONPATH": _python_path(), LAUNCHED_VARIABLE: str(os.getpid())},
                start_new_session=True,  # a terminal's signals are the driver's business
            )
        self._send({"config": config, "report_steps": report_steps, "address": address})
        threading.Thread(target=self._listen, daemon=True).start()

    def facts(self) -> Any:
        """`Worker.facts`.

        Raises:
            RuntimeError: the worker has ended; how.
        """
        return self._ask("facts")

    def ping(self) -> Any:
        """Returns when the worker has answered.

        Raises:
            RuntimeError: it has ended; how.
        """
        return self._ask("ping")

    def tell(self, method: str, *arguments: Any) -> None:
        """An order: a method of `Worker` without an answer."""
        self._send({"method": method, "arguments": arguments})

    def events(self) -> Iterator[Event]:
        """What the worker tells, as it happens; last of all `down`, with `text`: how it has ended."""
        while True:
            event = self._events.get()
            yield event
            if event["kind"] == "down":
                return

    def _ask(self, method: str) -> Any:
        self.tell(method)
        answer = self._answers.get()
        if answer["kind"] == "down":
            self._answers.put(answer)  # for whoever asks next
            raise RuntimeError(answer["text"])
        return answer["value"]

    def _send(self, message: dict[str, Any]) -> None:
        with suppress(BrokenPipeError, ConnectionResetError):  # `_listen` sees it
            self._line.sendall(json.dumps(message).encode() + b"\n")

    def _listen(self) -> None:
        text = ""
        with self._line.makefile("r", encoding="utf-8") as said, suppress(ConnectionResetError):
            for event in map(json.loads, said):
                if event["kind"] == "broken":
                    text = event["text"]
                else:
                    (self._answers if event["kind"] == "answer" else self._events).put(event)
        down = {"kind": "down", "text": text or self._how_it_ended()}
        self._events.put(down)
        self._answers.put(down)

    def _how_it_ended(self) -> str:
        try:
            code = self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            return "it has closed its connection"
        return f"it was killed by {signal.Signals(-code).name}" if code < 0 else f"it ended with status {code}"


def _python_path() -> str:
    return os.pathsep.join([str(Path(hecate.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
