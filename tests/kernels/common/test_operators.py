"""Records are packed for operators and unpacked without loss."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from hecate.kernels.common.dropout import Dropout
from hecate.kernels.common.low_rank import LowRankPairs
from hecate.kernels.common.operators import gradients_of_pairs, keep_for_backward, kept_for_backward, pack_pairs, unpack_pairs


def pair(seed: int, scale: float) -> LowRankPairs:
    random = torch.Generator().manual_seed(seed)
    return LowRankPairs(torch.randn(2, 3, 5, generator=random), torch.randn(2, 7, 3, generator=random), scale)


def test_pairs_come_back_in_the_order_of_projections_with_dropout_in_their_scales() -> None:
    pairs = {"down_proj": pair(0, 2.0), "gate_proj": replace(pair(1, 0.5), eta=3.0)}
    matrices, projections, scales, etas, trains_a = pack_pairs(pairs, Dropout(0.5, key=1))
    assert (projections, scales, etas) == ("gate_proj down_proj", [1.0, 4.0], [3.0, 0.0])
    again = unpack_pairs(matrices, projections, scales, etas)
    assert trains_a
    assert not pack_pairs({"up_proj": LowRankPairs(matrices[0], matrices[1].clone().requires_grad_(), 1.0)}, None)[-1]
    assert {name: of.eta for name, of in again.items()} == {"gate_proj": 3.0, "down_proj": None}
    assert list(again) == ["gate_proj", "down_proj"]
    assert all(again[name].a_SrI is pairs[name].a_SrI and again[name].b_SOr is pairs[name].b_SOr for name in pairs)


def test_gradients_of_b_alone_stand_where_those_of_a_and_b_do() -> None:
    one, two = torch.ones(1), torch.ones(2)
    assert gradients_of_pairs([one, two], of_a=True) == [one, two]
    assert gradients_of_pairs([one, two], of_a=False) == [None, one, None, two]


def test_what_is_kept_for_the_backward_pass_comes_back_in_its_form() -> None:
    x = torch.ones(2)
    values: list[Any] = [[x, x + 1], x + 2, [], "silu", [0.5, 2.0], 7, (x,)]

    class Context:
        """As autograd's, as far as it is used."""

        saved_tensors: tuple[torch.Tensor, ...] = ()

        def set_materialize_grads(self, value: bool) -> None:
            assert not value

        def save_for_backward(self, *tensors: torch.Tensor) -> None:
            self.saved_tensors = tensors

    context = Context()
    keep_for_backward(context, values)
    back = kept_for_backward(context)
    assert all(isinstance(tensor, torch.Tensor) for tensor in context.saved_tensors)
    assert torch.equal(torch.stack(back[0]), torch.stack(values[0]))
    assert torch.equal(back[1], values[1])
    assert back[2:6] == [[], "silu", [0.5, 2.0], 7]
    assert torch.equal(back[6][0], x)
