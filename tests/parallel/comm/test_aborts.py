"""After an abort the host reads nothing of what the collectives of a group have written, and indices that came from one stay in range."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist

from hecate.parallel.comm import dispatch as dispatching
from hecate.parallel.comm.aborts import AbortedError, arrived, in_range, is_aborted, note_abort, raise_if_aborted, read
from hecate.parallel.comm.dispatch import dispatch
from hecate.parallel.comm.reshard import RowSpec, reshard
from hecate.parallel.transfer.transfer_plan import TokenPlan
from testing.ranks import run_ranks


def test_what_an_aborted_group_has_written_cannot_be_read() -> None:
    group, other = dist.ProcessGroup(0, 1), dist.ProcessGroup(0, 1)
    values = torch.arange(6).view(2, 3)
    assert read(values, group).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert arrived(values, group) is values
    assert not is_aborted(group)
    note_abort([group])
    assert is_aborted(group)
    for ask in (lambda: read(values, group), lambda: arrived(values, group), lambda: raise_if_aborted(group)):
        with pytest.raises(AbortedError, match="another rank was lost"):
            ask()
    assert issubclass(AbortedError, dist.DistError)
    assert read(values, other) is values


def test_only_indices_out_of_range_are_changed() -> None:
    rows = torch.tensor([[-7, 0, 2], [-1, 3, 10**12]])
    assert in_range(rows[:, 1:], -1, 3).tolist() == [[0, 2], [3, 3]]
    assert rows.tolist() == [[-7, 0, 2], [-1, 3, 3]]


def garbage_for_slots(rank: int, world: int) -> list[int]:
    """The slots of a dispatch whose message of slots was aborted."""
    exchange = dispatching._exchange_rows

    def spoilt(rows: torch.Tensor, *arguments: object) -> torch.Tensor:
        received = exchange(rows, *arguments)  # type: ignore[arg-type]
        return received.random_() if received.dtype == torch.int64 else received

    dispatching._exchange_rows = spoilt
    plan = TokenPlan(bound_EB=np.array([[0.5]] * 4), slot_DE=np.array([[0, 1, 2, -1], [-1, 1, 0, 2]]))
    x_TD, weight_TK = torch.ones(8, 2), torch.ones(8, 2)
    expert_TK = torch.tensor([[1, 2]] * 8)
    sent = dispatch(x_TD, expert_TK, weight_TK, torch.arange(8), plan, dist.group.WORLD)  # type: ignore[arg-type]
    return [int(slot) for slot in sent.slot_RK.flatten()]


def test_slots_that_an_abort_has_spoilt_are_slots_still() -> None:
    for slots in run_ranks(2, garbage_for_slots):
        assert len(slots) == 16
        assert all(-1 <= slot < 3 for slot in slots), slots


def aborted_in_a_move(rank: int, world: int) -> str:
    """Both experts change their owners, and the groups are aborted while their rows travel."""
    group, exchange = dist.group.WORLD, dist.all_to_all_single
    assert group is not None

    def abort_then(*arguments: object, **named: object) -> object:
        note_abort([group])
        return exchange(*arguments, **named)  # type: ignore[arg-type]

    dist.all_to_all_single = abort_then
    rows = {rank: {"master": torch.ones(4)}}
    try:
        reshard(rows, {"master": RowSpec((4,), torch.float32)}, np.array([0, 1]), np.array([1, 0]), group, torch.device("cpu"))
    except AbortedError:
        return "the rank keeps what it has"
    return "the rank takes what may be garbage for an expert"


def test_experts_do_not_move_in_an_aborted_message() -> None:
    assert run_ranks(2, aborted_in_a_move) == ["the rank keeps what it has"] * 2
