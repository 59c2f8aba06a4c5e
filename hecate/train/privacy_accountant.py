"""How much of a sample the steps of a run can have told: epsilon, by opacus' accountant of Rényi differential privacy."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hecate.errors import UserError, install_hint


@dataclass(frozen=True)
class PrivacySpent:
    """What is known of a source after some steps, for neighbours that differ in one sample's being blank."""

    epsilon: float
    """if each step had drawn its samples independently (Poisson sampling), as accountants of DP-SGD assume; infinite without noise"""
    epsilon_any_order: float
    """of the order in which this program takes samples, every one once in each pass through the data: it assumes nothing of chance"""
    delta: float
    sampling_rate: float
    """samples of a step / samples of the source"""
    steps: int


def privacy_spent(*, noise: float, delta: float, samples: int, samples_per_step: float, steps: int) -> PrivacySpent:
    """Return what so many steps have told of a source.

    `epsilon_any_order`: a source's samples are taken once in each pass, in an order of its own, so that a sample is in as many steps as
    there are passes, and no other step depends on it. Where a pass ends within a step, the last of it and the first of the next may be
    the same sample: the noise on both is then half as large as clip would have it, and two such terms count as four of Rényi's.

    Args:
        samples: of the source.
        samples_per_step: of the source, at most `samples`.

    Raises:
        UserError: a step takes a sample more than once; or opacus is not installed.
    """
    rate = samples_per_step / samples
    if rate > 1:
        raise UserError(
            f"privacy.clip: a step takes {samples_per_step:g} samples of a source that has {samples}, so that one would count twice\n"
            "  add data, or use a smaller micro_batch_size, fewer gradient_accumulation_steps or fewer ranks"
        )
    passes = -(-math.ceil(steps * samples_per_step - 1e-9) // samples)
    terms = passes if samples % samples_per_step == 0 else 4 * (passes // 2) + passes % 2
    return PrivacySpent(_epsilon(noise, rate, steps, delta), _epsilon(noise, 1.0, terms, delta), delta, rate, steps)


def require_accountant() -> None:
    """Raises UserError: opacus is not installed."""
    try:
        import opacus.accountants.analysis.rdp  # noqa: F401
    except ImportError as error:
        raise UserError(f"privacy.noise: epsilon is computed by opacus: {error}\n  {install_hint('privacy')}") from error


def _epsilon(noise: float, rate: float, steps: int, delta: float) -> float:
    if steps == 0:
        return 0.0
    if noise == 0:
        return math.inf
    require_accountant()
    from opacus.accountants import RDPAccountant
    from opacus.accountants.analysis import rdp

    orders = RDPAccountant.DEFAULT_ALPHAS
    spent = rdp.compute_rdp(q=rate, noise_multiplier=noise, steps=steps, orders=orders)
    return float(rdp.get_privacy_spent(orders=orders, rdp=spent, delta=delta)[0])
