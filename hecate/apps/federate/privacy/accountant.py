"""How much of a sample the steps of a run can have told: epsilon, by opacus' accountant of Rényi differential privacy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib.util import find_spec

from hecate.errors import UserError, install_hint


@dataclass(frozen=True)
class PrivacySpent:
    """What is known of a source after some steps, for neighbours that differ in one sample's being blank."""

    epsilon: float
    """The epsilon if each step had drawn its samples independently (Poisson sampling), as accountants of DP-SGD assume; infinite without
    noise."""
    epsilon_any_order: float
    """The epsilon of the order in which this program takes samples, each once in a pass through the data: it assumes nothing of chance."""
    delta: float
    sampling_rate: float
    """The number of samples of a step over the number of samples of the source."""
    steps: int

    def __str__(self) -> str:
        return (
            f"epsilon {self.epsilon:.3g} at delta {self.delta:g} after {self.steps} steps, if the sampling rate {self.sampling_rate:.3g} "
            f"were a probability; {self.epsilon_any_order:.3g} whatever the order of samples"
        )


def sampling_rate(name: str, samples: int, samples_per_step: float) -> float:
    """Return the share of a source's samples that a step takes.

    Raises:
        UserError: a step takes a sample more than once. `name` is the source's.
    """
    if samples_per_step > samples:
        raise UserError(
            f"privacy.clip: a step takes {samples_per_step:g} samples of {name}, which has {samples}, so that one would count twice\n"
            "  add data, or use a smaller micro_batch_size, fewer gradient_accumulation_steps or fewer ranks"
        )
    return samples_per_step / samples


def privacy_spent(*, noise: float, delta: float, samples: int, samples_per_step: float, steps: int, runs: int = 1) -> PrivacySpent:
    """Return what so many steps have told of a source.

    `epsilon_any_order`: a source's samples are taken once in each pass, in an order of its own, so that a sample is in as many steps as
    there are passes, and no other step depends on it. Where a pass ends within a step, the last of it and the first of the next may be
    the same sample: the noise on both is then half as large as clip would have it, and two such terms count as four of Rényi's.

    Args:
        samples: of the source.
        samples_per_step: of the source, at most `samples`.
        steps: of each run.
        runs: how many times the data were begun anew.

    Raises:
        UserError: opacus is not installed.
    """
    rate = samples_per_step / samples
    passes = -(-math.ceil(steps * samples_per_step - 1e-9) // samples)
    terms = passes if samples % samples_per_step == 0 else 4 * (passes // 2) + passes % 2
    return PrivacySpent(_epsilon(noise, rate, runs * steps, delta), _epsilon(noise, 1.0, runs * terms, delta), delta, rate, runs * steps)


def require_accountant() -> None:
    """Raises UserError: opacus is not installed."""
    try:
        found = find_spec("opacus") is not None
    except ValueError:  # a module without a specification
        found = False
    if not found:
        raise UserError(f"privacy.noise: epsilon is computed by opacus, which is not installed\n  {install_hint('privacy')}")


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
