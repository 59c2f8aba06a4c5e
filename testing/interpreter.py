"""Triton's interpreter without work that it throws away: tests of kernels take three quarters of the time."""

from __future__ import annotations

from dataclasses import replace

from triton.runtime.interpreter import interpreter_builder


def leave_out_overflow_checks() -> None:
    """Leave out, for the rest of this process, the int64 twin of each addition, subtraction and product of integers.

    Triton computes it to assert that nothing has overflowed, and its interpreter then leaves the assertion out.
    """
    interpreter_builder.options = replace(interpreter_builder.options, sanitize_overflow=False)
