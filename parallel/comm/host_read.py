"""Reads of a device's results on the host, which computes the rest of a step meanwhile."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from hecate.parallel.comm.aborts import raise_if_aborted


class HostRead:
    """The values of a tensor on their way to the host.

    On a GPU the copy goes to pinned memory behind whatever makes the tensor, and the host does not wait before `get`: what was queued
    after the copy keeps the GPU busy meanwhile.
    """

    def __init__(self, tensor: Tensor, group: dist.ProcessGroup) -> None:
        """Start the copy of what a collective of `group` has written. The tensor may be changed or freed afterwards."""
        self._group = group
        self._event: torch.cuda.Event | None = None
        if tensor.is_cuda:
            # From pinned memory alone does a copy run beside the host. The event stands behind the copy on the same stream; waiting for
            # the stream instead would wait for all that was queued since.
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._host = tensor.detach().clone()  # the caller may change its own

    def get(self) -> Tensor:
        """The values, on the CPU. On a GPU the host waits until the copy is done.

        Raises:
            AbortedError: the group was aborted.
        """
        if self._event is not None:
            self._event.synchronize()
        raise_if_aborted(self._group)  # after the wait, which an abort ends
        return self._host
