"""Start the ranks of a run on this machine: one process each, the same command under other environment variables.

Nothing listens beyond loopback: ranks meet through a file, and gloo is told to use the loopback interface.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from hecate.errors import USER_ERROR_EXIT
from hecate.local_store import STORE_VARIABLE, error_file

ALLOCATOR_SETTINGS = {"MALLOC_MMAP_THRESHOLD_": str(1 << 33), "MALLOC_TRIM_THRESHOLD_": str(1 << 33)}
"""glibc gives large blocks back to the kernel at once and takes them anew, page by page: a tenth of a CPU step"""


def launch_local(arguments: Sequence[str], num_ranks: int) -> int:
    """Run `python -m hecate ARGUMENTS` on `num_ranks` local ranks; returns the exit status of the run.

    Rank 0 has the terminal. SIGINT and SIGTERM are passed on once, so that ranks can save and stop; a second one kills them. When a
    rank dies, the others are stopped, and the one that died is named.
    """
    with tempfile.TemporaryDirectory(prefix="hecate-") as folder:
        store = Path(folder) / "store"
        ranks = [_start(arguments, rank, num_ranks, store) for rank in range(num_ranks)]
        signals = 0

        def pass_on(_number: int, _frame: FrameType | None) -> None:
            nonlocal signals
            signals += 1
            for process in ranks:
                if process.poll() is None:
                    process.send_signal(signal.SIGTERM if signals == 1 else signal.SIGKILL)

        previous = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            return _wait(ranks, store)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def _start(arguments: Sequence[str], rank: int, num_ranks: int, store: Path) -> subprocess.Popen[bytes]:
    environment = dict(os.environ)
    environment.update(
        {
            STORE_VARIABLE: str(store),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(num_ranks),
            "GLOO_SOCKET_IFNAME": "lo",
        }
    )
    for name, value in ALLOCATOR_SETTINGS.items():
        environment.setdefault(name, value)
    # Bars of several ranks would be written over each other, and the run shows its own progress.
    environment.setdefault("TQDM_DISABLE", "1")
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_ranks)))
    return subprocess.Popen([sys.executable, "-m", "hecate", *arguments], env=environment)


def _wait(ranks: list[subprocess.Popen[bytes]], store: Path) -> int:
    first_failure: int | None = None
    deadline = 0.0
    while any(process.poll() is None for process in ranks):
        for rank, process in enumerate(ranks):
            if first_failure is None and process.poll() not in (None, 0):
                first_failure = rank
                # A user's mistake is found by every rank at about the same time; let them end by themselves.
                deadline = time.monotonic() + (5.0 if process.returncode == USER_ERROR_EXIT else 0.5)
        if first_failure is not None and time.monotonic() > deadline:
            _stop(ranks)
        time.sleep(0.02)
    codes = [process.wait() for process in ranks]
    failed = [rank for rank, code in enumerate(codes) if code != 0]
    if not failed:
        return 0
    rank = failed[0] if first_failure is None else first_failure
    if codes[rank] == USER_ERROR_EXIT:
        if codes[0] != USER_ERROR_EXIT:  # rank 0 has printed its own
            print(error_file(store, rank).read_text(encoding="utf-8"), file=sys.stderr)
        return USER_ERROR_EXIT
    cause = f"was killed by {signal.Signals(-codes[rank]).name}" if codes[rank] < 0 else f"ended with status {codes[rank]}"
    print(
        f"hecate: rank {rank} of {len(ranks)} {cause}; the run is stopped; resume=true goes on from its last checkpoint, if any",
        file=sys.stderr,
    )
    return 1


def _stop(ranks: list[subprocess.Popen[bytes]]) -> None:
    """Kill what still runs: ranks that have lost a peer cannot finish a step, and have nothing to save."""
    for process in ranks:
        if process.poll() is None:
            process.kill()
