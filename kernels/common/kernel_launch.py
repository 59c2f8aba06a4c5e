"""One launch of a Triton kernel as a value, so that tests compile ahead of time, and the tuner times, exactly what the wrapper runs."""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from hecate.kernels.common.launch_config import LaunchConfig


@dataclass(frozen=True)
class Launch:
    """A kernel and all its arguments, which may be meta tensors as well as real ones."""

    kernel: Any
    """the kernel that `@triton.jit` returned"""
    grid: tuple[int, ...]
    args: Mapping[str, Any]
    """the tensors and numbers by parameter; None for a tensor that a constant switches off"""
    constants: Mapping[str, Any]
    """the values of the `tl.constexpr` parameters"""
    num_warps: int = 4
    num_stages: int = 2

    @classmethod
    def configured(
        cls, kernel: Any, grid: tuple[int, ...], args: Mapping[str, Any], constants: Mapping[str, Any], config: LaunchConfig
    ) -> Launch:
        """A launch with the block sizes, warps and stages of a configuration."""
        return cls(kernel, grid, args, {**constants, **config.blocks}, config.num_warps, config.num_stages)

    def run(self) -> None:
        """Launch the kernel on the tensors' device, unless the grid is empty. Inside `recorded` the launch is only added to its list."""
        record = _record.get()
        if record is not None:
            record.append(self)
            return
        if math.prod(self.grid) == 0:  # CUDA refuses an empty grid
            return
        # Triton keeps the allocator per thread, and the backward pass runs in a thread of its own.
        triton.set_allocator(_scratch)
        # Triton launches on the current device, whatever device the tensors are on.
        with self._on_device():
            self.kernel[self.grid](**self.args, **self.constants, num_warps=self.num_warps, num_stages=self.num_stages)

    def compiled(self) -> Any:
        """Compile the kernel for the active Triton driver and return Triton's compiled kernel. Needs no GPU and no tensors with storage."""
        return self.kernel.warmup(**self.args, **self.constants, grid=self.grid, num_warps=self.num_warps, num_stages=self.num_stages)

    def _on_device(self) -> contextlib.AbstractContextManager[Any]:
        device = next(value.device for value in self.args.values() if isinstance(value, Tensor))
        return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Allocate device memory for tensor descriptors that a kernel makes. Like all of torch's memory it is freed in stream order."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


_record: contextvars.ContextVar[list[Launch] | None] = contextvars.ContextVar("record", default=None)


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """A context in which kernels are not launched but added to a list, for code on meta or fake tensors whose results are not read."""
    launches: list[Launch] = []
    token = _record.set(launches)
    try:
        yield launches
    finally:
        _record.reset(token)


def addresses_of(tensors: Sequence[Tensor]) -> tuple[int, ...] | None:
    """Return where tensors begin in memory; None inside `recorded`, where they may be torch's fake ones, which begin nowhere."""
    return tuple(tensor.data_ptr() for tensor in tensors) if _record.get() is None else None


def begins_aligned(tensor: Tensor) -> bool:
    """Return whether a tensor begins at a multiple of 16 bytes, as descriptors of TMA need it; inside `recorded` it does."""
    return _record.get() is not None or tensor.data_ptr() % 16 == 0
