"""An operator is made of two passes over records, and says torch what they take and return."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from hecate.kernels.common.operands import Operands
from hecate.kernels.common.operators import DifferentiableOperator


@dataclass(frozen=True)
class Factors(Operands):
    matrices: Sequence[Tensor]
    scales: Sequence[float]


@dataclass(frozen=True)
class Call(Operands):
    x: Tensor
    factors: Factors
    name: str


@dataclass(frozen=True)
class Once(Operands):
    added: Sequence[Tensor]
    times: int


@dataclass(frozen=True)
class Kept(Operands):
    sum: Tensor


def forward(call: Call, once: Once) -> tuple[Tensor, Kept]:
    total = sum((scale * matrix for matrix, scale in zip(call.factors.matrices, call.factors.scales, strict=True)), torch.zeros(()))
    return call.x @ total * once.times + sum(once.added, torch.zeros(())), Kept(total * once.times)


def backward(dy: Tensor, call: Call, kept: Kept) -> list[Tensor]:
    assert call.name == "silu"
    return [dy @ kept.sum.T, call.x.T @ dy]


def gradients(call: Call, found: list[Tensor]) -> dict[str, Any]:
    return {"x": found[0], "factors.matrices": [3 * scale * found[1] for scale in call.factors.scales]}


OPERATOR = DifferentiableOperator("of_a_test", forward, backward, gradients)


def results(x: Tensor, first: Tensor, second: Tensor, function: Any = OPERATOR) -> Tensor:
    return function(Call(x, Factors([first, second], [0.5, 2.0]), "silu"), Once([torch.ones(4)], 3))


def leaves() -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=random).requires_grad_() for shape in ((2, 3), (3, 4), (3, 4))]


def test_gradients_are_those_of_autograd() -> None:
    given = leaves()
    plain = given[0] @ (0.5 * given[1] + 2.0 * given[2]) * 3 + 1
    y = results(*given)
    torch.testing.assert_close(y, plain)
    for mine, wanted in zip(torch.autograd.grad(y.sum(), given), torch.autograd.grad(plain.sum(), given), strict=True):
        torch.testing.assert_close(mine, wanted)


def test_under_torch_compile_it_is_one_operator_with_the_same_results() -> None:
    given = leaves()
    got = torch.compile(lambda *each: results(*each) * 1.0, fullgraph=True, backend="aot_eager")(*given)
    want = results(*given)
    assert torch.equal(got, want)
    for mine, wanted in zip(torch.autograd.grad(got.sum(), given), torch.autograd.grad(want.sum(), given), strict=True):
        assert torch.equal(mine, wanted)


def test_the_schema_has_the_fields_of_the_records() -> None:
    schema = str(torch.ops.hecate.of_a_test.default._schema)
    taken = "Tensor x, Tensor[] factors_matrices, float[] factors_scales, str name, Tensor[] once_added, SymInt once_times"
    assert schema == f"hecate::of_a_test({taken.replace('once_', '')}) -> (Tensor, Tensor)"
    schema = str(torch.ops.hecate.of_a_test_backward.default._schema)
    assert schema.startswith("hecate::of_a_test_backward(Tensor dy, Tensor sum, Tensor x, ")


@pytest.mark.parametrize("count", [0, 2])
def test_torch_agrees_with_the_registration(count: int) -> None:
    x, first, second = leaves()
    torch.library.opcheck(OPERATOR.library, (x, [first, second], [0.5, 2.0], "silu", [torch.ones(4)] * count, 3))


def test_nothing_is_kept_of_what_the_forward_pass_alone_takes() -> None:
    y = results(*leaves())
    assert [tuple(tensor.shape) for tensor in y.grad_fn.saved_tensors] == [(3, 4), (2, 3), (3, 4), (3, 4)]  # type: ignore[union-attr]
