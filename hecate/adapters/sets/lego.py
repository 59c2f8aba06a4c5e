"""Terms of several adapters, clustered: each cluster becomes one term (LoRA-LEGO, arXiv 2409.16167).

Shapes: n terms of all adapters, k clusters, I inputs, O outputs.
"""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from hecate.adapters.sets.adapter_set import AdapterSet, Merged, combined
from hecate.adapters.sets.terms import Terms, joined
from hecate.errors import UserError, install_hint

if TYPE_CHECKING:
    from threadpoolctl import ThreadpoolController

Reweight = Literal["none", "parameter", "output", "both"]
REWEIGHTS: tuple[Reweight, ...] = ("none", "parameter", "output", "both")


def lego(sets: Sequence[AdapterSet], weights: Sequence[float], *, rank: int | None = None, reweight: Reweight = "both") -> Merged:
    """Return a set whose terms are the centres of clusters of the sets' terms, found by k-means.

    Each adapter's terms count N times its weight of N adapters, so that equal weights leave them as they are, and where every term is a
    cluster of its own, the result is N times the weighted sum: the plain sum for equal weights. Errors are against that.

    Args:
        rank: the number of clusters; None: the largest rank of the sets.
        reweight: parameter: a centre gets the mean norm of its cluster's terms, because terms that differ cancel out in part. output: the
            whole is multiplied by √(mean rank of the sets / `rank`). both is the paper's.

    Raises:
        UserError: the sets cannot become one, the weights are wrong, `rank` is below 1 or above the number of terms, or scikit-learn is
            missing.
    """
    require_scikit_learn()
    clusters = max(one.rank for one in sets) if rank is None else rank
    if reweight not in REWEIGHTS:
        raise UserError(f"reweight {str(reweight)[:100]}: must be one of {', '.join(REWEIGHTS)}")
    available = sum(one.rank for one in sets)
    if not 1 <= clusters <= available:
        raise UserError(
            f"rank {clusters}: the adapters have {available} terms in each module, {' + '.join(str(one.rank) for one in sets)}\n"
            f"  give a rank from 1 to {available}"
        )
    factor = math.sqrt(available / len(sets) / clusters) if reweight in ("output", "both") else 1.0

    def make(terms: list[Terms]) -> Terms:
        counted = joined([one.times(len(sets) * weight) for one, weight in zip(terms, weights, strict=True)])
        return clustered(counted, clusters, mean_norms=reweight in ("parameter", "both")).times(factor)

    return combined(
        sets, weights, clusters, make, method="lego", stands_for=float(len(sets)), options={"rank": clusters, "reweight": reweight}
    )


def clustered(terms: Terms, clusters: int, *, mean_norms: bool) -> Terms:
    """Return one term for each cluster of terms, and terms of zeros if there are fewer.

    The result does not depend on the order of the terms, nor on how each is split between its row of A and its column of B.
    """
    units_nX = gauge_fixed(terms)
    units_nX = units_nX[sorted(range(len(units_nX)), key=lambda number: units_nX[number].tolist())]
    label_n = cluster_labels(units_nX, clusters)
    centres = []
    for label in np.unique(label_n):
        members_mX = units_nX[label_n == label]
        centre_X = members_mX.mean(0)
        if mean_norms and len(members_mX) > 1 and (length := float(np.linalg.norm(centre_X))) > 0:
            centre_X = centre_X * (np.linalg.norm(members_mX, axis=1).mean() / length)
        centres.append(centre_X)
    inputs = terms.a_rI.shape[1]
    centre_kX = torch.from_numpy(np.reshape(centres, (len(centres), units_nX.shape[1])))
    return Terms(centre_kX[:, :inputs].contiguous(), centre_kX[:, inputs:].T.contiguous()).padded(clusters)


def gauge_fixed(terms: Terms) -> np.ndarray:
    """Return each term as its row of A and its column of B, [n, I + O], in the one of its equal forms that is chosen; zeros are left out.

    (a, b) and (c a, b / c) are the same term. That one is taken where both have the same norm and the largest number is positive, since
    equal terms would else be far from each other.
    """
    a_nI, b_nO = terms.a_rI, terms.b_Or.T
    of_a, of_b = a_nI.norm(dim=1), b_nO.norm(dim=1)
    there = (of_a > 0) & (of_b > 0)
    ratio = (of_b[there] / of_a[there]).sqrt()[:, None]
    units_nX: Tensor = torch.cat([a_nI[there] * ratio, b_nO[there] / ratio], dim=1)
    if len(units_nX):
        units_nX = units_nX * units_nX.gather(1, units_nX.abs().argmax(1, keepdim=True)).sign()
    return units_nX.numpy()


def cluster_labels(points_nX: np.ndarray, clusters: int) -> np.ndarray:
    """Return the cluster of each point, by scikit-learn's k-means; each its own if there are no more points than clusters.

    It computes with one thread, since so few points are more quickly done than shared out.
    """
    if len(points_nX) <= clusters:
        return np.arange(len(points_nX))
    import sklearn
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings(), sklearn.config_context(assume_finite=True, skip_parameter_validation=True), _pools().limit(limits=1):
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different points than clusters: the others stay empty
        points_nC = in_fewer_coordinates(points_nX)
        # The tolerance is a multiple of the mean variance of a coordinate, and is to be the same distance as with all coordinates.
        tolerance = 1e-4 * points_nC.shape[1] / points_nX.shape[1]
        labels: np.ndarray = KMeans(clusters, n_init=10, max_iter=300, tol=tolerance, random_state=0).fit_predict(points_nC)
    return labels


def in_fewer_coordinates(points_nX: np.ndarray) -> np.ndarray:
    """Return points with the same inner products in at most as many coordinates as there are points: all that k-means depends on.

    Equal points stay equal to the last bit, so that they never come into different clusters.
    """
    row_n = [row.tobytes() for row in points_nX + 0.0]  # so that -0 is 0
    number_of = {row: number for number, row in enumerate(dict.fromkeys(row_n))}
    different_mX = np.frombuffer(b"".join(number_of), dtype=points_nX.dtype).reshape(len(number_of), -1)
    _, point_Cm = np.linalg.qr(different_mX.T)
    points_nC: np.ndarray = point_Cm.T[[number_of[row] for row in row_n]]
    return points_nC


@cache
def _pools() -> ThreadpoolController:
    """The threads of the libraries that scikit-learn, which must have been imported, computes with."""
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()


def require_scikit_learn() -> None:
    """Raises UserError: scikit-learn is not installed."""
    if importlib.util.find_spec("sklearn") is None:
        raise UserError(f"lego clusters by scikit-learn, which is not installed\n  pip install scikit-learn; or {install_hint('merge')}")
