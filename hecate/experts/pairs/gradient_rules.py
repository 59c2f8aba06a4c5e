"""Gradient rules: what becomes of the gradients of low-rank pairs on their way to A and B, before any optimizer sees them.

A rule changes what kernels are given, so that kernels know of none: a node of autograd behind B changes B's gradient, and another matrix in
B's place (`LowRankPairs.b_for_a_SOr`) gives A the gradient that the rule wants. The gradient of x, and with it all other layers, stays what
it is. A rule sees the values of the replica that computes a token, which are those at the beginning of the step.

Shapes: r rank, I inputs and O outputs of a projection; slots may stand in front.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

from hecate.io.registry import registered
from hecate.parallel.values.expert_kinds import LoraShape

if TYPE_CHECKING:
    from torch import Tensor

    from hecate.kernels.common.low_rank import LowRankPairs


@cache
def pair_rules() -> dict[str, Callable[[LowRankPairs, LoraShape], LowRankPairs]]:
    """The rules, by the name that `lora.gradient_rule` gives: files of `hecate.experts.pairs.rules`, which need torch."""
    return registered("hecate.experts.pairs.rules", "RULE")


def ruled_pairs(lora: LoraShape, a_rI: Tensor, b_Or: Tensor) -> LowRankPairs:
    """Return the pairs of these matrices, with their scale and under their gradient rule. Without gradients no rule computes anything."""
    import torch

    from hecate.kernels.common.low_rank import LowRankPairs

    pairs = LowRankPairs(a_rI, b_Or, lora.scale)
    if lora.gradient_rule != "none" and b_Or.requires_grad and torch.is_grad_enabled():
        return pair_rules()[lora.gradient_rule](pairs, lora)
    return pairs
