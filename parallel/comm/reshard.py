"""Moving a layer's experts to new owners, exactly: master parameters, moments, whatever tensors an expert has.

Rows travel as bytes, so every value arrives as it was, NaNs and signed zeros included, and tensors of any dtypes go in one message.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from hecate.parallel.comm.aborts import arrived, read


@dataclass(frozen=True)
class RowSpec:
    """What the tensor of one name is, for every expert of the layer that has it."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


@dataclass(frozen=True)
class Resharded:
    """A rank's experts after the move."""

    rows: dict[int, dict[str, Tensor]]
    """expert -> its tensors by name, for those that this rank owns now, ascending; what it owned before is the same object"""
    moved: int
    """the number of experts that have another owner, on any rank"""
    num_bytes: int
    """the bytes that all ranks have sent"""


def reshard(
    rows: Mapping[int, Mapping[str, Tensor]],
    specs: Mapping[str, RowSpec],
    old_owner_E: np.ndarray,
    new_owner_E: np.ndarray,
    group: dist.ProcessGroup,
    device: torch.device,
) -> Resharded:
    """Move each expert's tensors from its old to its new owner, bit for bit, in one uneven all-to-all.

    Every rank of the group must call it, with the same specs and owners; a rank may own nothing, before or after. A tensor that an
    expert lacks on its old owner is lacking on the new one.

    Args:
        rows: the tensors of the experts that this rank owns by `old_owner_E`, each as its spec says, on any device.
        specs: in the order in which they travel.
        device: where the group's messages are; received tensors are there, too. The host waits for them.

    Raises:
        AbortedError: the group was aborted meanwhile. The rank still has all that it owned before.
    """
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    owned_before = np.flatnonzero(old_owner_E == rank).tolist()
    assert sorted(rows) == owned_before, (sorted(rows), owned_before)
    moved = np.flatnonzero(old_owner_E != new_owner_E).tolist()
    has = _presence(rows, list(specs), moved, group, device)
    leaving = [[e for e in moved if (old_owner_E[e], new_owner_E[e]) == (rank, peer)] for peer in range(world)]
    coming = [[e for e in moved if (old_owner_E[e], new_owner_E[e]) == (peer, rank)] for peer in range(world)]
    names = {e: [name for name, has_it in zip(specs, has[e], strict=True) if has_it] for e in moved}
    size = {e: sum(specs[name].num_bytes for name in names[e]) for e in moved}

    send_sizes = [sum(size[e] for e in experts) for experts in leaving]
    recv_sizes = [sum(size[e] for e in experts) for experts in coming]
    parts = [_as_bytes(rows[e][name], specs[name], device) for experts in leaving for e in experts for name in names[e]]
    send_buffer = torch.cat([torch.empty(0, dtype=torch.uint8, device=device), *parts])
    recv_buffer = torch.empty(sum(recv_sizes), dtype=torch.uint8, device=device)
    if world > 1:
        dist.all_to_all_single(recv_buffer, send_buffer, recv_sizes, send_sizes, group=group)
        # The caller gives up the old tensors for these, so nothing may be returned that an abort has left half written.
        arrived(recv_buffer, group)

    kept = {e: dict(rows[e]) for e in owned_before if new_owner_E[e] == rank}
    start = 0
    for e in [e for experts in coming for e in experts]:
        kept[e] = {}
        for name in names[e]:
            end = start + specs[name].num_bytes
            # A copy of its own: a view would keep the whole message alive, and might lie where its dtype cannot.
            kept[e][name] = recv_buffer[start:end].clone().view(specs[name].dtype).view(specs[name].shape)
            start = end
    return Resharded(dict(sorted(kept.items())), len(moved), sum(size.values()))


def _presence(
    rows: Mapping[int, Mapping[str, Tensor]], names: list[str], moved: list[int], group: dist.ProcessGroup, device: torch.device
) -> dict[int, list[bool]]:
    """Exchange, in one all-reduce, which tensors the old owner of each moving expert has."""
    table = torch.tensor([[int(name in rows.get(e, {})) for name in names] for e in moved], dtype=torch.int64, device=device)
    if moved and dist.get_world_size(group) > 1:
        dist.all_reduce(table, op=dist.ReduceOp.MAX, group=group)
    return {e: [bool(has_it) for has_it in line] for e, line in zip(moved, read(table, group).tolist(), strict=True)}


def _as_bytes(row: Tensor, spec: RowSpec, device: torch.device) -> Tensor:
    assert (tuple(row.shape), row.dtype) == (spec.shape, spec.dtype), f"{tuple(row.shape)} of {row.dtype}, but {spec}"
    return row.detach().to(device).contiguous().view(-1).view(torch.uint8)
