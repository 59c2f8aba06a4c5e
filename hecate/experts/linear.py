"""Experts over a linear layer: each is one low-rank pair, and a router of the linear's own chooses among them (MoLA, arXiv 2402.08562).

y = W x + bias + sum over the token's experts e of weight_e · s · B_e A_e x
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hecate.experts.family import ExpertReplicas, Site, UnitExperts
from hecate.experts.forward_pass import CurrentPass
from hecate.experts.layer import MoeLayer
from hecate.experts.pairs.source import PairSource
from hecate.experts.routers.router import BalanceLoss, Router, RouterStats, load_balancing_loss
from hecate.kernels.backend import ExpertKernels
from hecate.kernels.common.assignments import RoutedTokens
from hecate.parallel.cost.expert_cost import UnitPlace
from hecate.parallel.values.expert_kinds import LINEARS, MIXES_ON_EVERY_RANK, ONLY_PROJECTION, LinearSizes
from hecate.parallel.values.units import Unit


class LinearExperts(UnitExperts):
    """The experts of one linear layer (an ExpertFamily): what they add to W x, which every rank computes for its own tokens."""

    def __init__(self, site: Site, pairs: PairSource, mix: str = "products") -> None:
        """Args:
        mix: how a token's pairs become one, by its name in `MIXES`.
        """
        self._mix, self.on_every_rank = MIXES[mix], mix in MIXES_ON_EVERY_RANK
        assert isinstance(site.shape, LinearSizes), site.shape
        super().__init__(LINEARS, site, pairs, linear_place(site.shape, site.together))

    def compute(self, routed: RoutedTokens, replicas: ExpertReplicas, step: int | None) -> Tensor:
        """[T, outputs]; see `ExpertFamily.compute`."""
        pairs = self.pair_source.stacked(replicas.chunks_SC, routed.experts_in_slots)[ONLY_PROJECTION]
        dropout = self._dropout(step)
        return self._mix(self._kernels(routed.x_TD))(self._numbered_for(dropout, routed), pairs, dropout=dropout)


MIXES: dict[str, Callable[[ExpertKernels], Callable[..., Tensor]]] = {
    "products": lambda kernels: kernels.routed_pairs,
    "separate": lambda kernels: kernels.sorted_pairs,
    "factors": lambda kernels: kernels.mixed_factors,
}
"""how a token's experts become one, by the name that `moe.router.mix` gives. products: the weighted sum of what the pairs B_e A_e give.
separate: the same, each pair in products of its own, so that what it computes is the same to the bit however many others there are.
factors: one pair, whose A and B are weighted sums (see `MIXES_ON_EVERY_RANK`)"""


def linear_place(sizes: LinearSizes, together: int) -> UnitPlace:
    """The place of a linear layer among the `together` units of its decoder layer, the first of which begin the layer."""
    return UnitPlace(sizes.inputs, sizes.outputs, together, at_beginning=True)


class MoeLinear(MoeLayer):
    """[..., inputs] -> [..., outputs]. It stands where the linear stood: the frozen W at home, and what the unit's experts add to it.

    Padding tokens (see `PassTokens.valid`) go to no expert and do not count.
    """

    def __init__(self, unit: Unit, router: Router, current: CurrentPass, linear: nn.Linear) -> None:
        super().__init__(unit, router, current)
        self.linear = linear

    @property
    def balance(self) -> BalanceLoss | None:
        """The linears of one decoder layer are balanced together."""
        loss = self.router.loss
        return balance_by_layer if loss is load_balancing_loss else loss

    def forward(self, hidden: Tensor, *decided: Tensor) -> Tensor:
        return self.linear(hidden) + super().forward(hidden, *decided)


def balance_by_layer(stats: Mapping[Unit, RouterStats], group: dist.ProcessGroup) -> Tensor:
    """This rank's share of the sum over the decoder layers of E · sum_e f_e · P_e; the shares of all ranks add up to the loss.

    f is the share of all choices that are e, and P the mean probability of e, both over the tokens of all ranks and the units of a decoder
    layer, which have equally many experts. f carries no gradient. Balanced routing gives 1 for each layer, whatever the number of choices.
    Every rank must call it with the same units. Source: MoLA's code, which divides counts by their sum where HF Mixtral's
    `load_balancing_loss_func` divides them by the number of tokens, given the logits of a layer's units one after the other.
    """
    by_layer: dict[int, list[RouterStats]] = {}
    for unit in sorted(stats):
        by_layer.setdefault(unit.layer, []).append(stats[unit])
    counts = [torch.stack([one.count_KE for one in of_layer]).sum(0) for of_layer in by_layer.values()]
    flat = torch.cat([count.flatten() for count in counts])
    if dist.get_world_size(group) > 1:
        dist.all_reduce(flat, group=group)
    total = torch.zeros((), dtype=next(iter(stats.values())).prob_sum_E.dtype, device=flat.device)
    for of_layer, count, shape_of in zip(by_layer.values(), flat.split([c.numel() for c in counts]), counts, strict=True):
        count_KE = count.view_as(shape_of)
        choices = count_KE.sum().clamp(min=1).to(total.dtype)
        num_tokens = choices / count_KE.shape[0]  # times units
        prob_E = torch.stack([one.prob_sum_E for one in of_layer]).sum(0) / num_tokens
        total = total + count_KE.shape[1] * (count_KE.sum(0).to(total.dtype) / choices * prob_E).sum()
    return total
