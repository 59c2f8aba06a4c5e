"""The limit above which a gradient norm counts as a spike, so that the step is skipped; a pure function of the norms before it.

As in `SkipStepAdamW` of OLMo-core (`sigma_factor`, an interval of 128 steps), but with median and MAD in place of mean and standard
deviation, so that a few spikes among the last steps do not raise the limit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

WINDOW = 128
"""The number of the last finite norms from which the limit is computed."""
LEAST = 32
"""The number of norms below which there is no limit."""
_SIGMA_OF_MAD = 1.4826
"""The standard deviation of a normal distribution over its median absolute deviation."""
_LEAST_SIGMA = 0.01
"""The least sigma, as a share of the median: among norms that are all nearly equal, a small change is no spike."""


def with_norm(norms: tuple[float, ...], norm: float) -> tuple[float, ...]:
    """The last finite norms, when a step with this norm is done. Norms of skipped steps count, so that a lasting change is no spike."""
    return (*norms, norm)[-WINDOW:] if math.isfinite(norm) else norms


def norm_limit(norms: Sequence[float], sigma_factor: float | None) -> float:
    """median + sigma_factor * sigma of the norms; inf if `sigma_factor` is None, or if there are too few norms.

    sigma is 1.4826 * MAD, and a hundredth of the median at least.
    It is the same, bit for bit, wherever the norms are the same.
    """
    if sigma_factor is None or len(norms) < LEAST:
        return math.inf
    middle = median(norms)
    deviation = median(abs(norm - middle) for norm in norms)
    return middle + sigma_factor * max(_SIGMA_OF_MAD * deviation, _LEAST_SIGMA * middle)
