"""The most memory that a rank has needed so far."""

from __future__ import annotations

import resource
import sys

import torch


def peak_memory(device: torch.device) -> dict[str, int]:
    """Peak bytes of this process, by what they are: on its GPU if it has one, otherwise what is resident on the host.

    Of a GPU's bytes, tensors have taken those allocated; those reserved are what torch has taken from the driver for them. The context
    and NCCL's buffers are in neither.
    """
    if device.type == "cuda":
        return {"peak GPU memory, allocated": peak_bytes(device), "peak GPU memory, reserved": torch.cuda.max_memory_reserved(device)}
    return {"peak memory": peak_bytes(device)}


def peak_bytes(device: torch.device) -> int:
    """Peak bytes of this process: what tensors have taken of its GPU if it has one, otherwise what is resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
