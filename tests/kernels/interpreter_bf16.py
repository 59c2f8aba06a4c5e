"""Makes bfloat16 right in triton's interpreter, which keeps it as raw uint16 and computes on those bits (3.6 and 3.9 alike).

Arithmetic widens to float32 and rounds its result to nearest even, as the hardware does; storage stays uint16. A reduction or scan of
bfloat16 runs in float32 and is rounded once, where the hardware may round at each step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, _get_np_dtype

# fmt: off
_OPERATIONS = (
    "fadd", "fsub", "fmul", "fdiv", "frem", "precise_divf", "approx_divf", "minimumf", "minnumf", "maximumf", "maxnumf",
    "fcmpOLT", "fcmpOGT", "fcmpOLE", "fcmpOGE", "fcmpOEQ", "fcmpONE", "fcmpULT", "fcmpUGT", "fcmpULE", "fcmpUGE", "fcmpUEQ", "fcmpUNE",
    "fneg", "cos", "sin", "exp", "exp2", "log", "log2", "sqrt", "precise_sqrt", "rsqrt", "erf", "floor", "ceil",
    "fma", "clampf", "dot",
)
# fmt: on


@contextlib.contextmanager
def bf16_right() -> Iterator[None]:
    """bfloat16 is right inside, as triton has it outside. Each function put in has triton's own as its `before_patch`."""
    names = [f"create_{operation}" for operation in _OPERATIONS]
    builder: dict[str, Any] = {
        name: _widened(name, getattr(InterpreterBuilder, name)) for name in names if hasattr(InterpreterBuilder, name)
    }
    builder["cast_impl"] = _cast(InterpreterBuilder.cast_impl)
    builder["get_bf16"] = _get_bf16
    builder["create_fp_to_fp"] = _fp_to_fp(InterpreterBuilder.create_fp_to_fp)
    reduce_scan = interpreter.ReduceScanOpInterface
    for name, function in builder.items():
        function.before_patch = getattr(InterpreterBuilder, name, None)
    apply: Any = _reduce(reduce_scan.apply)
    apply.before_patch = reduce_scan.apply
    # `create`: triton 3.6 has no get_bf16.
    with mock.patch.multiple(InterpreterBuilder, create=True, **builder), mock.patch.object(reduce_scan, "apply", apply):
        yield


def widen(bits: np.ndarray) -> np.ndarray:
    """float32 of bfloat16's bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray, toward_zero: bool = False) -> np.ndarray:
    """bfloat16's bits (uint16) of float32 values, to nearest even or cut off."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).reshape(np.shape(values))
    rounding = np.uint32(0) if toward_zero else ((bits >> 16) & 1) + np.uint32(0x7FFF)
    return np.where(np.isnan(values), np.uint16(0x7FC0), ((bits + rounding) >> 16).astype(np.uint16))


def _widened(name: str, operation: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    """The builder's operation, with bfloat16 operands as float32, and its result back in their type unless it is of another one."""

    def call(self: InterpreterBuilder, *args: Any, **kwargs: Any) -> TensorHandle:
        if not any(_is_bf16(arg) for arg in args):
            return operation(self, *args, **kwargs)
        result = operation(self, *(_wide_handle(arg) if _is_bf16(arg) else arg for arg in args), **kwargs)
        # A dot's type is its accumulator's, always its third operand; a comparison gives truth values.
        stays_wide = result.data.dtype != np.float32 or (name == "create_dot" and not _is_bf16(args[2]))
        return result if stays_wide else TensorHandle(narrow(result.data), tl.bfloat16)

    return call


def _get_bf16(self: InterpreterBuilder, value: float) -> TensorHandle:
    return TensorHandle(narrow(np.array([value], dtype=np.float32)), tl.bfloat16)


def _cast(original: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    def cast_impl(self: InterpreterBuilder, src: TensorHandle, dst_type: Any) -> TensorHandle:
        to = dst_type.scalar
        if tl.bfloat16 not in (src.dtype.scalar, to) or src.dtype.scalar == to:
            return original(self, src, dst_type)
        values = widen(src.data) if _is_bf16(src) else src.data
        if to == tl.bfloat16:
            return TensorHandle(narrow(values.astype(np.float32)), to)
        return TensorHandle(values.astype(_get_np_dtype(to)), to)

    return cast_impl


def _fp_to_fp(original: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    def create_fp_to_fp(self: InterpreterBuilder, src: TensorHandle, dst_type: Any, rounding_mode: Any) -> TensorHandle:
        if _is_bf16(src) and dst_type.scalar.primitive_bitwidth >= 16:
            return self.cast_impl(src, dst_type)
        if dst_type.scalar != tl.bfloat16 or src.dtype.scalar.primitive_bitwidth < 16:
            return original(self, src, dst_type, rounding_mode)
        toward_zero = rounding_mode == interpreter._ir.ROUNDING_MODE.RTZ
        return TensorHandle(narrow(src.data.astype(np.float32), toward_zero), tl.bfloat16)

    return create_fp_to_fp


def _reduce(original: Callable[..., Any]) -> Callable[..., Any]:
    def apply(self: Any, input: Any) -> Any:
        if not isinstance(input, tuple):
            return apply(self, (input,))[0]
        was_bf16 = [_is_bf16(arg.handle) for arg in input]
        if not any(was_bf16):
            return original(self, input)
        wide = tuple(_retyped(arg, _wide_handle(arg.handle)) if bf16 else arg for arg, bf16 in zip(input, was_bf16, strict=True))
        results = original(self, wide)
        narrowed = (
            _retyped(arg, TensorHandle(narrow(arg.handle.data), tl.bfloat16)) if bf16 else arg
            for arg, bf16 in zip(results, was_bf16, strict=True)
        )
        return tuple(narrowed)

    return apply


def _is_bf16(arg: Any) -> bool:
    return isinstance(arg, TensorHandle) and arg.dtype.scalar == tl.bfloat16


def _wide_handle(arg: TensorHandle) -> TensorHandle:
    return TensorHandle(widen(arg.data), tl.float32)


def _retyped(arg: tl.tensor, handle: TensorHandle) -> tl.tensor:
    shape = list(arg.type.shape) if arg.type.is_block() else None
    return tl.tensor(handle, handle.dtype.scalar if shape is None else tl.block_type(handle.dtype.scalar, shape))
