"""Grouped gradients of weights against float64 products slot by slot, into memory that is NaN."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from hecate.kernels.common.assignments import AssignmentOrder
from hecate.kernels.common.dropout import Dropout, RowDropout
from hecate.kernels.experts.grouped_wgrad import grouped_wgrad
from tests.kernels.grouping import GROUPS, TOLERANCE, assert_close, grouped, poisoned
from tests.kernels.plain_orders import assignment_order

__all__ = ["poisoned"]

DROPOUT = Dropout(0.4, key=5)


@dataclass(frozen=True)
class Case:
    sizes: tuple[int, ...] = GROUPS["uneven"]
    left: int = 40
    right: int = 48
    gather_left: bool = False
    gather_right: bool = False
    drop: bool = False
    wider: int = 0
    """by so many columns are the rows that the operands are taken of"""
    dtype: torch.dtype = torch.float32
    out_dtype: torch.dtype = torch.float32


CASES = {
    **{f"groups: {name}": Case(sizes=sizes) for name, sizes in GROUPS.items()},
    "left gathered": Case(gather_left=True),
    "right gathered": Case(gather_right=True),
    "odd sizes": Case(left=37, right=53),
    "sizes below every tile": Case(left=1, right=3),
    "narrow": Case(left=8, right=64),
    "columns of wider rows": Case(wider=5),
    "dropout": Case(drop=True, gather_right=True, left=16),
}


def run(case: Case, device: torch.device) -> None:
    random = torch.Generator().manual_seed(5)
    slot_TK = grouped(case.sizes, 3, k=2).to(device)
    order = assignment_order(slot_TK, len(case.sizes))

    def operand(gather: bool, width: int) -> torch.Tensor:
        values = (
            torch.randn(len(slot_TK) if gather else order.num_assignments, width + case.wider, generator=random).to(case.dtype).to(device)
        )
        if not gather:
            values[int(order.starts[-1]) :] = torch.nan  # rows that a kernel before this one did not write
        return values[:, case.wider :]

    left, right = operand(case.gather_left, case.left), operand(case.gather_right, case.right)
    options: dict[str, Any] = {"gather": "left" if case.gather_left else "right" if case.gather_right else None, "scale": 0.5}
    if case.drop:
        options["drop_right"] = DROPOUT.rows(torch.arange(order.num_assignments, device=device) * 7, 3)
    # Part of a larger chunk, as experts' gradients are.
    chunk = torch.full((len(case.sizes), case.left * case.right + 11), torch.nan, dtype=case.out_dtype, device=device)
    out = chunk[:, 11:].unflatten(1, (case.left, case.right))
    assert grouped_wgrad(left, right, order, out, **options) is out
    assert chunk[:, :11].isnan().all()
    want = expected(case, left, right, order, options.get("drop_right"))
    assert_close(out, want, TOLERANCE[case.out_dtype])
    empty = torch.tensor([size == 0 for size in case.sizes], device=device)
    assert not out[empty].any()


def expected(case: Case, left: torch.Tensor, right: torch.Tensor, order: AssignmentOrder, drop: RowDropout | None) -> torch.Tensor:
    token_P = order.token_P.long()
    left = (left[token_P] if case.gather_left else left).double()
    right = (right[token_P] if case.gather_right else right).double()
    if drop is not None:
        right = right * drop.keep(right.shape[1], right.dtype)
    starts = order.starts.tolist()
    return torch.stack([0.5 * left[start:end].T @ right[start:end] for start, end in itertools.pairwise(starts)])


@pytest.mark.parametrize("name", CASES)
def test_float32(name: str, device: torch.device, poisoned: None) -> None:
    run(CASES[name], device)


@pytest.mark.parametrize("name", ["left gathered", "columns of wider rows", "dropout"])
@pytest.mark.parametrize("out_dtype", ["same", torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(name: str, dtype: torch.dtype, out_dtype: torch.dtype | str, device: torch.device, poisoned: None) -> None:
    """Into float32 masters' gradients nothing is rounded: products of halves are exact in float32."""
    run(replace(CASES[name], dtype=dtype, out_dtype=dtype if isinstance(out_dtype, str) else out_dtype), device)
