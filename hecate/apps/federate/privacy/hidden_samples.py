"""Differential privacy of a source's samples (DP-SGD, arXiv 1607.00133), where each source trains an adapter of its own.

In a step a source's gradient is

    (sum over its samples of clip(g) + noise · N(0, 1) · limit) / number of its samples

in which g is the gradient of the mean loss over the sample's label tokens, by all numbers that the source's adapter trains, and clip(g)
has at most the norm `clip`. Nothing of it but g depends on a sample's content: not the number of its label tokens, and not those of the
other samples. Each sample is a micro-step of its own, so that what a rank's backward pass leaves is one g.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hecate.data.batches import Batch
from hecate.engine.shards import ExpertShards
from hecate.experts.seeding import generator
from hecate.parallel.comm.device_tables import copy_to
from hecate.train.extensions.extension import Moment, StepExtension


@dataclass(frozen=True, kw_only=True)
class Privacy:
    """How samples are hidden."""

    clip: float
    """The largest norm that a sample's gradient may have; infinite: no clipping."""
    noise: float = 0.0
    """The standard deviation of the noise on the sum of a source's clipped gradients, as a multiple of `clip`."""
    seed: int = 0
    """The seed of the noise: who knows it can take the noise away again."""
    first_step: int = 0
    """The number of the run's first step among those with the same seed."""
    sources: tuple[str, ...] = ()
    """The names of the sources, by which noise is drawn, so that a source has the same noise whatever other sources there are."""


@dataclass(frozen=True)
class SampleShares:
    """What a sample counts in a step, by its source."""

    samples_S: Tensor
    """The number of the step's samples of each source, at least 1, float64 [sources]."""
    clip: float

    @staticmethod
    def of(privacy: Privacy, samples_of_source: Sequence[int], device: torch.device) -> SampleShares:
        """The host does not wait for the device."""
        samples_S = torch.tensor([max(samples, 1) for samples in samples_of_source], dtype=torch.float64)
        return SampleShares(copy_to(samples_S, device), privacy.clip)

    def weight_of_source(self, batch: Batch) -> Tensor:
        """float64 [sources]: what a label token of the batch, which is one sample, counts in the loss."""
        return 1 / (self.samples_S * max(len(batch.layout.labelled), 1))

    def limit(self, batch: Batch) -> Tensor:
        """float64 scalar: to which the batch's share of the gradient is clipped. A batch without a sample has no gradient."""
        return self.clip / self.samples_S[batch.task.max().clamp(min=0)]


def add_noise(shards: ExpertShards, privacy: Privacy, samples_of_source: Sequence[int], step: int) -> None:
    """Add each source's noise to the summed gradients of its expert. The noise does not depend on ranks, owners and other sources.

    Args:
        samples_of_source: of this step.
        step: of the run, from 0.
    """
    if not privacy.noise:
        return
    for (unit, expert), parameter in shards.named_parameters().items():
        if parameter.grad is not None:
            source = generator(privacy.seed, "privacy", privacy.sources[expert], privacy.first_step + step, str(unit))
            drawn = torch.randn(parameter.grad.shape, generator=source, dtype=torch.float64)
            deviation = privacy.noise * privacy.clip / max(samples_of_source[expert], 1)
            parameter.grad += copy_to(drawn.mul_(deviation).to(parameter.grad.dtype), parameter.grad.device)


class HiddenSamples(StepExtension):
    """One step in which each micro-batch is one sample at most, whose gradient is clipped, and noise is added to the sums."""

    def __init__(self, privacy: Privacy, shards: ExpertShards, samples_of_source: Sequence[int], step: int) -> None:
        """Args:
        samples_of_source: samples of the whole step by source, all ranks together.
        step: its number, from 0.
        """
        self._privacy, self._shards, self._samples, self._step = privacy, shards, samples_of_source, step
        self._shares = SampleShares.of(privacy, samples_of_source, shards.device)

    def weight_of_source(self, weight: Tensor | None, batch: Batch) -> Tensor:
        return self._shares.weight_of_source(batch)

    def gradient_limit(self, batch: Batch) -> Tensor:
        return self._shares.limit(batch)

    def at(self, moment: Moment, subject: Any = None) -> None:
        if moment == "reduce":
            add_noise(self._shards, self._privacy, self._samples, self._step)
