"""Pairs whose A is drawn from names and never trained, and whose B alone is (FFA-LoRA, arXiv 2403.12313).

Shapes: S slots, C elements of a chunk, r rank, I inputs and O outputs of a projection.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from hecate.experts.pairs.gradient_rules import ruled_pairs
from hecate.experts.pairs.source_facts import SourceFacts
from hecate.experts.pairs.sources.plain import plain_pairs
from hecate.experts.seeding import digest_of_drawn, generator, linear_weight, require_drawn
from hecate.parallel.values.expert_kinds import LoraShape, PairSizes, UnitSizes
from hecate.parallel.values.units import Unit

if TYPE_CHECKING:
    from torch import Tensor

    from hecate.experts.family import Site
    from hecate.kernels.common.low_rank import LowRankPairs


def fixed_a_pairs(sizes: UnitSizes, projections: Iterable[str], lora: LoraShape) -> PairSizes:
    """Of pairs whose B alone is trained (FFA-LoRA, arXiv 2403.12313). The products with A are computed, but not its gradient."""
    whole = plain_pairs(sizes, projections, lora)
    seeded = tuple(spec for spec in whole.trained if spec.name.endswith(".A"))
    trained = tuple(spec for spec in whole.trained if spec.name.endswith(".B"))
    return PairSizes(trained, whole.flops, seeded, 2.0 * sum(spec.numel for spec in seeded))


def drawn_a(seed: int, unit: Unit, projection: str, shape: tuple[int, ...]) -> Tensor:
    """Return the float64 [rank, inputs] that a run's seed draws for a projection of a unit."""
    rank, inputs = shape
    return linear_weight(rank, inputs, generator(seed, "fixed A", str(unit), projection))


class FixedA:
    """A `PairSource`: the experts of a unit share one A for each projection, and each trains its own B. A chunk holds B by projection.

    Every rank draws the same A, so it takes no room in a chunk, never travels and has no moments.
    """

    def __init__(self, site: Site, lora: LoraShape, projections: tuple[str, ...]) -> None:
        assert projections, "an expert needs an adapter on at least one projection"
        self.lora = lora
        self.sizes = fixed_a_pairs(site.sizes, projections, lora)
        self.projections = tuple(spec.name.removesuffix(".B") for spec in self.sizes.trained)
        self._site = site
        self._a_rI = {}
        for name, spec in zip(self.projections, self.sizes.seeded, strict=True):
            self._a_rI[name] = drawn_a(site.seed, site.unit, name, spec.shape).to(device=site.device, dtype=site.master_dtype)

    @property
    def drawn_digest(self) -> str:
        return digest_of_drawn(self._a_rI.values())

    def initial(self, expert: int, *key: int | str) -> Tensor:
        """B zero, so that an expert begins as the base."""
        import torch

        return torch.zeros(self.sizes.trained_numel, dtype=torch.float64)

    def stacked(self, replicas_SC: Tensor, expert_S: Tensor) -> dict[str, LowRankPairs]:
        """Views: the same A in every slot, and each slot's B."""
        pairs = {}
        parts = replicas_SC.split([spec.numel for spec in self.sizes.trained], dim=1)
        for name, spec, part in zip(self.projections, self.sizes.trained, parts, strict=True):
            a_SrI = self._a_rI[name].to(replicas_SC.dtype).expand(len(replicas_SC), -1, -1)
            pairs[name] = ruled_pairs(self.lora, a_SrI, part.view(-1, *spec.shape))
        return pairs

    def chunk_of(self, expert: int, pairs: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
        """Raises UserError: the A of an adapter is another than the drawn one."""
        import torch

        for name in self.projections:
            require_drawn(pairs[name][0], self._a_rI[name], f"expert {self._site.unit}.{expert}, {name}")
        return torch.cat([pairs[name][1].flatten() for name in self.projections])


SOURCE = SourceFacts(sizes=fixed_a_pairs, make=FixedA, draws=True, fixes_a=True)
