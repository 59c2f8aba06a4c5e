"""The rank-one terms of one module, and what can be computed of their sum without ever forming it.

Shapes: r terms, I inputs, O outputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Terms:
    """A sum of rank-one matrices, Σ b_i a_iᵀ = B A, [O, I]: what an adapter adds to the weight of a module, its scale included."""

    a_rI: Tensor
    """float64"""
    b_Or: Tensor
    """float64, with the adapter's scale folded in"""

    @property
    def rank(self) -> int:
        """The number of terms."""
        return len(self.a_rI)

    def times(self, factor: float) -> Terms:
        """Return the terms of a multiple of the sum."""
        return Terms(self.a_rI, factor * self.b_Or)

    def padded(self, rank: int) -> Terms:
        """Return the same sum with terms of zeros up to `rank`."""
        missing = rank - self.rank
        assert missing >= 0, (rank, self.rank)
        return Terms(torch.nn.functional.pad(self.a_rI, (0, 0, 0, missing)), torch.nn.functional.pad(self.b_Or, (0, missing)))


def joined(terms: Sequence[Terms]) -> Terms:
    """Return all terms of several sums: those of the sum of the sums."""
    return Terms(torch.cat([one.a_rI for one in terms]), torch.cat([one.b_Or for one in terms], dim=1))


def norm(terms: Terms) -> float:
    """Return the Frobenius norm of the sum, to rounding: by QR, since a root of Gram matrices would lose half of the digits."""
    return float(torch.linalg.matrix_norm(_core(terms)))


def inner(one: Terms, other: Terms) -> float:
    """Return the inner product of two sums, the sum of the products of their elements."""
    return float(((one.a_rI @ other.a_rI.T) * (one.b_Or.T @ other.b_Or)).sum())


def relative_error(found: Terms, targets: Sequence[Terms]) -> float:
    """Return how far a sum is from those that it stands for: the norm of all differences over that of all targets.

    It is 0 where both are 0, and infinite where the targets alone are.
    """
    missed = math.hypot(*(norm(joined([found, target.times(-1.0)])) for target in targets))
    whole = math.hypot(*(norm(target) for target in targets))
    if whole == 0:
        return 0.0 if missed == 0 else math.inf
    return missed / whole


def nearest(terms: Terms, rank: int) -> Terms:
    """Return the `rank` terms whose sum is nearest in the Frobenius norm: the largest singular values, halved between A and B."""
    q_a_Im, r_a_mr = torch.linalg.qr(terms.a_rI.T)
    q_b_On, r_b_nr = torch.linalg.qr(terms.b_Or)
    u_nk, s_k, v_km = torch.linalg.svd(r_b_nr @ r_a_mr.T, full_matrices=False)
    root_k = s_k[:rank].sqrt()
    a_kI = root_k[:, None] * (v_km[:rank] @ q_a_Im.T)
    return Terms(a_kI, (q_b_On @ u_nk[:, :rank]) * root_k).padded(rank)


def _core(terms: Terms) -> Tensor:
    """A small matrix with the singular values of the sum."""
    r_a_mr = torch.linalg.qr(terms.a_rI.T, mode="r").R
    r_b_nr = torch.linalg.qr(terms.b_Or, mode="r").R
    return r_b_nr @ r_a_mr.T
