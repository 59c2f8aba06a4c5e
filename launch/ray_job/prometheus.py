"""A job's figures in Prometheus' text format, served on loopback if the user asks for it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from hecate.errors import UserError
from hecate.launch.ray_job.status import DeviceStatus, JobStatus

Number = float | None
_GAUGES: tuple[tuple[str, str, Callable[[JobStatus], Number]], ...] = (
    ("hecate_step", "optimizer steps done", lambda job: job.step),
    ("hecate_loss", "cross-entropy per label token", lambda job: job.loss),
    ("hecate_tokens_per_second", "training tokens a second, all ranks together", lambda job: job.tokens_per_s),
    ("hecate_imbalance", "largest over mean load of the ranks", lambda job: job.imbalance),
    ("hecate_generation", "process groups of this job so far", lambda job: job.generation),
)
_DEVICE_GAUGES: tuple[tuple[str, str, Callable[[DeviceStatus], Number]], ...] = (
    ("hecate_device_sequences", "sequences of a micro-step", lambda device: device.sequences),
    ("hecate_device_experts", "experts owned", lambda device: device.experts),
    ("hecate_device_speed", "real over planned speed", lambda device: device.speed),
)


def exposition(status: JobStatus) -> str:
    """The text that answers one request of Prometheus."""
    lines = []
    for name, meaning, value_of in _GAUGES:
        lines += _gauge(name, meaning, [("", value_of(status))])
    for name, meaning, device_value in _DEVICE_GAUGES:
        labels = [f'{{device="{device.device}",kind="{_escaped(device.kind)}"}}' for device in status.devices]
        lines += _gauge(name, meaning, list(zip(labels, map(device_value, status.devices), strict=True)))
    lines += _gauge("hecate_state", "1 for the state the job is in", [(f'{{state="{status.state.value}"}}', 1)])
    return "\n".join(lines) + "\n"


@contextmanager
def serving(port: int, status: Callable[[], JobStatus]) -> Iterator[int]:
    """Answer GET /metrics on 127.0.0.1:`port` (0: any free port) until the end of the block; gives the port.

    Raises:
        UserError: the port is taken.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = self.path == "/metrics"
            body = exposition(status()).encode() if found else b"try /metrics\n"
            self.send_response(200 if found else 404)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except OSError as error:
        raise UserError(f"--metrics-port {port}: {error.strerror}; give another, or 0 for any") from None
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield int(server.server_address[1])
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _gauge(name: str, meaning: str, values: list[tuple[str, Number]]) -> list[str]:
    """The lines of one gauge: its values by their labels. A value that is not known has no line, a gauge without values none at all."""
    lines = [f"{name}{labels} {value}" for labels, value in values if value is not None]
    return [f"# HELP {name} {meaning}", f"# TYPE {name} gauge", *lines] if lines else []


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
