"""Checks that a process has memory for a whole model, before it loads one."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from hecate.errors import UserError
from hecate.model.files.safetensors_headers import stored_tensors

_MEMINFO = Path("/proc/meminfo")


def require_room(folder: Path, dtype: torch.dtype, device: torch.device) -> None:
    """Check that the weights of a whole model fit the free memory of a device. The memory that running the model takes is not checked.

    Args:
        folder: the folder with the model's safetensors files.
        dtype: the type that the weights will have in memory.
        device: the device that will hold the weights.

    Raises:
        UserError: the device has less free memory than the weights take, or a file is damaged.
    """
    needed, free = sum(entry.numel for entry in stored_tensors(folder).values()) * dtype.itemsize, free_bytes(device)
    if free is not None and needed > free:
        held_as = str(dtype).removeprefix("torch.")
        raise UserError(
            f"{folder}: its weights take {needed / 1e9:.1f} GB as {held_as}, but {device} has {free / 1e9:.1f} GB free\n"
            "  hecate eval and hecate generate hold the whole model in one process\n"
            "  use a machine with more memory, or evaluate at the end of training (data.eval), where each rank has its share of the experts"
        )


def free_bytes(device: torch.device) -> int | None:
    """Free memory of the device in bytes; None: it is unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB$", _MEMINFO.read_text(encoding="ascii"), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None
