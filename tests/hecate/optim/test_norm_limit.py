"""The limit of gradient norms: what is a spike, and what is not."""

from __future__ import annotations

import math
from itertools import pairwise

from hecate.optim.norm_limit import LEAST, WINDOW, norm_limit, with_norm


def test_the_limit_is_so_many_robust_sigmas_above_the_median() -> None:
    norms = (*[1.0, 2.0, 3.0, 4.0, 5.0] * 8, 1e6, 1e6)  # two spikes among 42 norms move neither median nor MAD
    assert math.isclose(norm_limit(norms, 6.0), 3.0 + 6.0 * 1.4826 * 1.0)
    assert norm_limit(norms, None) == math.inf
    assert norm_limit(norms[: LEAST - 1], 6.0) == math.inf
    assert math.isclose(norm_limit([2.0] * LEAST, 6.0), 2.0 * 1.06), "norms that are all equal leave room"


def test_only_the_last_finite_norms_count() -> None:
    norms: tuple[float, ...] = ()
    for step in range(WINDOW + 10):
        norms = with_norm(norms, math.nan if step == 50 else float(step))
    assert len(norms) == WINDOW
    assert norms[-1] == WINDOW + 9
    assert all(before < after for before, after in pairwise(norms))


def test_a_lasting_change_stops_to_be_a_spike() -> None:
    norms = (1.0,) * WINDOW
    spikes = 0
    for _ in range(WINDOW):
        spikes += norm_limit(norms, 6.0) < 10.0
        norms = with_norm(norms, 10.0)
    assert 0 < spikes <= WINDOW // 2 + 1
