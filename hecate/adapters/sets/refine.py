"""The mean of A and B, with B corrected towards the mean of the products (LoRA-FAIR, arXiv 2411.14961).

With ΔW = Σ p_k B_k A_k and the means Ā and B̄, a correction D of B̄ is sought that takes (B̄ + D) Ā near to ΔW and stays small. Everything is
computed from r × r and O × r matrices; ΔW is never formed.

Shapes: r rank, I inputs, O outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from hecate.adapters.sets.adapter_set import AdapterSet, Merged, combined, require_equal_ranks
from hecate.adapters.sets.terms import Terms, joined, norm
from hecate.errors import UserError

Distance = Literal["frobenius", "cosine"]
_STEPS = 1000


def refine(sets: Sequence[AdapterSet], weights: Sequence[float], *, ridge: float = 0.01, distance: Distance = "frobenius") -> Merged:
    """Return Ā and B̄ + D, where D is the least of a distance between the weighted sum and (B̄ + D) Ā, and of `ridge` times the size of D.

    Args:
        distance: frobenius: ‖ΔW - (B̄ + D) Ā‖² + ridge ‖D‖², whose least is known in closed form, D = (ΔW - B̄ Ā) Āᵀ (Ā Āᵀ + ridge)⁻¹.
            cosine: 1 - cos(ΔW, (B̄ + D) Ā) + ridge ‖D‖, the paper's, by descent from D = 0.

    Raises:
        UserError: the sets cannot become one, the weights are wrong, ranks differ, `ridge` is negative or no number, or it is 0 and the
            mean of A has dependent rows.
    """
    if distance not in _CORRECTED:
        raise UserError(f"distance {str(distance)[:100]}: must be one of {', '.join(_CORRECTED)}")
    if not 0 <= ridge < math.inf:
        raise UserError(f"ridge {ridge:g}: must be a number from 0; it says how much a change of B counts beside the distance")
    require_equal_ranks(sets, "refine")

    def make(terms: list[Terms]) -> Terms:
        a_rI = torch.stack([weight * one.a_rI for one, weight in zip(terms, weights, strict=True)]).sum(0)
        b_Or = torch.stack([weight * one.b_Or for one, weight in zip(terms, weights, strict=True)]).sum(0)
        whole = joined([one.times(weight) for one, weight in zip(terms, weights, strict=True)])
        return Terms(a_rI, b_Or + _CORRECTED[distance](whole, Terms(a_rI, b_Or), ridge))

    return combined(sets, weights, sets[0].rank, make, method="refine", keeps_scale=True, options={"ridge": ridge, "distance": distance})


def _by_ridge(whole: Terms, mean: Terms, ridge: float) -> Tensor:
    gram_rr = mean.a_rI @ mean.a_rI.T
    missed_Or = whole.b_Or @ (whole.a_rI @ mean.a_rI.T) - mean.b_Or @ gram_rr
    if ridge == 0 and int(torch.linalg.matrix_rank(mean.a_rI)) < mean.rank:
        raise UserError(
            "the rows of the mean of A depend on one another, so that without ridge no single correction is best\n  give a ridge above 0"
        )
    solved_Or: Tensor = torch.linalg.solve(gram_rr + ridge * torch.eye(mean.rank, dtype=gram_rr.dtype), missed_Or, left=False)
    return solved_Or


def _by_cosine(whole: Terms, mean: Terms, ridge: float) -> Tensor:
    """Descent with steps that are halved until they lower the objective, so that the end is never worse than D = 0."""
    gram_rr = mean.a_rI @ mean.a_rI.T
    sum_Or, length = whole.b_Or @ (whole.a_rI @ mean.a_rI.T), norm(whole)
    change_Or = torch.zeros_like(mean.b_Or)

    def objective(change_Or: Tensor) -> tuple[float, Tensor]:
        b_Or = mean.b_Or + change_Or
        along_Or = b_Or @ gram_rr
        product, own, size = float((b_Or * sum_Or).sum()), math.sqrt(max(0.0, float((b_Or * along_Or).sum()))), float(change_Or.norm())
        if own == 0 or length == 0:
            return 1.0 + ridge * size, torch.zeros_like(b_Or)
        slope_Or = along_Or * (product / (length * own**3)) - sum_Or / (length * own)
        if size > 0:
            return 1.0 - product / (length * own) + ridge * size, slope_Or + ridge / size * change_Or
        # At D = 0 its size has no gradient: the smallest of the subgradients is the steepest way down.
        return 1.0 - product / (length * own), slope_Or * max(0.0, 1.0 - ridge / max(float(slope_Or.norm()), 1e-300))

    value, slope_Or = objective(change_Or)
    step = float(mean.b_Or.norm()) or 1.0
    for _ in range(_STEPS):
        steepness = float((slope_Or**2).sum())
        while step * steepness > 1e-16:
            tried, next_Or = objective(change_Or - step * slope_Or)
            if tried <= value - 0.5 * step * steepness:
                break
            step /= 2
        else:
            break
        change_Or, value, slope_Or, step = change_Or - step * slope_Or, tried, next_Or, 2 * step
    return change_Or


_CORRECTED: dict[str, Callable[[Terms, Terms, float], Tensor]] = {"frobenius": _by_ridge, "cosine": _by_cosine}
