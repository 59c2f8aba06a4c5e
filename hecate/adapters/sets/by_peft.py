"""Merges of factors that the library PEFT computes, for comparison: what its `add_weighted_adapter` calls linear and ties.

Both take A and B apart, each multiplied by the root of weight times scale, so that neither is the weighted sum of the products.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from hecate.adapters.sets.adapter_set import AdapterSet, Merged, combined, require_equal_ranks
from hecate.adapters.sets.terms import Terms
from hecate.errors import UserError, install_hint

_Merge = Callable[[list[Tensor], Tensor], Tensor]
"""a function of matrices and their weights"""


def linear(sets: Sequence[AdapterSet], weights: Sequence[float]) -> Merged:
    """Return the weighted sums of A and of B.

    Raises:
        UserError: the sets cannot become one, the weights are wrong, ranks differ, or PEFT is missing.
    """
    require_peft()
    from peft.utils.merge_utils import task_arithmetic

    return _by_factors(sets, weights, task_arithmetic, "linear")


def ties(sets: Sequence[AdapterSet], weights: Sequence[float], *, density: float = 0.2) -> Merged:
    """Return of A and of B the numbers whose sign most of the adapters' weight has (TIES, arXiv 2306.01708).

    Args:
        density: the share of each matrix's numbers, the largest, that take part.

    Raises:
        UserError: as `linear`; or `density` is not above 0 and at most 1.
    """
    if not 0 < density <= 1:
        raise UserError(f"density {density:g}: must be above 0 and at most 1, the share of the numbers that take part")
    require_peft()
    from peft.utils import merge_utils

    return _by_factors(sets, weights, partial(merge_utils.ties, density=density), "ties", density=density)


def _by_factors(sets: Sequence[AdapterSet], weights: Sequence[float], merge: _Merge, method: str, **options: float) -> Merged:
    require_equal_ranks(sets, method)
    scaled = [weight * one.scale for one, weight in zip(sets, weights, strict=False)]  # `combined` checks their number
    of_b = torch.tensor([math.sqrt(abs(one)) for one in scaled], dtype=torch.float64)
    of_a = of_b * torch.tensor([math.copysign(1.0, one) for one in scaled], dtype=torch.float64)

    def make(terms: list[Terms]) -> Terms:
        plain_b = [one.b_Or / of_set.scale for one, of_set in zip(terms, sets, strict=True)]
        return Terms(merge([one.a_rI for one in terms], of_a), merge(plain_b, of_b))

    return combined(sets, weights, sets[0].rank, make, method=method, options=options)


def require_peft() -> None:
    """Raises UserError: PEFT is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise UserError(f"linear and ties are computed by PEFT, which is not installed\n  pip install peft; or {install_hint('merge')}")
