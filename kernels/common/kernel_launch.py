"""One launch of a Triton kernel as a value, so that a test compiles ahead of time, and a tuner times, exactly what the wrapper runs."""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor


@dataclass(frozen=True)
class Launch:
    """A kernel and everything it is launched with. Made from meta tensors as well as from real ones."""

    kernel: Any
    """what `@triton.jit` made"""
    grid: tuple[int, ...]
    args: Mapping[str, Any]
    """tensors and numbers by parameter; None for a tensor that a constant switches off"""
    constants: Mapping[str, Any]
    """the `tl.constexpr` parameters"""
    num_warps: int = 4
    num_stages: int = 2

    def run(self) -> None:
        """Launch the kernel on the tensors' device, unless the grid is empty. Inside `recorded` the launch is only put on its list."""
        if math.prod(self.grid) == 0:
            return
        record = _record.get()
        if record is not None:
            record.append(self)
            return
        # Per thread: the backward pass has its own.
        triton.set_allocator(_scratch)
        with self._on_device():
            self.kernel[self.grid](**self.args, **self.constants, num_warps=self.num_warps, num_stages=self.num_stages)

    def compiled(self) -> Any:
        """Compile it for the active Triton driver without running it: Triton's compiled kernel. Needs no GPU, nor tensors with storage."""
        return self.kernel.warmup(**self.args, **self.constants, grid=self.grid, num_warps=self.num_warps, num_stages=self.num_stages)

    def _on_device(self) -> contextlib.AbstractContextManager[Any]:
        device = next(value.device for value in self.args.values() if isinstance(value, Tensor))
        return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Device memory, 512 bytes aligned, for tensor descriptors that a kernel makes; freed in the order of the stream, as all of torch's."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


_record: contextvars.ContextVar[list[Launch] | None] = contextvars.ContextVar("record", default=None)


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Inside, kernels are not launched, and the list has their launches. For code on meta tensors, whose results are not read."""
    launches: list[Launch] = []
    token = _record.set(launches)
    try:
        yield launches
    finally:
        _record.reset(token)
