"""A Ray cluster of several raylets on this machine, on loopback, one a test session."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
KINDS = ("fast", "fast", "slow", "slow")
_ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # loopback stays loopback
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}
_SMALL = {"node_ip_address": "127.0.0.1", "object_store_memory": 80 << 20}


class TestCluster:
    """A head without devices, and nodes that have one each."""

    __test__ = False

    def __init__(self, cluster: Any, token_file: Path, folder: Path) -> None:
        self._cluster, self.token_file, self.folder = cluster, token_file, folder
        self.address: str = cluster.address
        self.dashboard = f"http://{cluster.head_node.address_info['webui_url']}"
        self.nodes = {}

    def add(self, slot: int, kind: str, variables: dict[str, str] | None = None) -> Any:
        node = self._cluster.add_node(num_cpus=1, labels={"kind": kind}, env_vars=variables, **_SMALL)
        self.nodes[slot] = node
        return node

    def kill_node(self, slot: int) -> None:
        """As if the machine had lost its power."""
        self._cluster.remove_node(self.nodes.pop(slot), allow_graceful=False)

    def environment(self, **changes: str) -> dict[str, str]:
        """For a process that is to use the cluster."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        given = {"RAY_AUTH_TOKEN_PATH": str(self.token_file), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        return {**kept, **given, **changes}

    def start(self, *arguments: object, **changes: str) -> subprocess.Popen[str]:
        """`hecate ARGUMENTS`, its output in one stream."""
        command = [sys.executable, "-m", "hecate", *map(str, arguments)]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=self.environment(**changes), cwd=self.folder
        )


@contextmanager
def cluster_of(kinds: tuple[str, ...], folder: Path) -> Iterator[TestCluster]:
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32), encoding="utf-8")
    before = dict(os.environ)
    os.environ.update(_ENVIRONMENT, RAY_AUTH_TOKEN_PATH=str(token), PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": True, "dashboard_host": "127.0.0.1", **_SMALL}
    )
    try:
        made = TestCluster(cluster, token, folder)
        for slot, kind in enumerate(kinds):
            made.add(slot, kind)
        yield made
    finally:
        cluster.shutdown()
        os.environ.clear()
        os.environ.update(before)


def read_until(process: subprocess.Popen[str], wanted: Callable[[str], bool], seconds: float = 60) -> list[str]:
    """The lines of a process up to the first that is wanted."""
    assert process.stdout is not None
    lines: list[str] = []
    deadline = time.monotonic() + seconds
    for line in process.stdout:
        lines.append(line)
        if wanted(line):
            return lines
        if time.monotonic() > deadline:
            break
    raise AssertionError("it did not come to that:\n" + "".join(lines))
