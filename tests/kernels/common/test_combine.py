"""Combining of sorted assignments against float64 sums, into memory that is NaN."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hecate.kernels.common.combine import combine_assignments
from tests.kernels.common.combine_cases import CASES, Case, Given
from tests.kernels.grouping import TOLERANCE, assert_close, poisoned

__all__ = ["poisoned"]


@pytest.mark.parametrize("name", CASES)
def test_combine(name: str, device: torch.device, poisoned: None) -> None:
    case = CASES[name]
    given = Given(case, device)
    order, v = given.order, given.rows(case.width)
    wide_v, zeros = v[: given.here].double(), torch.zeros(len(given.weight), case.width, dtype=torch.float64, device=device)
    token, assignment = order.token_P[: given.here].long(), order.order_P[: given.here]

    weighted = zeros.index_add(0, token, given.weight.double().flatten()[assignment, None] * wide_v)
    assert_close(combine_assignments(v, given.weight, order), weighted, TOLERANCE[case.dtype], "y")
    assert_close(combine_assignments(v, None, order), zeros.index_add(0, token, wide_v), TOLERANCE[case.dtype], "sum")


def test_a_token_s_assignments_are_added_in_their_order(device: torch.device) -> None:
    """Whatever slots they went to. Weights are powers of two: products are exact, so fused or not makes no difference."""
    case = replace(Case(), k=4)
    given = Given(case, device)
    v = given.normal(given.order.num_assignments, case.width)
    weight = torch.exp2(given.weight.round())
    want = torch.zeros(len(weight), case.width, device=device)
    for k in range(case.k):
        place = given.order.place_TK[:, k].long()
        want += torch.where((place >= 0)[:, None], weight[:, k, None] * v[place.clamp(min=0)], 0.0)
    assert torch.equal(combine_assignments(v, weight, given.order), want)
