"""Merges of adapters in their plainest form, with dense matrices in float64, loops and scikit-learn, beside `hecate.adapters.sets`.

Shapes: r rank, I inputs, O outputs, k clusters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.linear_model import Ridge
from torch import Tensor

Pair = tuple[Tensor, Tensor]
"""A [r, I] and B [O, r], the scale in B"""


def dense(pair: Pair) -> Tensor:
    """[O, I]"""
    a, b = pair
    return b @ a


def weighted_sum(pairs: Sequence[Pair], weights: Sequence[float]) -> Tensor:
    total = torch.zeros_like(dense(pairs[0]))
    for pair, weight in zip(pairs, weights, strict=True):
        total += weight * dense(pair)
    return total


def lego(pairs: Sequence[Pair], clusters: int, *, parameter: bool, output: bool) -> Tensor:
    """The merged matrix of LoRA-LEGO's rule: terms, k-means, means of members, their mean norms, and the factor of the whole."""
    units = []
    for a, b in pairs:
        for row, column in zip(a.numpy(), b.T.numpy(), strict=True):
            length = math.sqrt(np.linalg.norm(row) * np.linalg.norm(column))
            if length > 0:
                unit = np.concatenate([row / np.linalg.norm(row) * length, column / np.linalg.norm(column) * length])
                units.append(unit if unit[np.argmax(np.abs(unit))] > 0 else -unit)
    units.sort(key=tuple)
    inputs = pairs[0][0].shape[1]
    labels = (
        KMeans(clusters, n_init=10, max_iter=300, random_state=0).fit(np.array(units)).labels_
        if len(units) > clusters
        else range(len(units))
    )
    total = np.zeros((len(pairs[0][1]), inputs))
    for label in range(clusters):
        members = [unit for unit, of_unit in zip(units, labels, strict=True) if of_unit == label]
        if not members:
            continue
        centre = np.mean(members, axis=0)
        if parameter:
            centre *= np.mean([np.linalg.norm(unit) for unit in members]) / np.linalg.norm(centre)
        total += np.outer(centre[inputs:], centre[:inputs])
    rank = np.mean([len(a) for a, _ in pairs])
    return torch.from_numpy(total * (math.sqrt(rank / clusters) if output else 1.0))


def refined(pairs: Sequence[Pair], weights: Sequence[float], ridge: float) -> Pair:
    """The means of A and B, and each row of B corrected by a ridge regression of its own."""
    mean_a = sum(weight * a for (a, _), weight in zip(pairs, weights, strict=True))
    mean_b = sum(weight * b for (_, b), weight in zip(pairs, weights, strict=True))
    assert isinstance(mean_a, Tensor)
    missed = weighted_sum(pairs, weights) - mean_b @ mean_a
    rows = [Ridge(alpha=ridge, fit_intercept=False, solver="cholesky").fit(mean_a.T.numpy(), row.numpy()).coef_ for row in missed]
    return mean_a, mean_b + torch.from_numpy(np.array(rows))


def largest(vectors: Sequence[Tensor], density: float) -> list[Tensor]:
    """The masks of the ⌈density · n⌉ largest magnitudes of all vectors together; of equal ones the first."""
    whole = torch.cat([vector.flatten() for vector in vectors]).abs().tolist()
    order = sorted(range(len(whole)), key=lambda number: (-whole[number], number))
    mask = torch.zeros(len(whole), dtype=torch.bool)
    mask[order[: math.ceil(density * len(whole))]] = True
    return [part.view_as(vector) for part, vector in zip(mask.split([vector.numel() for vector in vectors]), vectors, strict=True)]
