"""Loops that are compiled where numba is there, and plain Python where it is not: slower then, with the same results to the bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

_F = TypeVar("_F", bound=Callable[..., Any])

try:
    import numba
except ImportError:
    numba = None  # type: ignore[assignment, unused-ignore]


def compiled(function: _F) -> _F:
    """Compile a function of numbers, tuples and arrays at its first call, and keep the machine code beside the source."""
    return function if numba is None else cast(_F, numba.njit(function, cache=True, nogil=True))
