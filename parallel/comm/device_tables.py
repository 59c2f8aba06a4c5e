"""The tables of a plan as tensors on a device, copied once for each plan and device and then kept with it.

The caches hold as many plans as those of `hecate.parallel.transfer.transfer_plan`, and compare plans by value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from hecate.parallel.transfer.transfer_plan import CACHED, ChunkPlan, ChunkTables, TokenPlan


@dataclass(frozen=True)
class TokenTables:
    """A `TokenPlan` on a device."""

    bound_EB: Tensor
    """float64, as `TokenPlan.bound_EB`"""
    slot_DE: Tensor
    """int64, as `TokenPlan.slot_DE`"""


@lru_cache(maxsize=CACHED)
def chunk_tables(plan: ChunkPlan, device: torch.device) -> ChunkTables[Tensor]:
    """The plan's tables on the device, in one copy that the host does not wait for."""
    arrays: list[np.ndarray] = []
    plan.tables.map(arrays.append)
    on_device = iter(to_device(arrays, device))
    return plan.tables.map(lambda _: next(on_device))  # `map` visits the tables in the same order both times


@lru_cache(maxsize=CACHED)
def token_tables(plan: TokenPlan, device: torch.device) -> TokenTables:
    """The plan's tables on the device."""
    (slot,) = to_device([plan.slot_DE.ravel()], device)
    return TokenTables(copy_to(torch.from_numpy(plan.bound_EB), device), slot.view(plan.slot_DE.shape))


def to_device(rows: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """int64 rows to index with, on the device, in one copy that the host does not wait for."""
    flat = torch.from_numpy(np.concatenate([np.asarray(row, dtype=np.int64) for row in rows]))
    return list(copy_to(flat, device).split([len(row) for row in rows]))


def copy_to(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the CPU to `device`. The host does not wait for a GPU, because the copy is from pinned memory."""
    # The pinned copy may be dropped at once: torch hands its memory out again only when the copy from it is done.
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)
