"""A disk whose operations are counted, and that can be made to fail, or to stop the process, at any of them."""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

OPERATIONS = ("open", "write", "fsync", "rename", "unlink", "mkdir", "rmdir")


class Killed(BaseException):
    """Stands for the end of the process: no `except Exception` or `except OSError` sees it."""


@contextlib.contextmanager
def watched_disk(before: Callable[[int, str, tuple[Any, ...]], None]) -> Iterator[None]:
    """Call `before(number, operation, arguments)` before each file operation of the block."""
    count = 0

    def watch(operation: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            before(count, operation, args)
            return real(*args, **kwargs)

        return call

    with contextlib.ExitStack() as stack:
        for operation in OPERATIONS:
            stack.enter_context(mock.patch.object(os, operation, watch(operation, getattr(os, operation))))
        yield


def write_half(args: tuple[Any, ...], real: Callable[..., int] = os.write) -> None:
    """What a write leaves when the process dies inside it."""
    descriptor, data = args
    real(descriptor, memoryview(data)[: len(data) // 2])
