"""Two nodes on one machine: network namespaces joined by a link of limited rate. Needs root.

Ranks enter a namespace before they create their process group (`testing.ranks.run_ranks`). Traffic between ranks of one namespace uses its
loopback interface, so all traffic on `INTERFACE` is between the two nodes.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

INTERFACE = "slow0"
"""the link's end in each namespace"""
_CLONE_NEWNET = 0x40000000
_CAPABILITIES = {"CAP_NET_ADMIN": 12, "CAP_SYS_ADMIN": 21}


def missing_for_slow_link() -> str | None:
    """Return why this process cannot create such a link, or None if it can."""
    absent = [name for name in ("ip", "tc") if shutil.which(name) is None]
    if absent:
        return f"a slow link needs the commands ip and tc (iproute2); not found: {', '.join(absent)}"
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    held = int(next(line.split()[1] for line in status.splitlines() if line.startswith("CapEff:")), 16)
    lacking = [name for name, bit in _CAPABILITIES.items() if not held >> bit & 1]
    return f"a slow link between network namespaces needs root; lacking: {', '.join(lacking)}" if lacking else None


@contextmanager
def slow_link(rate: str = "1gbit") -> Iterator[tuple[str, str]]:
    """Create two namespaces whose only link carries `rate` (in tc's notation) in each direction, and yield their names.

    They are removed at the end, also on SIGTERM, which ends the program as SIGINT does.
    """
    names = (f"hecate-{os.getpid()}-0", f"hecate-{os.getpid()}-1")
    with _sigterm_raises():
        try:
            for name in names:
                _run(f"ip netns add {name}")
            _run(f"ip -n {names[0]} link add {INTERFACE} type veth peer name {INTERFACE} netns {names[1]}")
            for number, name in enumerate(names):
                _run(f"ip -n {name} addr add 10.201.77.{number + 1}/24 dev {INTERFACE}")
                _run(f"ip -n {name} link set lo up")
                _run(f"ip -n {name} link set {INTERFACE} up")
                # A packet waits at most 20 ms for the token bucket.
                _run(f"ip netns exec {name} tc qdisc add dev {INTERFACE} root tbf rate {rate} burst 128kb latency 20ms")
            yield names
        finally:
            for name in names:
                subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def enter(namespace: str) -> None:
    """Move the calling thread, and threads that it starts later, into a namespace, and make gloo use its link."""
    libc = ctypes.CDLL(None, use_errno=True)  # os.setns exists from Python 3.12 on
    with open(f"/run/netns/{namespace}", "rb") as handle:
        if libc.setns(handle.fileno(), _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"setns to {namespace}")
    os.environ["GLOO_SOCKET_IFNAME"] = INTERFACE


def bytes_out() -> int:
    """Return the bytes that have left the caller's namespace over its link, with protocol headers and acknowledgements."""
    # /sys/class/net cannot be used: it belongs to the namespace in which /sys was mounted.
    for line in Path("/proc/self/net/dev").read_text(encoding="utf-8").splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == INTERFACE:
            return int(numbers.split()[8])
    raise OSError(f"no interface {INTERFACE} in this namespace")


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    def leave(number: int, _frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)  # a second signal must not interrupt the removal
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(command: str) -> None:
    result = subprocess.run(command.split(), capture_output=True, text=True, timeout=20, check=False)
    if result.returncode != 0:
        raise OSError(f"`{command}` failed: {result.stderr.strip()}")
