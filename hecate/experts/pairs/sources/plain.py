"""Pairs whose A and B are trained (LoRA, arXiv 2106.09685).

Shapes: S slots, C elements of a chunk, r rank, I inputs and O outputs of a projection.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from hecate.errors import UserError
from hecate.experts.pairs.gradient_rules import ruled_pairs
from hecate.experts.pairs.source_facts import SourceFacts
from hecate.experts.seeding import generator, linear_weight
from hecate.parallel.values.expert_kinds import PROJECTION_ORDER, LoraShape, PairSizes, UnitSizes
from hecate.parallel.values.layout import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

    from hecate.kernels.common.low_rank import LowRankPairs


def plain_pairs(sizes: UnitSizes, projections: Iterable[str], lora: LoraShape) -> PairSizes:
    """Of pairs that are trained as they are: A [rank, inputs] and B [outputs, rank] of each projection."""
    specs = []
    for name in sorted(projections, key=PROJECTION_ORDER.index):
        inputs, outputs = sizes.of_projection(name)
        specs += [TensorSpec(f"{name}.A", (lora.rank, inputs)), TensorSpec(f"{name}.B", (outputs, lora.rank))]
    # Copies of B: one if each expert has a scale of its own, and one by which a gradient rule makes A's gradient.
    copies = bool(lora.of_experts) + (lora.gradient_rule != "none")
    return PairSizes(tuple(specs), 2.0 * sum(spec.numel for spec in specs), computed_numel=copies * sum(spec.numel for spec in specs[1::2]))


class PlainPairs:
    """Plain LoRA (a `PairSource`): A and B of each projection are trained. A chunk holds them by projection, A before B.

    Where experts differ in rank (`LoraShape.of_experts`; 0 for those that are not chosen), an expert's rows of A and columns of B beyond
    its own rank are zero. Their gradients are then zero, too, so they stay zero exactly. The pairs have one scale; what an expert's own is
    more than that, its B is multiplied by in the pairs, but not in the chunk.
    """

    drawn_digest = ""

    def __init__(self, lora: LoraShape, projections: tuple[str, ...], sizes: UnitSizes, chosen: tuple[int, ...] | None = None) -> None:
        """`chosen`: the experts that train; None: all."""
        assert projections, "an expert needs an adapter on at least one projection"
        self.lora = lora
        self._chosen = chosen
        self.sizes = plain_pairs(sizes, projections, lora)
        self.projections = tuple(spec.name.removesuffix(".A") for spec in self.sizes.trained[::2])
        import torch

        self._factor_E = torch.tensor([scale / lora.scale for _, scale in lora.of_experts], dtype=torch.float64)

    def initial(self, expert: int, *key: int | str) -> Tensor:
        """A by Kaiming uniform, as a linear layer of its own; B zero."""
        import torch

        parts = []
        rank = self._rank_of(expert)
        for projection, a, b in zip(self.projections, self.sizes.trained[::2], self.sizes.trained[1::2], strict=True):
            a_rI = torch.zeros(a.shape, dtype=torch.float64)
            a_rI[:rank] = linear_weight(rank, a.shape[1], generator(*key, projection))
            parts += [a_rI.flatten(), torch.zeros(b.numel, dtype=torch.float64)]
        return torch.cat(parts)

    def stacked(self, replicas_SC: Tensor, expert_S: Tensor) -> dict[str, LowRankPairs]:
        """Views of the chunks; where experts differ in rank, B is a copy, and a gradient rule adds what it needs."""
        # One split, whose backward is one concatenation, and not a slice each, whose backward zero-fills the whole chunk.
        parts = replicas_SC.split_with_sizes([spec.numel for spec in self.sizes.trained], dim=1)
        views = [part.view(-1, *spec.shape) for part, spec in zip(parts, self.sizes.trained, strict=True)]
        if self.lora.of_experts:
            self._factor_E = self._factor_E.to(replicas_SC.device)
            factor_S = self._factor_E[expert_S].to(replicas_SC.dtype)
            views[1::2] = [b_SOr * factor_S[:, None, None] for b_SOr in views[1::2]]
        pairs = zip(self.projections, views[::2], views[1::2], strict=True)
        return {projection: ruled_pairs(self.lora, a_SrI, b_SOr) for projection, a_SrI, b_SOr in pairs}

    def chunk_of(self, expert: int, pairs: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
        """Raises UserError: the expert has a smaller rank than these pairs."""
        import torch

        rank, parts = self._rank_of(expert), []
        factor = self.lora.of_experts[expert][1] / self.lora.scale if self.lora.of_experts else 1.0
        for projection in self.projections:
            a_rI, b_Or = pairs[projection]
            if a_rI[rank:].any() or b_Or[:, rank:].any():
                raise UserError(f"lora.r: expert {expert} has rank {rank}, but the adapter's pair of {projection} has more")
            parts += [a_rI.flatten(), (b_Or if factor == 1.0 else b_Or / factor).flatten()]
        return torch.cat(parts)

    def _rank_of(self, expert: int) -> int:
        """0 for an expert that was not chosen to train."""
        if self._chosen is not None and expert not in self._chosen:
            return 0
        return self.lora.of_experts[expert][0] if self.lora.of_experts else self.lora.rank


SOURCE = SourceFacts(
    sizes=plain_pairs,
    make=lambda site, lora, projections: PlainPairs(lora, projections, site.sizes, lora.chosen_of(site.unit.layer, site.num_experts)),
)
