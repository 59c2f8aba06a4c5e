"""Pair sources: where the low-rank pairs of an expert come from, and what of them is trained, stored frozen or drawn anew from names.

Shapes: S slots, C elements of a chunk, r rank, I inputs and O outputs of a projection.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from hecate.parallel.values.expert_kinds import LoraShape, PairSizes

if TYPE_CHECKING:
    from torch import Tensor

    from hecate.kernels.common.low_rank import LowRankPairs


class PairSource(Protocol):
    """The pairs of a layer's experts. Families, kernels and exports see pairs only, so each source works in every family with pairs.

    A source may draw tensors anew from names (`initial`'s key) instead of storing them: they take no room in a chunk and never travel.
    """

    lora: LoraShape
    projections: tuple[str, ...]
    """The projections with a pair, in the order of the chunk."""

    sizes: PairSizes
    """What of an expert's pairs is trained, and what the products with them cost."""

    @property
    def drawn_digest(self) -> str:
        """The digest of what is drawn from names (`digest_of_drawn`), by which a run notices other numbers; empty: nothing is drawn."""

    def initial(self, expert: int, *key: int | str) -> Tensor:
        """float64 [C]: the pairs' part of an expert's initial chunk, or, of a source with a pool (`PairSizes.pooled`), the expert's initial
        block of it. `key` names it, as (seed, "expert", unit, expert)."""

    def stacked(self, replicas_SC: Tensor, expert_S: Tensor) -> dict[str, LowRankPairs]:
        """The pairs' part of the chunks in the slots as A [S, r, I] and B [S, O, r] by projection, differentiable in `replicas_SC`.

        Args:
            replicas_SC: of a source with a pool, all blocks of the pool.
            expert_S: int64: the expert whose chunk is in each slot, on the chunks' device. Every rank has other experts in its slots.
        """

    def chunk_of(self, expert: int, pairs: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
        """[C]: the chunk of an expert whose pairs are these (A, B) by projection: how a saved adapter is read."""
        ...
