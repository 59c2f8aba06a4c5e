"""What steps by bitsandbytes need: its functions, which run on GPUs and, without a compiler, on CPUs; and tensors as these take them."""

from __future__ import annotations

import logging
import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor


@cache
def updates() -> Any:
    """Return bitsandbytes.functional. On some processors its import would have the package `kernels` download a product of 4-bit
    matrices, or would warn where there is none."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    before = {name: module for name, module in sys.modules.items() if name == "kernels"}
    sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        from bitsandbytes import functional
    finally:
        del sys.modules["kernels"]
        sys.modules.update(before)
    return functional


@cache
def byte_values(device: torch.device) -> tuple[Tensor, Tensor]:
    """float32 [256] each: what the values of a byte stand for, of a first moment and of a second."""
    return tuple(updates().create_dynamic_map(signed=signed).to(device) for signed in (True, False))  # type: ignore[return-value]


def in_memory(*tensors: Tensor) -> list[Tensor]:
    """Views [numbers] in the order of memory, through which bitsandbytes goes: of a parameter, its gradient and moments, which all have the
    same strides."""
    return [tensor.detach().as_strided((tensor.numel(),), (1,)) for tensor in tensors]
