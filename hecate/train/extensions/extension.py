"""What a run may add to its steps, beside training, without the step knowing of it.

A step comes to named moments, in this order, on every rank alike. At each it calls all its extensions, in the order in which they are
given. A step without extensions executes none of their code.

    step            it begins; with its number
    planned         every layer has its plan
    forward         per pass: the model is about to see its tokens
    loss            per pass: the summed loss; with that scalar
    forwarded       per pass: the loss is complete
    backpropagated  per pass: the backward pass is over
    reduce          the experts' gradients are with their owners, and the replicated ones are about to be summed; with the loads
    reduced         the replicated gradients are summed
    gradients       all gradients are complete, and nothing has changed; with the optimizer
    norm            the ranks are about to exchange the norm and the losses
    optimizer       all ranks have them, and nothing has changed
    stepped         the parameters have changed
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from hecate.data.batches import Batch
from hecate.experts.forward_pass import PassTokens
from hecate.experts.routers.router import RouterStats
from hecate.model.causal_head import CausalHead
from hecate.model.moe_model import MoeModel
from hecate.parallel.values.units import Unit
from hecate.report.events import StepResult

Moment = Literal[
    "step", "planned", "forward", "loss", "forwarded", "backpropagated", "reduce", "reduced", "gradients", "norm", "optimizer", "stepped"
]  # fmt: skip


@dataclass(frozen=True)
class LossMean:
    """How sums over label tokens become the loss of a step."""

    trained: int
    """The number by which sums are divided for the gradients."""
    reported: int
    """The number by which sums are divided for the report."""
    weight_of_source: Tensor | None = None
    """The weight of a token in the sums, by its source, float64 [sources]; None: every weight is 1."""


class StepExtension:
    """What one extension does at a step's moments; by default nothing. An extension belongs to one step, or is the same in all."""

    def at(self, moment: Moment, subject: Any = None) -> None:
        """The step has come to a moment. It may send messages, as on every other rank, and end the step with an error."""

    def mean(self, mean: LossMean, device: torch.device) -> LossMean:
        """How the step's losses are averaged."""
        return mean

    def tokens(self, tokens: PassTokens, moe: MoeModel, head: CausalHead, batch: Batch) -> PassTokens:
        """What the layers of the model see of a batch's tokens."""
        return tokens

    def weight_of_source(self, weight: Tensor | None, batch: Batch) -> Tensor | None:
        """The weight of a label token of this batch in the loss, by its source, float64 [sources]; None: every weight is 1."""
        return weight

    def gradient_limit(self, batch: Batch) -> Tensor | None:
        """The norm to which a batch's gradient is clipped (`TrainingPass.backward`); None: no limit."""
        return None

    def routed(self, stats: Mapping[Unit, RouterStats]) -> None:
        """The layers of a pass have run, and this is what their routers have done, by unit."""

    def sums(self) -> Tensor | None:
        """Numbers of this rank, float64 [n] on its device, to be added up over the ranks; None: none. It is called once in a step."""
        return None

    def figures(self) -> Sequence[float]:
        """Numbers of this rank that all ranks are to know, equally many on every rank. It is called once in a step."""
        return ()

    def completed(self, result: StepResult, figures: Sequence[Sequence[float]], sums: Sequence[float]) -> StepResult:
        """What the step returns, with what this extension has to say in it.

        Args:
            figures: those of all ranks, by rank.
            sums: over all ranks.
        """
        return result
