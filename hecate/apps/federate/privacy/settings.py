"""The keys of differential privacy: the section `privacy` of a configuration."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hecate.config.ranges import AT_LEAST_ZERO, POSITIVE, Range, key

if TYPE_CHECKING:
    from hecate.config import Config


@dataclass(frozen=True, kw_only=True)
class PrivacyConfig:
    """Differential privacy of the training samples, with moe.router.input given: of each item of data.train by itself
    (docs/results/systems.md)."""

    clip: float | None = field(default=None, metadata=key(POSITIVE))
    """The most that one sample's gradient may have as its norm, over all numbers of its item's adapter: longer ones are clipped before the
    step's are averaged. A sample's loss is then the mean over its own label tokens, and each sample is a micro-step of its own. Needs
    data.packing false, max_grad_norm null and fssdp.policy full. null: no sample is hidden."""
    noise: float = field(default=0.0, metadata=key(AT_LEAST_ZERO))
    """With clip: the standard deviation of the noise on the sum of an item's clipped gradients in a step, as a multiple of clip. It is
    drawn from the seed and the item's name, so whoever knows the seed can take it away. 0: no noise, and no privacy."""
    delta: float = field(default=1e-5, metadata=key(Range(0, 1, low_open=True, high_open=True), computes=False))
    """With noise: the probability for which epsilon, which the run says at its end, need not hold. Less than 1 / the number of samples."""


SETTINGS = PrivacyConfig
"""the section `privacy`"""


def privacy_keys(config: "Config") -> PrivacyConfig:
    """The section of a configuration."""
    privacy: PrivacyConfig = config.privacy  # type: ignore[attr-defined]  # checkers know the core's keys alone
    return privacy
