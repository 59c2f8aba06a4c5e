"""Epsilon, beside opacus' own accountant, and what its two figures assume."""

import math
import sys

import pytest
from opacus.accountants import RDPAccountant

from hecate.apps.federate.privacy.accountant import privacy_spent, require_accountant, sampling_rate
from hecate.errors import UserError


def by_opacus(noise: float, rate: float, steps: int, delta: float) -> float:
    accountant = RDPAccountant()
    for _ in range(steps):
        accountant.step(noise_multiplier=noise, sample_rate=rate)
    return float(accountant.get_epsilon(delta))


def test_epsilon_is_that_of_opacus() -> None:
    found = privacy_spent(noise=1.1, delta=1e-5, samples=1000, samples_per_step=10, steps=1000)
    assert (found.sampling_rate, found.steps, found.delta) == (0.01, 1000, 1e-5)
    assert found.epsilon == pytest.approx(by_opacus(1.1, 0.01, 1000, 1e-5), rel=1e-12)
    assert found.epsilon == pytest.approx(1.7117700912203435, rel=1e-9)
    assert found.epsilon_any_order == pytest.approx(by_opacus(1.1, 1.0, 10, 1e-5), rel=1e-12)


def test_a_pass_that_ends_within_a_step_can_count_a_sample_twice() -> None:
    """999 samples in steps of 10: two passes, whose border is in one step, count as four terms; one pass as one."""
    two = privacy_spent(noise=2.0, delta=1e-5, samples=999, samples_per_step=10, steps=150)
    assert two.epsilon_any_order == pytest.approx(by_opacus(2.0, 1.0, 4, 1e-5), rel=1e-12)
    one = privacy_spent(noise=2.0, delta=1e-5, samples=999, samples_per_step=10, steps=99)
    assert one.epsilon_any_order == pytest.approx(by_opacus(2.0, 1.0, 1, 1e-5), rel=1e-12)


def test_without_noise_there_is_no_bound_and_without_steps_nothing_is_told() -> None:
    assert privacy_spent(noise=0.0, delta=1e-5, samples=10, samples_per_step=1, steps=1).epsilon == math.inf
    nothing = privacy_spent(noise=1.0, delta=1e-5, samples=10, samples_per_step=1, steps=0)
    assert (nothing.epsilon, nothing.epsilon_any_order) == (0.0, 0.0)


def test_a_step_with_more_samples_than_there_are_is_refused() -> None:
    assert sampling_rate("gcd", 10, 10) == 1
    with pytest.raises(UserError, match="a step takes 12 samples of gcd, which has 10, so that one would count twice"):
        sampling_rate("gcd", 10, 12)


def test_data_that_are_begun_anew_count_anew() -> None:
    found = privacy_spent(noise=2.0, delta=1e-5, samples=100, samples_per_step=10, steps=5, runs=3)
    assert (found.steps, found.epsilon) == (15, pytest.approx(by_opacus(2.0, 0.1, 15, 1e-5), rel=1e-12))
    assert found.epsilon_any_order == pytest.approx(by_opacus(2.0, 1.0, 3, 1e-5), rel=1e-12)
    assert str(found).startswith(
        f"epsilon {found.epsilon:.3g} at delta 1e-05 after 15 steps, if the sampling rate 0.1 were a probability; "
    )


def test_without_opacus_the_message_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "opacus"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "opacus", None)
    with pytest.raises(UserError, match=r"epsilon is computed by opacus(.|\n)*\[privacy\]"):
        require_accountant()
