"""End a process: without taking apart what it has loaded, which takes a second or two after torch and transformers; or with its parent."""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

_PR_SET_PDEATHSIG = 1


def run_and_end(function: Callable[[], object]) -> NoReturn:
    """Call `function` and end the process with status 0, or with that of its SystemExit, or with status 1 after an error, whose traceback
    is printed.

    As at any end of Python, threads that are no daemons are waited for, functions registered with `atexit` are called, and the standard
    streams are flushed; the status is 120 if one cannot be. Modules and objects are not destroyed; files that are still open and not
    flushed lose what they hold back. So a rank that fails is gone at once, and others need not wait for what its groups of gloo wait for
    when they are destroyed.

    Raises:
        BaseException: what `function` raises, other than an Exception or a SystemExit with a number.
    """
    status = 0
    try:
        function()
    except SystemExit as end:
        if not isinstance(end.code, int | None):
            raise
        status = end.code or 0
    except Exception:  # noqa: BLE001 - it is reported as Python itself would
        sys.excepthook(*sys.exc_info())
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]  # what Python itself calls
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            status = status or 120  # as Python's own end has it
    os._exit(status)


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent, whose id is given, dies in any way. Linux only; elsewhere it does nothing."""
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    except (OSError, AttributeError):
        return
    if os.getppid() != parent:  # it died before the call
        os.kill(os.getpid(), signal.SIGKILL)
