"""Records are taken apart into what torch takes, and put together without loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hecate.kernels.common.operands import Operands, flattened, leaf_types, put_together, take_apart, unflattened


@dataclass(frozen=True)
class Inner(Operands):
    tensor: Tensor
    cache: dict[int, Tensor] = field(default_factory=dict, init=False)
    rows: int = 3


@dataclass(frozen=True)
class Outer(Operands):
    first: Inner
    tensors: Sequence[Tensor]
    name: str
    second: Inner


def test_a_record_has_the_leaves_of_its_fields_and_comes_back() -> None:
    outer = Outer(Inner(torch.ones(2)), [torch.zeros(1)], "silu", Inner(torch.ones(3), 5))
    assert list(leaf_types(Outer)) == ["first.tensor", "first.rows", "tensors", "name", "second.tensor", "second.rows"]
    assert leaf_types(Outer)["first.rows"] is int
    leaves = flattened(outer)
    assert len(leaves) == 6
    again = unflattened(Outer, iter(leaves))
    assert again.first.tensor is outer.first.tensor
    assert again.second.tensor is outer.second.tensor
    assert (again.tensors, again.name, again.second.rows) == (outer.tensors, "silu", 5)


def test_what_is_taken_apart_comes_back_in_its_form() -> None:
    x = torch.ones(2)
    values: list[Any] = [[x, x + 1], x + 2, [], "silu", [0.5, 2.0], 7, (x,)]
    tensors, form = take_apart(values)
    assert all(isinstance(tensor, torch.Tensor) for tensor in tensors)
    back = put_together(tensors, form)
    assert torch.equal(torch.stack(back[0]), torch.stack(values[0]))
    assert torch.equal(back[1], values[1])
    assert back[2:6] == [[], "silu", [0.5, 2.0], 7]
    assert torch.equal(back[6][0], x)
