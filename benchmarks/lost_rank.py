"""Kill rank 1 of a run in a chosen backward pass, without changing the code that trains.

`same_training` copies this file, as `sitecustomize.py`, into a folder that stands first on the PYTHONPATH of the run: Python imports it in
each process at its start. It imports nothing of hecate, so that it works beside any version. A rank that the launcher starts in the place
of the lost one sleeps, so that the survivors alone finish the run: the step in which a new rank joins depends on the machine's load, and
the order of sums, and with it the last bits of losses, on the number of ranks.

Two environment variables: LOST_RANK_AT, the number of the backward pass, from 1, and LOST_RANK_MARKER, a file that is made just
before the kill.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

AT, MARKER = "LOST_RANK_AT", "LOST_RANK_MARKER"
DYING = "1"


def install(at: int, marker: Path) -> None:
    """Count the backward passes of this process, and of those forked from it each by itself."""
    import torch

    backward, passes = torch.autograd.backward, 0

    def counted(*arguments: Any, **named: Any) -> Any:
        nonlocal passes
        passes += 1
        if passes == at and os.environ.get("RANK") == DYING and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return backward(*arguments, **named)

    torch.autograd.backward = counted
    if "RANK" in os.environ:  # this process was started as a rank
        sleep_if_too_late(marker)
    os.register_at_fork(after_in_child=lambda: sleep_if_too_late(marker))


def sleep_if_too_late(marker: Path) -> None:
    """Sleep until the launcher kills this process, if it has begun after the kill."""
    while marker.exists():
        time.sleep(60)


if AT in os.environ:
    install(int(os.environ[AT]), Path(os.environ[MARKER]))
