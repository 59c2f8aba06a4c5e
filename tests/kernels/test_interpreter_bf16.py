"""bfloat16 in triton's interpreter against torch, with the patch and (to see that it is needed) without."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from unittest import mock

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, ReduceScanOpInterface

from tests.kernels.conftest import INTERPRETED
from tests.kernels.interpreter_bf16 import bf16_right, narrow, widen

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="TRITON_INTERPRET=0: the interpreter is not in use, so its patch is not tested")

N = 32
X = torch.randn(N, N, generator=torch.Generator().manual_seed(0)).bfloat16()
Y = torch.randn(N, N, generator=torch.Generator().manual_seed(1)).bfloat16()


@triton.jit
def _kernel(p_x, p_y, p_out, OPERATION: tl.constexpr, N: tl.constexpr):
    offsets = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    x = tl.load(p_x + offsets)
    y = tl.load(p_y + offsets)
    if OPERATION == "add":
        out = x + y
    elif OPERATION == "subtract":
        out = x - y
    elif OPERATION == "multiply":
        out = x * y
    elif OPERATION == "scalar":
        out = x * 0.3 + 1
    elif OPERATION == "negate":
        out = -x
    elif OPERATION == "maximum":
        out = tl.maximum(x, y)
    elif OPERATION == "where":
        out = tl.where(x > y, x, 0.0)
    elif OPERATION == "absolute":
        out = tl.abs(x)
    elif OPERATION == "up":
        out = x.to(tl.float32) * 3
    elif OPERATION == "down":
        out = (x.to(tl.float32) / 3).to(tl.bfloat16)
    elif OPERATION == "half":
        out = x.to(tl.float16).to(tl.bfloat16) + (y * 7).to(tl.int32).to(tl.bfloat16)
    elif OPERATION == "dot":
        out = tl.dot(x, y)
    elif OPERATION == "dot transposed":
        out = tl.dot(tl.trans(x), y, acc=tl.zeros((N, N), tl.float32))
    elif OPERATION == "sum":
        out = tl.sum(x, axis=1)[:, None] + tl.zeros((N, N), tl.float32)
    elif OPERATION == "largest":
        out = tl.max(x, axis=0)[None, :] + tl.zeros((N, N), tl.bfloat16)
    tl.store(p_out + offsets, out)


FORMULAS: dict[str, Callable[[], torch.Tensor]] = {
    "add": lambda: X + Y,
    "subtract": lambda: X - Y,
    "multiply": lambda: X * Y,
    "scalar": lambda: X * torch.tensor(0.3).bfloat16() + 1,
    "negate": lambda: -X,
    "maximum": lambda: torch.maximum(X, Y),
    "where": lambda: torch.where(X > Y, X, 0.0),
    "absolute": lambda: X.abs(),
    "up": lambda: X.float() * 3,
    "down": lambda: (X.float() / 3).bfloat16(),
    "half": lambda: X.half().bfloat16() + (Y * 7).int().bfloat16(),
    "dot": lambda: X.float() @ Y.float(),
    "dot transposed": lambda: X.float().T @ Y.float(),
    "sum": lambda: X.float().sum(1, keepdim=True).expand(N, N).contiguous(),
    "largest": lambda: X.amax(0, keepdim=True).expand(N, N).contiguous(),
}


def interpreted(operation: str) -> torch.Tensor:
    out = torch.full_like(FORMULAS[operation](), torch.nan)
    _kernel[(1,)](X, Y, out, operation, N)
    return out


@pytest.mark.parametrize("operation", FORMULAS)
def test_operations_are_those_of_torch(operation: str) -> None:
    expected = FORMULAS[operation]()
    # A reduction is rounded once and a dot is summed in another order.
    tolerance = {"sum": 2**-7, "dot": 1e-5, "dot transposed": 1e-5}.get(operation, 0.0)
    torch.testing.assert_close(interpreted(operation), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_without_the_patch_they_are_not() -> None:
    with contextlib.ExitStack() as original:
        for owner in (InterpreterBuilder, ReduceScanOpInterface):
            for name, function in vars(owner).items():
                if getattr(function, "before_patch", None):
                    original.enter_context(mock.patch.object(owner, name, function.before_patch))
        wrong = set()
        for operation, formula in FORMULAS.items():
            try:
                right = torch.allclose(interpreted(operation).float(), formula().float(), rtol=2**-7, atol=2**-7)
            except Exception:  # noqa: BLE001 (some raise, and of many kinds)
                right = False
            if not right:
                wrong.add(operation)
    assert {"add", "multiply", "dot", "sum", "negate"} <= wrong


def test_rounding_is_that_of_torch() -> None:
    """Ties, subnormals, infinities, the largest finite value, which rounds up to infinity."""
    random = torch.randint(-(2**31), 2**31, (1 << 16,), generator=torch.Generator().manual_seed(2)).int().view(torch.float32)
    chosen = torch.tensor(
        [0x3F808000, 0x3F818000, 0x3F80FFFF, 0x7F7FFFFF, 0x7F800000, 0x7FC00000, 0x00000001, 0x00018000], dtype=torch.int32
    )
    values = torch.cat([random, chosen.view(torch.float32), -chosen.view(torch.float32), torch.zeros(1)])
    ours = torch.from_numpy(widen(narrow(values.numpy())))
    torch.testing.assert_close(ours, values.bfloat16().float(), rtol=0, atol=0, equal_nan=True)


def test_cutting_off_is_toward_zero() -> None:
    values = np.array([1.0 + 2**-8, -1.0 - 2**-7 - 2**-9], dtype=np.float32)
    np.testing.assert_array_equal(widen(narrow(values, toward_zero=True)), np.array([1.0, -1.0 - 2**-7], dtype=np.float32))


def test_the_patch_ends() -> None:
    before = InterpreterBuilder.create_dot
    with bf16_right():
        assert InterpreterBuilder.create_dot is not before
    assert InterpreterBuilder.create_dot is before
