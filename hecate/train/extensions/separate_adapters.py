"""Experts that are adapters of their own, one for each source of samples: each is trained by the mean over its own label tokens.

So the others' numbers do not matter to it. The loss that is reported is the mean over the experts that have label tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hecate.parallel.comm.device_tables import copy_to
from hecate.train.extensions.extension import LossMean, StepExtension


@dataclass(frozen=True)
class SeparateAdapters(StepExtension):
    """The losses of one step in which each source trains an expert of its own."""

    labels_of_source: Sequence[int]
    """The number of label tokens of the whole step by source, over all ranks and micro-batches."""

    def mean(self, mean: LossMean, device: torch.device) -> LossMean:
        """Each source's own mean. The host does not wait for the device."""
        weights = torch.tensor([1 / max(labels, 1) for labels in self.labels_of_source], dtype=torch.float64)
        return LossMean(1, max(sum(labels > 0 for labels in self.labels_of_source), 1), copy_to(weights, device))
