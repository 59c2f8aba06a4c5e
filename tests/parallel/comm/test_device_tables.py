"""A plan's tables on a device: the same numbers, copied once for equal plans."""

from __future__ import annotations

import numpy as np
import torch

from hecate.parallel.comm.device_tables import chunk_tables, to_device, token_tables
from hecate.parallel.transfer.transfer_plan import SumTerm, plan_tokens
from tests.parallel.comm.collective_cases import Case

CPU = torch.device("cpu")
HELD = ((True,) * 4, (True,) * 4, (True, False, True, False), (False,) * 4, (True,) * 4)
CASE = Case((0, 1, 0, 1), (0, 1, 2, 3, 0), HELD, 12, torch.float32)


def test_tables_are_those_of_the_plan_in_their_places() -> None:
    for route in ("flat", "two_level", "sliced"):
        plan = CASE.plan(1, route)  # type: ignore[arg-type]
        tables = chunk_tables(plan, CPU)
        for name in ("expert_S", "own_slot_n", "owned_row_M", "sent_on_M", "grad_slot_M", "leader_row_M"):
            found = getattr(tables, name)
            assert found.dtype == torch.int64
            assert found.tolist() == getattr(plan.tables, name).tolist(), name
        assert [slot_M.tolist() for slot_M in tables.arrived_slot_M] == [slot_M.tolist() for slot_M in plan.tables.arrived_slot_M]
        for name in ("leader_sums", "owner_sums"):
            found, wanted = getattr(tables, name), getattr(plan.tables, name)
            assert (found.own_slot_n.tolist(), found.own_after) == (wanted.own_slot_n.tolist(), wanted.own_after)
            assert [plain(term) for term in found.terms] == [plain(term) for term in wanted.terms]


def plain(term: SumTerm) -> tuple[int, object, object]:  # type: ignore[type-arg]
    rows = term.rows if isinstance(term.rows, slice) else term.rows.tolist()
    return term.exchange, rows, None if term.sums is None else term.sums.tolist()


def test_equal_plans_share_their_tables() -> None:
    first, again = CASE.plan(0), CASE.plan(0)
    assert first is not again
    assert chunk_tables(first, CPU) is chunk_tables(again, CPU)
    assert chunk_tables(CASE.plan(1), CPU) is not chunk_tables(first, CPU)
    split_ED = np.full((5, 4), 0.25)
    tables = token_tables(plan_tokens(CASE.placement, split_ED), CPU)
    assert token_tables(plan_tokens(CASE.placement, split_ED.copy()), CPU) is tables
    assert tables.bound_EB.tolist() == [[0.25, 0.5, 0.75]] * 5
    assert tables.slot_DE[1].tolist() == [0, 1, -1, -1, 2]


def test_rows_to_index_with() -> None:
    found = to_device([np.array([3, 1]), np.empty(0, dtype=np.int64), np.array([7], dtype=np.int32)], CPU)
    assert [rows.tolist() for rows in found] == [[3, 1], [], [7]]
    assert all(rows.dtype == torch.int64 for rows in found)
