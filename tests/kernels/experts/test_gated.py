"""Gating of sorted assignments against autograd in float64, into memory that is NaN."""

from __future__ import annotations

import pytest
import torch

from hecate.kernels.common.ffn import activation
from hecate.kernels.experts.gated import gate, gate_backward
from tests.kernels.common.combine_cases import CASES, Given
from tests.kernels.grouping import TOLERANCE, assert_close, poisoned

__all__ = ["poisoned"]


@pytest.mark.parametrize("name", CASES)
def test_gate(name: str, device: torch.device, poisoned: None) -> None:
    case = CASES[name]
    given = Given(case, device)
    order, gate_up, dh = given.order, given.rows(2 * case.width), given.rows(case.width)
    wide_gate_up, wide_weight = given.wide(gate_up, given.weight)
    gate_part, up = wide_gate_up.chunk(2, dim=1)
    h = activation(case.activation, gate_part) * up
    weighted = wide_weight.flatten()[order.order_P[: given.here], None] * h
    dgate_up, dweight = torch.autograd.grad((weighted * dh[: given.here].double()).sum(), (wide_gate_up, wide_weight))

    got_h = gate(gate_up, order, case.activation)
    got_dgate_up, got_weighted, got_dweight = gate_backward(gate_up, dh, given.weight, order, case.activation)
    for what, got, want in (("h", got_h, h), ("dgate_up", got_dgate_up, dgate_up), ("w h", got_weighted, weighted)):
        assert_close(got[: given.here], want.detach(), TOLERANCE[case.dtype], what)
        assert got[given.here :].isnan().all(), what
    assert_close(got_dweight, dweight, TOLERANCE[case.dtype], "dweight")
