"""Checks that several machines make together: the same software everywhere, clocks that agree, and what any of them lacks.

torchrun --nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint HOST:PORT -m hecate doctor
"""

from __future__ import annotations

import importlib.metadata as metadata
import json
import platform
import socket
import time
from collections.abc import Mapping, Sequence

import hecate
from hecate.apps.check.doctor.finding import Finding, ok, problem, warning
from hecate.ranks.devices import gather_texts
from hecate.ranks.ranks import Ranks

_PACKAGES = ("torch", "numpy", "numba", "transformers", "triton")
_CLOCK_SECONDS = 5.0
"""by which clocks may differ before logs of several nodes cannot be read side by side"""


def findings_of_all(own: Mapping[str, Finding], ranks: Ranks) -> dict[str, Finding]:
    """This rank's findings, those of both kinds that only all ranks together have, and warnings and problems of other ranks.

    Every rank must call it, and gets the same beside its own.
    """
    ranks.all_max(0.0)  # all come to this point, so that the times below are of one moment
    at = time.time()
    said = {"host": socket.gethostname(), "time": at, "versions": _versions(), "findings": {k: vars(v) for k, v in own.items()}}
    rows = [json.loads(text) for text in gather_texts(json.dumps(said), ranks)]
    found = dict(own)
    found["versions of ranks"] = versions_finding([row["host"] for row in rows], [row["versions"] for row in rows])
    found["clocks of ranks"] = clocks_finding([row["host"] for row in rows], [row["time"] for row in rows])
    for rank, row in enumerate(rows):
        for name, values in row["findings"].items():
            if rank != ranks.rank and values["state"] in ("warning", "problem"):
                found[f"{name} of rank {rank} on {row['host']}"] = Finding(**values)
    return found


def versions_finding(hosts: Sequence[str], versions: Sequence[Mapping[str, str]]) -> Finding:
    """Whether all ranks run the same versions. Different ones can train, and then differ in ways that nobody sees."""
    differing = []
    for name in versions[0]:
        found = [of_rank.get(name, "missing") for of_rank in versions]  # by rank: machines may all be called localhost
        if len(set(found)) > 1:
            each = dict.fromkeys(f"{version} on {host}" for host, version in zip(hosts, found, strict=True))
            differing.append(f"{name}: {', '.join(each)}")
    if differing:
        return problem("; ".join(differing), "install the same versions on all nodes")
    return ok(f"{len(hosts)} ranks have the same")


def clocks_finding(hosts: Sequence[str], times: Sequence[float]) -> Finding:
    """Whether the clocks of all ranks, read at one moment, agree. `times` are seconds since 1970."""
    apart = max(times) - min(times)
    if apart > _CLOCK_SECONDS:
        slow, fast = hosts[times.index(min(times))], hosts[times.index(max(times))]
        return warning(f"{fast} is {apart:.0f} s before {slow}", "set the clocks, or start an NTP service on every node")
    return ok(f"within {apart:.1f} s")


def _versions() -> dict[str, str]:
    found = {"hecate": hecate.__version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "missing"
    return found
