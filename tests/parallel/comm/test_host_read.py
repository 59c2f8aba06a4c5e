"""A read that is begun early gives the values of that moment, and nothing after an abort."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from hecate.parallel.comm.aborts import AbortedError, note_abort
from hecate.parallel.comm.host_read import HostRead


def test_what_happens_to_the_tensor_later_is_not_read() -> None:
    values = torch.arange(6).view(2, 3)
    begun = HostRead(values, dist.ProcessGroup(0, 1))
    values += 10
    assert begun.get().tolist() == [[0, 1, 2], [3, 4, 5]]


def test_what_an_aborted_group_has_written_cannot_be_read() -> None:
    group = dist.ProcessGroup(0, 1)
    begun = HostRead(torch.zeros(2), group)
    note_abort([group])
    with pytest.raises(AbortedError):
        begun.get()
