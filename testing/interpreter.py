"""Triton's interpreter without work that it throws away: tests of kernels take two thirds of the time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from triton.runtime import interpreter


def leave_out_what_is_thrown_away() -> None:
    """Make Triton's interpreter faster for the rest of this process, with the same results.

    - It computes the int64 twin of each addition, subtraction and product of integers, to assert that nothing has overflowed, and leaves
      the assertion out.
    - It replaces the functions of `triton.language` when a kernel starts, and again in each call of another `@triton.jit` function. Once
      a kernel is enough for all functions of a module.
    """
    if interpreter.GridExecutor.__call__ is _run_grid:
        return
    interpreter.interpreter_builder.options = replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    interpreter.GridExecutor.__call__ = _run_grid  # type: ignore[method-assign]
    interpreter.InterpretedFunction.__call__ = _call  # type: ignore[method-assign]


_plain_run_grid = interpreter.GridExecutor.__call__
_patched: set[int] = set()
"""of the modules whose functions have been called by the running kernel: the identity of their names"""


def _run_grid(self: Any, *arguments: Any, **named: Any) -> None:
    _patched.clear()
    _patched.add(id(self.fn.__globals__))
    _plain_run_grid(self, *arguments, **named)


def _call(self: Any, *arguments: Any, **named: Any) -> Any:
    """What `InterpretedFunction.__call__` does."""
    if id(self.fn.__globals__) not in _patched:
        interpreter._patch_lang(self.fn)
        _patched.add(id(self.fn.__globals__))
    function = self.rewrite()
    try:
        return function(*arguments, **named)
    except Exception as error:
        raise interpreter.InterpreterError(repr(error)) from error
