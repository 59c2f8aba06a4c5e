"""Operations that keep the sum of the terms or come near to it: stack, average and recompress."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

import torch
from torch import Tensor

from hecate.adapters.sets.adapter_set import AdapterSet, Merged, combined, described
from hecate.adapters.sets.terms import Terms, joined, nearest
from hecate.errors import UserError


def stack(sets: Sequence[AdapterSet], weights: Sequence[float], *, rank: int | None = None) -> Merged:
    """Return the weighted sum of adapters of any ranks, exactly: all their terms beside each other (FLoRA, arXiv 2409.05976).

    Args:
        rank: the result has these many terms instead, those nearest to the sum (`recompress`); None: as many as all have together.

    Raises:
        UserError: the sets cannot become one (`require_alike`), the weights are wrong, or `rank` is above that of the sum.
    """

    def make(terms: list[Terms]) -> Terms:
        return joined([one.times(weight) for one, weight in zip(terms, weights, strict=True)])

    whole = combined(sets, weights, sum(one.rank for one in sets), make, method="stack")
    return whole if rank is None else recompress(whole.result, rank)


def average(sets: Sequence[AdapterSet], weights: Sequence[float], *, inexact: bool = False) -> Merged:
    """Return the weighted mean of A and of B: the weighted sum of the adapters, exactly, where all have the same A (FFA-LoRA, 2403.12313).

    Args:
        inexact: take the means where A differ, too, of smaller ranks padded with zeros: federated averaging, whose result is not the mean.

    Raises:
        UserError: the sets cannot become one, the weights are wrong, or A differ and `inexact` is false.
    """
    rank = max(one.rank for one in sets)
    if not inexact:
        for other in sets[1:]:
            if other.rank != sets[0].rank:
                raise UserError(f"{other.name} and {sets[0].name} have ranks {other.rank} and {sets[0].rank}, {_DIFFERENT}")

    def make(terms: list[Terms]) -> Terms:
        first, *others = terms
        alike = all(torch.equal(first.a_rI, other.a_rI) for other in others)
        if not alike and not inexact:
            raise UserError(f"the A of {len(sets)} adapters are not the same, {_DIFFERENT}")
        padded = [one.padded(rank) for one in terms]
        a_rI = first.a_rI if alike else _mean([one.a_rI for one in padded], weights)
        return Terms(a_rI, _mean([one.b_Or for one in padded], weights))

    return combined(sets, weights, rank, make, method="average", keeps_scale=True)


_DIFFERENT = (
    "and the product of two means is not the mean of products\n  use stack, which is exact, or take the means all the same: --inexact"
)


def recompress(one: AdapterSet, rank: int) -> Merged:
    """Return the nearest set of a smaller rank, by the singular values of each module. It is inexact where the sum has a higher rank.

    Raises:
        UserError: `rank` is below 1 or above the set's.
    """
    if not 1 <= rank <= one.rank:
        raise UserError(f"rank {rank}: {one.name} has {one.rank} terms in each module\n  give a rank from 1 to {one.rank}")
    result = replace(
        one,
        name=f"rank {rank} of {one.name}",
        description=described(one.description, rank, 1.0),
        rank=rank,
        scale=1.0,
        read=lambda module: nearest(one.read(module), rank),
        made={**one.made, "recompressed": rank},
    )
    return Merged(result, lambda module: [one.read(module)])


def kept_numbers(density: float, numel: int) -> int:
    """Return ⌈density · numel⌉, where a density such as 0.07 is the decimal number that it is written as, not the nearest binary one.

    Raises:
        UserError: `density` is not above 0 and at most 1.
    """
    if not 0 < density <= 1:
        raise UserError(f"density {density:g}: must be above 0 and at most 1, the share of the numbers that are kept")
    return math.ceil(Fraction(repr(float(density))) * numel)


def _mean(matrices: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    return torch.stack([weight * matrix for matrix, weight in zip(matrices, weights, strict=True)]).sum(0)
