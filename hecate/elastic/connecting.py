"""Connects ranks under NCCL so that a rank lost meanwhile does not hold up the others for good.

NCCL waits without a limit, in a call that nothing interrupts, for a rank that never connects. So another thread waits in that call. If
it is not wanted any more, this rank goes on without it.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from datetime import timedelta

import torch.distributed as dist

from hecate.ranks.ranks import Ranks

NCCL_CONNECT_LIMIT = timedelta(minutes=2)
"""How long NCCL may take to connect ranks that have all arrived, none of which is known to be lost: several groups, one after another."""
_LOOK_SECONDS = 0.1
_END_SECONDS = 1.0
"""How long a thread that is given up may take to end, if it does not wait in NCCL."""


class _GivenUpError(Exception):
    """Ends the thread that connects, before it changes anything else of torch's."""


def connect_while_wanted(connect: Callable[[], Ranks], wanted: Callable[[], bool], limit: timedelta = NCCL_CONNECT_LIMIT) -> Ranks:
    """Return what `connect` returns, which another thread calls. What it raises is raised.

    A thread that waits in NCCL when it is given up may wait there until the process ends, and hold what memory its communicator has taken.
    `hecate.ranks.backend.forget_groups` must follow.

    Args:
        connect: makes the ranks. No other thread of this process may use torch.distributed meanwhile.
        wanted: asked several times a second. If it returns False, a rank that is being connected is lost.
        limit: the longest that `connect` may take.

    Raises:
        DistError: `wanted` has returned False, or the limit has passed.
    """
    result: Future[Ranks] = Future()
    thread = threading.Thread(target=_run, args=(connect, result), name="hecate-connect", daemon=True)
    deadline = time.monotonic() + limit.total_seconds()
    thread.start()
    while not wait([result], _LOOK_SECONDS).done:
        lost = not wanted()
        if lost or time.monotonic() > deadline:
            _give_up(thread)
            why = "another rank was lost while the ranks connected" if lost else f"the ranks have not connected within {limit}"
            raise dist.DistError(why)
    return result.result()


def _run(connect: Callable[[], Ranks], result: Future[Ranks]) -> None:
    try:
        result.set_result(connect())
    except BaseException as error:  # noqa: BLE001 - the waiting thread raises it
        result.set_exception(error)


def _give_up(thread: threading.Thread) -> None:
    """End a thread, as soon as its call into NCCL returns: torch would go on to register a group among those of the next ranks."""
    assert thread.ident is not None
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(_GivenUpError))
    thread.join(_END_SECONDS)
