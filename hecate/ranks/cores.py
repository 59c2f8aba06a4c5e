"""How many cores this process may use: of the machine's, those of its affinity (Slurm, taskset) and of its container's share."""

from __future__ import annotations

import os
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """The number of cores that this process may use, at least 1."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cpu_quota(_CGROUP)
    return max(1, allowed if quota is None else min(allowed, int(quota)))


def _cpu_quota(cgroup: Path) -> float | None:
    """The cores that the container may use at a time; None: as many as there are."""
    try:
        quota, _, period = (cgroup / "cpu.max").read_text(encoding="ascii").partition(" ")
    except OSError:
        return None
    return None if quota == "max" else float(quota) / float(period)
