"""Kernels have room for the assignments that a rank serves, and compute the same as with room for all that its tokens have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from hecate.kernels.common.assignments import RoutedTokens
from hecate.kernels.common.dropout import Dropout
from hecate.kernels.common.ffn import FfnBase, FfnShape
from hecate.kernels.common.low_rank import LowRankPairs
from hecate.kernels.experts.full_operators import full_ffn_triton
from hecate.kernels.experts.moe_lora_operators import moe_lora_ffn_triton
from hecate.kernels.experts.routed_pairs_triton import sorted_pairs_triton
from hecate.kernels.mixlora.operators import mixlora_ffn_triton
from tests.kernels.conftest import INTERPRETED
from tests.kernels.grouping import poisoned

__all__ = ["poisoned"]

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif(not INTERPRETED, reason="the inputs are on the CPU, and the interpreter does not run on a GPU's machine"),
]
TOKENS, CHOSEN, SLOTS, HIDDEN, FFN, RANK = 40, 4, 3, 12, 20, 3
Layer = Callable[[RoutedTokens], Tensor]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def pair(inputs: int, outputs: int, seed: int) -> LowRankPairs:
    return LowRankPairs(normal(SLOTS, RANK, inputs, seed=seed), normal(SLOTS, outputs, RANK, seed=seed + 1), 0.5)


def layer(kind: str) -> tuple[Layer, list[Tensor]]:
    """A layer, and what it trains."""
    shape, dropout = FfnShape(HIDDEN, FFN, "silu"), Dropout(0.2, key=5)
    if kind == "full":
        experts = normal(SLOTS, shape.numel, seed=1)
        return lambda routed: full_ffn_triton(routed, experts, shape), [experts]
    if kind == "linear":
        alone = pair(HIDDEN, FFN, 1)
        return lambda routed: sorted_pairs_triton(routed, alone, dropout=dropout), [alone.a_SrI, alone.b_SOr]
    pairs = {"gate_proj": pair(HIDDEN, FFN, 1), "up_proj": pair(HIDDEN, FFN, 3), "down_proj": pair(FFN, HIDDEN, 5)}
    trained = [matrix for of in pairs.values() for matrix in (of.a_SrI, of.b_SOr)]
    if kind == "mixlora":
        base = FfnBase(*(normal(*of, seed=9).detach() for of in ((FFN, HIDDEN), (FFN, HIDDEN), (HIDDEN, FFN))), "silu")
        return lambda routed: mixlora_ffn_triton(routed, base, pairs, dropout=dropout), trained
    frozen = [normal(shape.numel, seed=20 + slot).detach() for slot in range(SLOTS)]
    return lambda routed: moe_lora_ffn_triton(routed, frozen, pairs, shape, dropout=dropout), trained


@pytest.mark.parametrize("share", [0.2, 0.0])
@pytest.mark.parametrize("kind", ["full", "moe_lora", "mixlora", "linear"])
def test_the_same_is_computed_with_fewer_rows(kind: str, share: float) -> None:
    """`share` of the assignments are served, as of rows that come from other ranks; a rank may serve none."""
    random = torch.Generator().manual_seed(4)
    slot = torch.randint(SLOTS, (TOKENS, CHOSEN), generator=random)
    slot[torch.rand(slot.shape, generator=random) >= share] = -1
    x, weight = normal(TOKENS, HIDDEN, seed=7), normal(TOKENS, CHOSEN, seed=8)
    routed = RoutedTokens(x, slot, weight, torch.arange(TOKENS), torch.arange(SLOTS))
    function, trained = layer(kind)
    served, found, kept = int((slot >= 0).sum()), [], list[list[int]]()
    for given in (routed, replace(routed, served=served)):
        rows: list[int] = []

        def keep(tensor: Tensor, rows: list[int] = rows) -> Tensor:
            if tensor.is_floating_point() and tensor.dim() == 2:
                rows.append(len(tensor))
            return tensor

        with saved_tensors_hooks(keep, lambda tensor: tensor):
            y = function(given)
        found.append([y.detach(), *torch.autograd.grad(y.sin().sum(), (x, weight, *trained))])
        kept.append(rows)
    assert all(map(torch.equal, *found))
    assert TOKENS * CHOSEN in kept[0]
    assert TOKENS * CHOSEN not in kept[1]
    assert served in kept[1]
    assert bool(found[0][0].any()) == (served > 0)
