"""Which process groups of this process were aborted, and how the host reads what their collectives have written.

Waiting for a collective of NCCL orders streams and raises nothing. When another rank is lost, the collective never ends, and the host stops
in the next read of anything behind it, until another thread aborts the groups (`hecate.ranks.ranks.Ranks.abort`). Then the read returns
whatever the memory holds. So the host reads through `read`, which raises in that case, and keeps nothing that has not `arrived`. What a GPU
uses as an index without the host goes through `in_range`.
"""

from __future__ import annotations

from collections.abc import Iterable
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor


class AbortedError(dist.DistError):
    """The groups of this rank were aborted, so what their collectives have written is worthless."""


# Weak, because a group that is kept here would keep its communicator and threads after a rebuild has replaced it.
_aborted: WeakSet[dist.ProcessGroup] = WeakSet()


def note_abort(groups: Iterable[dist.ProcessGroup]) -> None:
    """Have reads of these groups raise from now on. To be called before the abort, which lets a waiting read return."""
    _aborted.update(groups)


def is_aborted(group: dist.ProcessGroup) -> bool:
    """Whether `note_abort` was called for the group. Any thread may call it."""
    return group in _aborted


def raise_if_aborted(group: dist.ProcessGroup) -> None:
    """To be called when the host has read what a collective of `group` has written, before it uses it.

    Raises:
        AbortedError: the group was aborted.
    """
    if is_aborted(group):
        raise AbortedError("the process groups of this rank were aborted, because another rank was lost or is to leave")


def read(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The tensor, of any shape, on the CPU; the host waits for it.

    Args:
        tensor: what a collective of `group` has written, or what was computed from that.

    Raises:
        AbortedError: the group was aborted.
    """
    on_host = tensor.cpu()
    # Asked after the copy: an abort while the host waits in it lets it return whatever the memory holds.
    raise_if_aborted(group)
    return on_host


def arrived(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The tensor itself, where it is; the host waits until it is complete, so that it may replace another one.

    Args:
        tensor: as `read` takes it.

    Raises:
        AbortedError: the group was aborted.
    """
    if tensor.is_cuda:
        torch.cuda.current_stream(tensor.device).synchronize()
    raise_if_aborted(group)  # after the wait, as in `read`
    return tensor


def in_range(index: Tensor, low: int, high: int) -> Tensor:
    """The integer tensor itself, its values cut to [low, high]. Right values are unchanged; after an abort no kernel reads elsewhere.

    Args:
        index: what a collective has written, or a view of it.
    """
    return index.clamp_(low, high)
