"""A job's figures in Prometheus' text format, served on loopback where asked for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from hecate.errors import UserError

_GAUGES = {
    "step": ("hecate_step", "optimizer steps done"),
    "loss": ("hecate_loss", "cross-entropy per label token"),
    "tokens_per_s": ("hecate_tokens_per_second", "training tokens a second, all ranks together"),
    "imbalance": ("hecate_imbalance", "largest over mean load of the ranks"),
    "generation": ("hecate_generation", "process groups of this job so far"),
}
_DEVICE_GAUGES = {
    "sequences": ("hecate_device_sequences", "sequences of a micro-step"),
    "experts": ("hecate_device_experts", "experts owned"),
    "speed": ("hecate_device_speed", "real over planned speed"),
}


def exposition(status: dict[str, Any]) -> str:
    """The text of a scrape."""
    lines = []
    for key, (name, meaning) in _GAUGES.items():
        if status[key] is not None:
            lines += [f"# HELP {name} {meaning}", f"# TYPE {name} gauge", f"{name} {status[key]}"]
    for key, (name, meaning) in _DEVICE_GAUGES.items():
        values = [(device, device[key]) for device in status["devices"] if device[key] is not None]
        if values:
            lines += [f"# HELP {name} {meaning}", f"# TYPE {name} gauge"]
            lines += [f'{name}{{device="{device["device"]}",kind="{_escaped(device["kind"])}"}} {value}' for device, value in values]
    lines += [
        "# HELP hecate_state 1 for the state the job is in",
        "# TYPE hecate_state gauge",
        f'hecate_state{{state="{status["state"]}"}} 1',
    ]
    return "\n".join(lines) + "\n"


@contextmanager
def serving(port: int, status: Callable[[], dict[str, Any]]) -> Iterator[int]:
    """Answer GET /metrics on 127.0.0.1:`port` (0: any) until the end of the block; gives the port.

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


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
