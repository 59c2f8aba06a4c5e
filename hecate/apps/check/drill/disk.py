"""A disk whose operations are counted, and that can be made to fail, or to end the process, at any of them.

The functions of `os` are replaced while a block lasts, so that no operation can be forgotten, whoever makes it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

OPERATIONS = ("open", "write", "fsync", "rename", "unlink", "mkdir", "rmdir")

Before = Callable[[int, str, tuple[Any, ...]], None]
"""before(number, operation, arguments): is called before each operation, which are numbered from 1"""


def watch_disk(before: Before, only: Callable[[str], bool] = lambda path: True) -> Callable[[], None]:
    """Call `before` ahead of each file operation of this process from now on.

    Args:
        only: says of a path whether operations on it count; those on a descriptor count if its path did.

    Returns:
        A function that ends this.
    """
    real = {operation: getattr(os, operation) for operation in OPERATIONS}
    count = 0
    paths: dict[int, str] = {}

    def watched(operation: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            path = paths.get(args[0], "") if isinstance(args[0], int) else os.fspath(args[0])
            if only(path):
                count += 1
                before(count, operation, args)
            done = real[operation](*args, **kwargs)
            if operation == "open":
                paths[done] = path
            return done

        return call

    for operation in OPERATIONS:
        setattr(os, operation, watched(operation))

    def end() -> None:
        for operation, function in real.items():
            setattr(os, operation, function)

    return end


@contextlib.contextmanager
def watched_disk(before: Before, only: Callable[[str], bool] = lambda path: True) -> Iterator[None]:
    """`watch_disk` for a block."""
    end = watch_disk(before, only)
    try:
        yield
    finally:
        end()


def write_half(args: tuple[Any, ...], real: Callable[..., int] = os.write) -> None:
    """What a write leaves when the process dies inside it."""
    descriptor, data = args
    real(descriptor, memoryview(data)[: len(data) // 2])
