"""Count where the host waits for a real GPU, as `tests.mock_cuda.waits` counts for a mock one."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch

from tests.host_waits import place_of

SYNCHRONIZES = "called a synchronizing CUDA operation"


@contextmanager
def watching() -> Iterator[Counter[str]]:
    """Place -> waits until the end of the block.

    torch's debug mode reports each copy for which the host waits, and each operator whose result has a size that the host must know.
    What it does not report is counted where Python asks for it: `synchronize` of devices, streams and events. Not counted are copies
    from pageable memory that are asked for with non_blocking, and what the driver waits for on its own.
    """
    waits: Counter[str] = Counter()

    def show(message: Warning | str, *arguments: Any, **options: Any) -> None:
        if SYNCHRONIZES in str(message):
            waits[place_of(sys._getframe(1))] += 1

    def counted(plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            waits[place_of(sys._getframe(1))] += 1
            return plain(*arguments, **options)

        return call

    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("always")
        warnings.showwarning = show  # type: ignore[assignment]
        for owner in (torch.cuda, torch.cuda.Stream, torch.cuda.Event):
            stack.enter_context(mock.patch.object(owner, "synchronize", counted(owner.synchronize)))
        torch.cuda.set_sync_debug_mode("warn")
        stack.callback(torch.cuda.set_sync_debug_mode, "default")
        yield waits
