"""Give a process a whole processor, or half of one.

A cgroup's weight and quota do this, or, if none can be created, signals that stop the process half of the time.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

_PERIOD_US = 10_000
_WEIGHT = {"cpu.shares": "100000", "cpu.weight": "10000"}
"""the weight relative to other programs on the machine"""


class Processor:
    """The processor share of a process. Call `halve` and `free` any number of times, then `close`."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._stopper: subprocess.Popen[bytes] | None = None
        self._group = _cgroup(pid)

    @property
    def how(self) -> str:
        return "SIGSTOP half of the time" if self._group is None else "cgroup quota"

    def halve(self) -> None:
        if self._group is not None:
            _set_quota(self._group, _PERIOD_US // 2)
        elif self._stopper is None:
            beat = _PERIOD_US / 2e6
            stop, go = f"os.kill({self._pid}, signal.SIGSTOP)", f"os.kill({self._pid}, signal.SIGCONT)"
            code = f"import os, signal, time\nwhile True:\n    {stop}; time.sleep({beat}); {go}; time.sleep({beat})\n"
            self._stopper = subprocess.Popen([sys.executable, "-c", code])

    def free(self) -> None:
        if self._group is not None:
            _set_quota(self._group, None)
        elif self._stopper is not None:
            self._stopper.kill()
            self._stopper.wait()
            self._stopper = None
            os.kill(self._pid, signal.SIGCONT)

    def close(self) -> None:
        self.free()
        if self._group is not None:
            (self._group.parent / "cgroup.procs").write_text(str(self._pid), encoding="utf-8")
            self._group.rmdir()


def _cgroup(pid: int) -> Path | None:
    for root in (Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup")):
        group = root / f"hecate-{pid}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            _set_quota(group, None)
            for name, weight in _WEIGHT.items():
                if (group / name).exists():
                    (group / name).write_text(weight, encoding="utf-8")
            (group / "cgroup.procs").write_text(str(pid), encoding="utf-8")
        except OSError:
            group.rmdir()
        else:
            return group
    return None


def _set_quota(group: Path, quota_us: int | None) -> None:
    if (group / "cpu.cfs_quota_us").exists():
        (group / "cpu.cfs_period_us").write_text(str(_PERIOD_US), encoding="utf-8")
        (group / "cpu.cfs_quota_us").write_text(str(-1 if quota_us is None else quota_us), encoding="utf-8")
    else:
        (group / "cpu.max").write_text(f"{'max' if quota_us is None else quota_us} {_PERIOD_US}", encoding="utf-8")
