"""The routing that the samples of a forward pass bring: what is known of each layer's loads before the pass begins.

Forced on routers, it is rollout routing replay (R3, arXiv 2510.11370): the choice is the recorded one, the weights are the router's own.

Shapes: N tokens with padding among them, T tokens without padding, U units, K experts of a token, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hecate.parallel.values.units import Unit


@dataclass(frozen=True, eq=False)
class PassRouting:
    """The experts that a pass's tokens are known to go to, or should, by unit."""

    expert_UTK: Tensor
    """The experts of each token, int64, by the units' numbers in `place`."""
    place: dict[Unit, int]
    """The index of each unit in the first dimension of `expert_UTK`."""
    forced: bool
    """Whether tokens go to these experts, whatever the router would choose; False: the router chooses, and differences are counted."""

    @staticmethod
    def of_tokens(routed_NUK: Tensor, valid_T: Tensor | None, units: Sequence[Unit], *, forced: bool) -> PassRouting:
        """The routing of a pass, from the experts of all its tokens, of which `valid_T` are no padding (None: all), for these units."""
        routed_TUK = routed_NUK if valid_T is None else routed_NUK[valid_T]
        assert routed_TUK.shape[1] == len(units), (routed_TUK.shape, units)
        expert_UTK = routed_TUK.transpose(0, 1).to(torch.int64).contiguous()
        return PassRouting(expert_UTK, {unit: place for place, unit in enumerate(units)}, forced)

    def experts(self, unit: Unit) -> Tensor:
        """int64 [T, K]"""
        return self.expert_UTK[self.place[unit]]


def expert_counts(expert_TK: Tensor, num_experts: int) -> Tensor:
    """int64 [E]: assignments to each expert. The host does not wait for the device."""
    # scatter_add_, because bincount would make the host wait for a GPU.
    chosen = expert_TK.flatten()
    return chosen.new_zeros(num_experts).scatter_add_(0, chosen, torch.ones_like(chosen))


def differing(expert_TK: Tensor, known_TK: Tensor) -> Tensor:
    """int64 scalar: the assignments to experts that are none of their token's known ones, whatever the order."""
    return (expert_TK[:, :, None] != known_TK[:, None, :]).all(-1).sum()
