"""What is to be known of a pair source before there are any pairs, and what makes one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hecate.experts.pairs.source import PairSource
from hecate.parallel.values.expert_kinds import LoraShape, PairSizes, UnitSizes

if TYPE_CHECKING:
    from hecate.experts.family import Site


@dataclass(frozen=True, kw_only=True)
class SourceFacts:
    """What a file of `hecate.experts.pairs.sources` says of its source. It is read where torch is not imported."""

    sizes: Callable[[UnitSizes, Iterable[str], LoraShape], PairSizes]
    """of the pairs of one expert, on these projections. Raises UserError: a size does not fit the configuration"""
    make: Callable[[Site, LoraShape, tuple[str, ...]], PairSource]
    """of a unit's experts, on these projections"""
    draws: bool = False
    """whether ranks draw matrices, each all of them for itself (`PairSizes.seeded`)"""
    fixes_a: bool = False
    """whether A is fixed not only in experts, but in the attention's adapters, too"""
    check_pool: Callable[[LoraShape, int], None] | None = None
    """of a source whose experts train in pools (`PairSizes.pooled`): raises UserError where a pool of so many experts is too small"""
